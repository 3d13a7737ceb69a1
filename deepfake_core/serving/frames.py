"""From a clip to verdicts, one per face that is followed through it."""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from deepfake_core.detector import BATCH_SIZE, MAX_PIXELS, UnreadableImageError
from deepfake_core.faces import Box
from deepfake_core.pictures import FAKE, REAL, draw_heat
from deepfake_core.predictor import Judged, Predictor, Verdict, describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
FORMATS = "asf,avi,matroska,mov,mp4,mpeg,mpegts,ogg,webm"
"""Containers that hold their frames themselves; playlists, which name other files and hosts, are left out."""

FRAMES = 48
"""How many frames are judged of a clip."""

OVERLAP = 0.3
"""Intersection over union from which on boxes of successive frames show the same face."""

TRIMMED = 0.1
"""Share of a face's logits that is left out at each end of their mean."""

FEW_FRAMES = 3
"""A face seen in fewer frames decides about the clip only where there is no other."""


@dataclass
class _Track:
    """A face through a clip."""

    seconds: list[float] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    crops: list[np.ndarray] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    shown: np.ndarray | None = None
    """The crop that speaks most for fake."""


@dataclass(frozen=True)
class JudgedClip(Judged):
    """A clip: first the verdict that decides about it, then the other faces'; and each one's scores over time."""

    timelines: list[tuple[list[float], list[float]]] = field(default_factory=list)


