"""A clip's packets, read twice: first their times alone, then, to be decoded, those that the chosen frames need.

Nothing is sought, since many containers have no index, and their seeking ends anywhere. So a frame is the same in any
container.
"""

import contextlib
from array import array
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import Any, BinaryIO

import numpy as np

from deepfake_core.detector import MAX_PIXELS, UnreadableImageError

FORMATS = "3gp,asf,avi,flv,matroska,mov,mp4,mpeg,mpegts,mpegvideo,ogg,webm"
"""Containers that hold their frames themselves; playlists, which name other files and hosts, are left out."""

WITH_LENGTH = ("asf", "flv", "matroska", "mov")
"""Containers whose header says how long they are, so that a file that was cut short can be told."""

MAX_ROUNDING_SECONDS = 0.003
"""Matroska and FLV round times to milliseconds. A clip that is even but for this has one frame rate."""

MIN_MISSING_SECONDS, MIN_MISSING_SHARE = 1.0, 0.05
"""What must lack of the length in the header before a file counts as cut short; headers are not exact."""


class Packets:
    """A stream's packets, read without decoding: each holds a frame, whose number is its place as they are shown.

    Attributes:
        seconds: float array: of each frame, by its number, from the first that is shown.
        missing_seconds: what lacks of the length that the header states.
        first_key: the number of the first key frame; what comes before it may be impossible to decode.
    """

    def __init__(self, opened: BinaryIO) -> None:
        self._opened = opened
        with _open(opened) as container:
            self._read_times(container, _find_stream(container))

    def _read_times(self, container: Any, stream: Any) -> None:
        times, keys, hidden = array("q"), array("q"), array("q")
        timed, latest, shift, end = True, 0, 0, 0.0
        for packet in _read(container):
            time = packet.pts if packet.pts is not None else packet.dts
            if time is not None:
                end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index != stream.index or not packet.size:
                continue
            timed &= packet.pts is not None
            if packet.is_keyframe:
                keys.append(len(times))
                if times and time is not None and time + shift <= latest:
                    step = (latest - times[0]) // max(1, len(times) - 1)
                    shift = latest + max(1, step) - time  # joined clips: the clock starts again
            if packet.is_discard:
                hidden.append(len(times))  # an edit list leaves it out
            times.append(latest if time is None else time + shift)
            latest = max(latest, times[-1])
        if not times:
            raise UnreadableImageError("not_a_clip", "is empty: it holds no frame")
        self._keys, self._hidden = np.array(keys, np.int64), np.array(hidden, np.int64)
        shown = np.array(times, np.int64)
        in_order = bool((np.diff(shown) > 0).all())
        # AVI holds no times of showing: those of H.264 are made up, in the order of decoding
        self._counted = not timed or ("avi" in container.format.name and in_order and stream.codec_context.has_b_frames)
        self._order = np.arange(len(shown)) if self._counted else np.argsort(shown, kind="stable")
        self._numbers = np.empty(len(shown), np.int64)
        self._numbers[self._order] = np.arange(len(shown))
        if timed:
            seconds = np.sort(shown) * float(stream.time_base)
        else:
            seconds = np.arange(len(shown)) / float(stream.average_rate or 25)
        first = self._find_shown()[:1]
        self.first_key = int(self._numbers[keys[0]]) if keys else 0
        self.seconds = seconds - (seconds[first[0]] if len(first) else 0)
        self.missing_seconds = _measure_missing(container, end)

    def _find_shown(self) -> np.ndarray:
        return np.setdiff1d(np.arange(len(self._order)), self._numbers[self._hidden], assume_unique=True)

    def choose(self, count: int) -> np.ndarray:
        """Return the numbers of frames spread evenly, each a key frame if one is within half the distance."""
        shown = self._find_shown()
        if len(shown) <= count:
            return shown
        seconds = self.seconds[shown]
        even = np.linspace(0, seconds[-1], len(shown))
        is_even = np.abs(seconds - even).max() <= MAX_ROUNDING_SECONDS
        places = np.arange(len(shown)) if is_even else np.round(1000 * seconds)  # exact, so equal in any container
        length = places[-1] * len(shown) / (len(shown) - 1)
        targets = (np.arange(count) + 0.5) * length / count
        chosen = np.searchsorted(places, targets, side="right") - 1
        keys = np.flatnonzero(np.isin(shown, self._numbers[self._keys]))
        if len(keys):
            after = np.searchsorted(places[keys], targets).clip(1, max(1, len(keys) - 1))
            pair = keys[np.stack([after - 1, after.clip(max=len(keys) - 1)])]
            away = np.abs(places[pair] - targets)
            near = np.where(away[0] <= away[1], pair[0], pair[1])
            chosen = np.where(away.min(axis=0) < 0.499 * length / count, near, chosen)
        chosen = np.unique(chosen)
        # of times that are far apart, or wrong, several have the same frame: as many others are seen
        others = np.setdiff1d(np.arange(len(shown)), chosen)
        more = np.linspace(0, len(others), count - len(chosen), endpoint=False).astype(int)
        return shown[np.union1d(chosen, others[more])]

    def decode(self, chosen: np.ndarray) -> Iterator[tuple[int, Any]]:
        """Yield chosen frames with their numbers. In a damaged stretch, the next that can be decoded takes their place.

        Each is decoded from the key frame before it. Where frames can only be counted, or a key frame turns out to be
        none (as with intra refresh), all are decoded from the clip's start.
        """
        wanted = deque((self._find_start(number), number) for number in chosen.tolist())
        with _open(self._opened) as container:
            yield from self._decode(container, _find_stream(container), wanted)
        if wanted:
            wanted = deque((0, number) for _, number in wanted)
            with _open(self._opened) as container:
                yield from self._decode(container, _find_stream(container), wanted)

    def _decode(self, container: Any, stream: Any, wanted: deque[tuple[int, int]]) -> Iterator[tuple[int, Any]]:
        """Take from `wanted`, which holds where to start and the frame's number, and leave what must start earlier."""
        import av

        waiting, position, context = True, -1, stream.codec_context
        packets = (packet for packet in _read(container, stream) if packet.size)
        for place, packet in enumerate(chain(packets, [None])):  # None: what the decoder still holds
            if not wanted:
                return
            if waiting:
                if place < wanted[0][0]:
                    continue
                context.flush_buffers()
                waiting = False
            if packet is not None and not self._counted:
                packet.pts = int(self._numbers[place])
            try:
                frames = context.decode(packet)
            except av.error.FFmpegError:
                continue  # a damaged stretch
            for frame in frames:
                position = position + 1 if self._counted or frame.pts is None else frame.pts
                if position < wanted[0][1]:
                    continue
                # a packet may hold no frame of its own: a second field, or one that only others refer to
                if wanted[0][0] and (frame.is_corrupt or position > wanted[0][1] + 1):
                    return
                if frame.is_corrupt:
                    continue
                while wanted and wanted[0][1] <= position:
                    wanted.popleft()
                yield position, frame
                waiting = bool(wanted) and wanted[0][0] > place
                if waiting or not wanted:
                    break
        wanted.clear()

    def _find_start(self, number: int) -> int:
        """Return at which packet decoding must start for a frame: the last key frame's that comes before it."""
        if self._counted:
            return 0
        before = self._keys[: np.searchsorted(self._keys, self._order[number], side="right")]
        return next((int(key) for key in before[::-1] if self._numbers[key] <= number), 0)


