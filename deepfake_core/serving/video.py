"""From a clip to verdicts, one per face that is followed through it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from deepfake_core.config import CLASS_COLOURS
from deepfake_core.detector import BATCH_SIZE, UnreadableImageError
from deepfake_core.input_gate import ImageQuality
from deepfake_core.serving.explained import draw_heat
from deepfake_core.serving.faces import Box
from deepfake_core.serving.frames import ClipFrames
from deepfake_core.serving.predictor import Crop, Predictor
from deepfake_core.serving.verdict import Clip, Judged, Verdict
from deepfake_core.storage.files import show_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_FRAMES = 48
"""How many frames are judged of a clip."""

MIN_IOU_SAME_TRACK = 0.3
"""Intersection over union from which on boxes of successive frames show the same face."""

TRIMMED_SHARE = 0.1
"""Share of a face's logits that is left out at each end of their mean."""

MIN_SURE_FRAMES = 8
"""A verdict on a face seen in fewer frames is not sure."""

SPREAD = (0.1, 0.9)
"""Quantiles of a face's scores that are stated, and that must be beyond the bound where the verdict is sure."""

MIN_TRACK_FRAMES = 3
"""A face seen in fewer frames decides about the clip only where there is no other."""


@dataclass
class _Track:
    """A face through a clip."""

    seconds: list[float] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    qualities: list[ImageQuality] = field(default_factory=list)
    crops: list[np.ndarray] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    shown: np.ndarray | None = None
    """The crop with the highest P(fake)."""


def judge_clip(
    predictor: Predictor,
    file: Path,
    frames: int = MAX_FRAMES,
    explain: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """Judge a clip's faces, each by the trimmed mean of its frames' logits; the first verdict, of the most likely fake,
    decides about the clip.

    Args:
        frames: how many are judged, spread evenly over the clip.
        on_progress: called after each frame with 1, and at the end with the frames that the clip lacks; and with all.

    Returns:
        One verdict per face; one with an `error` if the clip can't be read or shows no face. A `warning` says what of
        the clip was not seen.
    """
    detector, tracks, clip = predictor.detector, list[_Track](), ClipFrames(file, frames)
    name = show_name(file)
    try:
        for second, image in clip:
            _follow(tracks, second, predictor.cut_faces(image))
            if sum(len(track.crops) for track in tracks) >= BATCH_SIZE:
                _score(tracks, predictor)
            if on_progress:
                on_progress(1, frames)
    except (UnreadableImageError, OSError) as exc:
        error = str(exc) if isinstance(exc, UnreadableImageError) else f"can't be read ({exc.strerror or exc})"
        return Judged(name, [Verdict.refuse(name, detector.threshold, error, unreadable=True)])
    _score(tracks, predictor)
    if on_progress:
        on_progress(frames - clip.seen, frames)
    if not tracks:
        error = f"no face was found in {clip.seen} frames; --no-detect judges whole frames"
        return Judged(name, [Verdict.refuse(name, detector.threshold, error, warning=clip.warning)])
    tracks.sort(key=lambda track: (len(track.scores) >= MIN_TRACK_FRAMES, average_scores(track.scores)), reverse=True)
    verdicts = [
        _judge(predictor, clip, name, number if predictor.detects else None, one)
        for number, one in enumerate(tracks, 1)
    ]
    picture = None
    if explain and tracks[0].shown is not None:
        _, heat = detector.explain(tracks[0].shown[None])
        side = detector.image_size
        lines = [verdict.describe() for verdict in verdicts]
        picture = draw_heat(
            Image.fromarray(tracks[0].shown), [Box(0, 0, side, side)], list(heat), [verdicts[0].label == "fake"], lines
        )
    return Judged(name, verdicts, picture, timelines=[(track.seconds, track.scores) for track in tracks])


def average_scores(scores: list[float]) -> float:
    """Return the probability at the trimmed mean of the logits, 0 to 1."""
    probability = np.clip(np.sort(np.asarray(scores, np.float64)), 1e-6, 1 - 1e-6)
    cut = int(TRIMMED_SHARE * len(probability))
    kept = probability[cut : len(probability) - cut]
    return float(1 / (1 + np.exp(-np.mean(np.log(kept) - np.log1p(-kept)))))


def _follow(tracks: list[_Track], second: float, crops: list[Crop]) -> None:
    """Add each face to the track whose last box it overlaps most, or to a new one."""
    free = list(tracks)
    for crop in crops:
        overlaps = [track.boxes[-1].overlap(crop.box) for track in free]
        best = int(np.argmax(overlaps)) if overlaps else 0
        if overlaps and overlaps[best] >= MIN_IOU_SAME_TRACK:
            track = free.pop(best)
        else:
            track = _Track()
            tracks.append(track)
        track.seconds.append(second)
        track.boxes.append(crop.box)
        track.qualities.append(crop.quality)
        track.crops.append(crop.pixels)


def _score(tracks: list[_Track], predictor: Predictor) -> None:
    """Score the crops that wait, and keep only the one with the highest P(fake) of each track."""
    waiting = [track for track in tracks if track.crops]
    if not waiting:
        return
    scores = iter(predictor.detector.score(np.stack([crop for track in waiting for crop in track.crops])))
    for track in waiting:
        for crop in track.crops:
            score = float(next(scores))
            if track.shown is None or score > max(track.scores):
                track.shown = crop
            track.scores.append(score)
        track.crops.clear()


def _judge(predictor: Predictor, clip: ClipFrames, name: str, face: int | None, track: _Track) -> Verdict:
    """Judge a face of a clip, which is sure where most of its frames are: the middle of their scores is beyond the
    bound, they are as large, sharp and colourful in the median as the model was calibrated on, and enough."""
    detector, probability = predictor.detector, average_scores(track.scores)
    low, high = (float(value) for value in np.quantile(track.scores, SPREAD))
    measured = np.array([(one.side, one.sharpness, one.saturation) for one in track.qualities], np.float64)
    side, sharpness, saturation = np.median(measured, axis=0).tolist()
    middle = ImageQuality(side, sharpness, saturation=saturation)  # a frame has no JPEG quality
    judged = detector.judge(probability, middle, low, high)
    sure, reason = judged.sure, judged.reason
    if sure and len(track.scores) < MIN_SURE_FRAMES:
        sure, reason = False, f"the face is in {len(track.scores)} frames; {MIN_SURE_FRAMES} are needed to be sure"
    return Verdict(
        image=name,
        face=face,
        box=track.boxes[len(track.boxes) // 2].corners,
        label=judged.label,
        fake_probability=probability,
        threshold=detector.threshold,
        sure=sure,
        reason=reason,
        clip=Clip(
            frames=len(track.scores),
            low=low,
            high=high,
            first_second=track.seconds[0],
            last_second=track.seconds[-1],
            frames_seen=clip.seen,
            frames_asked=clip.asked,
        ),
        warning=clip.warning,
    )


def plot_timeline(clip: Judged, threshold: float, title: str) -> "Figure":
    """Draw each face's P(fake) over the seconds of a clip."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for verdict, (seconds, scores), marker in zip(clip.verdicts, clip.timelines, cycle("os^Dv"), strict=False):
        colour = CLASS_COLOURS["fake" if verdict.label == "fake" else "real"]
        axes.plot(seconds, scores, marker + "-", color=colour, markersize=4, label=verdict.describe())
    axes.axhline(threshold, color="grey", linestyle=":", label=f"fake from {threshold:.2f} up")
    axes.set(xlabel="seconds", ylabel="P(fake)", ylim=(-0.03, 1.03), title=title)
    figure.legend(loc="outside lower center", fontsize=8)
    return figure