def judge_clip(
    predictor: Predictor,
    file: Path,
    frames: int = FRAMES,
    explain: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> JudgedClip:
    """Judge a clip's faces, each by the trimmed mean of its frames' logits; the most likely fake comes first.

    Args:
        frames: how many are judged, spread evenly over the clip.
        on_progress: called after each frame with 1, and at the end with the frames that the clip lacks; and with all.

    Returns:
        One verdict per face; one with an `error` if the clip can't be read or shows no face.
    """
    detector, tracks, done = predictor.detector, list[_Track](), 0
    try:
        for second, image in sample_frames(file, frames):
            done += 1
            _follow(tracks, second, predictor.cut_faces(image))
            if sum(len(track.crops) for track in tracks) >= BATCH_SIZE:
                _score(tracks, predictor)
            if on_progress:
                on_progress(1, frames)
    except (UnreadableImageError, OSError) as exc:
        error = str(exc) if isinstance(exc, UnreadableImageError) else f"can't be read ({exc.strerror or exc})"
        return JudgedClip(str(file), [Verdict(str(file), None, None, None, None, detector.threshold, error, True)])
    _score(tracks, predictor)
    if on_progress:
        on_progress(frames - done, frames)
    if not tracks:
        error = f"no face was found in {frames} frames; --no-detect judges whole frames"
        return JudgedClip(str(file), [Verdict(str(file), None, None, None, None, detector.threshold, error)])
    tracks.sort(key=lambda track: (len(track.scores) >= FEW_FRAMES, average_scores(track.scores)), reverse=True)
    verdicts = [
        _judge(predictor, str(file), number if predictor.detects else None, one) for number, one in enumerate(tracks, 1)
    ]
    picture = None
    if explain and tracks[0].shown is not None:
        _, heat = detector.explain(tracks[0].shown[None])
        side = detector.image_size
        lines = [describe(verdict) for verdict in verdicts]
        picture = draw_heat(
            Image.fromarray(tracks[0].shown), [Box(0, 0, side, side)], list(heat), [verdicts[0].label == "fake"], lines
        )
    return JudgedClip(str(file), verdicts, picture, timelines=[(track.seconds, track.scores) for track in tracks])


def average_scores(scores: list[float]) -> float:
    """Return the probability at the trimmed mean of the logits, 0 to 1."""
    probability = np.clip(np.sort(np.asarray(scores, np.float64)), 1e-6, 1 - 1e-6)
    cut = int(TRIMMED * len(probability))
    kept = probability[cut : len(probability) - cut]
    return float(1 / (1 + np.exp(-np.mean(np.log(kept) - np.log1p(-kept)))))


def _follow(tracks: list[_Track], second: float, cut: list[tuple[Box, np.ndarray]]) -> None:
    """Add each face to the track whose last box it overlaps most, or to a new one."""
    free = list(tracks)
    for box, crop in cut:
        overlaps = [track.boxes[-1].overlap(box) for track in free]
        best = int(np.argmax(overlaps)) if overlaps else 0
        if overlaps and overlaps[best] >= OVERLAP:
            track = free.pop(best)
        else:
            track = _Track()
            tracks.append(track)
        track.seconds.append(second)
        track.boxes.append(box)
        track.crops.append(crop)


def _score(tracks: list[_Track], predictor: Predictor) -> None:
    """Score the crops that wait, and let go of all but the one that speaks most for fake."""
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


def _judge(predictor: Predictor, name: str, face: int | None, track: _Track) -> Verdict:
    probability = average_scores(track.scores)
    low, high = np.quantile(track.scores, (0.1, 0.9))
    box = track.boxes[len(track.boxes) // 2]
    return Verdict(
        name,
        face,
        (int(box.left), int(box.top), int(box.right), int(box.bottom)),
        predictor.detector.label(probability),
        probability,
        predictor.detector.threshold,
        frames=len(track.scores),
        low=float(low),
        high=float(high),
        first_second=track.seconds[0],
        last_second=track.seconds[-1],
    )


def sample_frames(file: Path, count: int) -> Iterator[tuple[float, Image.Image]]:
    """Yield frames spread evenly over a clip with their seconds, upright, one at a time.

    Where a key frame lies near, it is taken, which needs no other decoded; nothing is decoded twice.

    Args:
        count: at most so many.

    Raises:
        UnreadableImageError: if the file is no clip, holds no picture, or none that can be decoded; or if PyAV is not
            installed.
        OSError: if it can't be opened.
    """
    try:
        import av
    except ImportError as exc:
        raise UnreadableImageError(
            "not_a_clip", "is a clip, which needs PyAV to be read. Install deepfake-retraining[video]"
        ) from exc
    with file.open("rb") as opened:
        try:
            with av.open(opened, options={"format_whitelist": FORMATS}, metadata_errors="replace") as container:
                yield from _sample(container, count)
        except (av.error.FFmpegError, OSError) as exc:  # OSError: where a clip would end before its beginning
            raise UnreadableImageError(
                "not_a_clip", f"is no clip that can be read, or is damaged ({exc.strerror})"
            ) from exc


def _sample(container: Any, count: int) -> Iterator[tuple[float, Image.Image]]:
    import av

    stream = next(iter(container.streams.video), None)
    if stream is None:
        raise UnreadableImageError("not_a_clip", "holds no pictures")
    if stream.codec_context is None:
        raise UnreadableImageError("not_a_clip", "is in a codec that can't be decoded here")
    if stream.width * stream.height > MAX_PIXELS:
        size = f"{stream.width} x {stream.height}"
        raise UnreadableImageError("too_large", f"may hold {MAX_PIXELS:,} pixels a frame at most. Received: {size}")
    stream.thread_type = "AUTO"
    keys, first, last = _read_times(container, stream)
    if last is None:
        raise UnreadableImageError("not_a_clip", "is empty: it holds no frame")
    position, yielded = first - 1, 0
    for wanted in _choose_times(keys, first, last, count):
        if wanted <= position:
            continue
        before = keys[max(0, bisect_right(keys, wanted) - 1)] if keys else first
        if position < before:
            container.seek(before, stream=stream)
            frames = container.decode(stream)
        try:
            frame = next((one for one in frames if one.pts is not None and one.pts >= wanted), None)
        except av.error.InvalidDataError:
            continue  # a damaged stretch: the next frame that is wanted may lie behind it
        if frame is None:
            break
        position = frame.pts
        if frame.width * frame.height > MAX_PIXELS:
            continue
        image = frame.to_image()
        yielded += 1
        yield (
            float(frame.pts * stream.time_base),
            image.rotate(frame.rotation, expand=True) if frame.rotation else image,
        )
    if not yielded:
        raise UnreadableImageError("truncated", "is truncated or damaged: no frame can be decoded")


def _read_times(container: Any, stream: Any) -> tuple["array[int]", int, int | None]:
    """Return when key frames, the first and the last frame are shown, in the stream's time base, without decoding."""
    keys, first, last = array("q"), 0, None
    for packet in container.demux(stream):
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None or not packet.size:
            continue
        first, last = (time, time) if last is None else (min(first, time), max(last, time))
        if packet.is_keyframe:
            keys.append(time)
    return array("q", sorted(keys)), first, last


def _choose_times(keys: "array[int]", first: int, last: int, count: int) -> list[int]:
    """Return times spread evenly, each that of a key frame if one lies within half the distance."""
    distance = (last - first) / count
    chosen = set()
    for target in first + (np.arange(count) + 0.5) * distance:
        after = bisect_right(keys, target)
        near = min(keys[max(0, after - 1) : after + 1], key=lambda time: abs(time - target), default=None)
        chosen.add(near if near is not None and abs(near - target) <= distance / 2 else int(target))
    return sorted(chosen)


def plot_timeline(clip: JudgedClip, threshold: float, title: str) -> "Figure":
    """Draw each face's P(fake) over the seconds of a clip."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for verdict, (seconds, scores), marker in zip(clip.verdicts, clip.timelines, cycle("os^Dv"), strict=False):
        colour = FAKE if verdict.label == "fake" else REAL
        axes.plot(seconds, scores, marker + "-", color=colour, markersize=4, label=describe(verdict))
    axes.axhline(threshold, color="grey", linestyle=":", label=f"fake from {threshold:.2f} up")
    axes.set(xlabel="seconds", ylabel="P(fake)", ylim=(-0.03, 1.03), title=title)
    figure.legend(loc="outside lower center", fontsize=8)
    return figure