def _open(opened: BinaryIO) -> Any:
    import av

    opened.seek(0)
    return av.open(opened, options={"format_whitelist": FORMATS}, metadata_errors="replace")


def _find_stream(container: Any) -> Any:
    stream = container.streams.best("video")  # not a cover picture, where there is more
    if stream is None:
        raise UnreadableImageError("not_a_clip", "holds no pictures")
    if stream.codec_context is None:
        raise UnreadableImageError("not_a_clip", "is in a codec that can't be decoded here")
    if stream.width * stream.height > MAX_PIXELS:
        size = f"{stream.width} x {stream.height}"
        raise UnreadableImageError("too_large", f"may hold {MAX_PIXELS:,} pixels a frame at most. Received: {size}")
    stream.thread_type = "AUTO"
    return stream


def _read(container: Any, *streams: Any) -> Iterator[Any]:
    """Yield packets up to the file's end, or to where it can't be read on: what came before is kept."""
    import av

    # IndexError: what PyAV raises at the end of a file in which a stream begins late
    with contextlib.suppress(av.error.FFmpegError, IndexError):
        yield from container.demux(*streams)


def _measure_missing(container: Any, end: float) -> float:
    """Return the seconds by which a file ends before the length in its header; 0 of one that is whole or states none.

    Args:
        end: when its last packet ends, of picture or sound.
    """
    name = container.format.name
    length = (container.duration or 0) / 1e6
    if not any(known in name for known in WITH_LENGTH):
        return 0.0
    start = (container.start_time or 0) / 1e6
    missing = length - (end - start if "mov" in name else end)  # others count from 0, or may
    return missing if missing > max(MIN_MISSING_SECONDS, MIN_MISSING_SHARE * length) else 0.0
