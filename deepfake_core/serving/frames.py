"""Frames spread evenly over a clip, decoded one at a time."""

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepfake_core.detector import MAX_PIXELS, UnreadableImageError

FORMATS = "asf,avi,matroska,mov,mp4,mpeg,mpegts,ogg,webm"
"""Containers that hold their frames themselves; playlists, which name other files and hosts, are left out."""


def sample_frames(file: Path, count: int) -> Iterator[tuple[float, Image.Image]]:
    """Yield frames spread evenly over a clip with their seconds, upright, one at a time.

    Where a key frame is near, it is taken, so that no other must be decoded; nothing is decoded twice.

    Args:
        count: how many, at most.

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
            continue  # a damaged stretch: the next wanted frame may come after it
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
    """Return times spread evenly, each that of a key frame if one is within half the distance."""
    distance = (last - first) / count
    chosen = set()
    for target in first + (np.arange(count) + 0.5) * distance:
        after = bisect_right(keys, target)
        near = min(keys[max(0, after - 1) : after + 1], key=lambda time: abs(time - target), default=None)
        chosen.add(near if near is not None and abs(near - target) <= distance / 2 else int(target))
    return sorted(chosen)
