"""Frames spread evenly over a clip, decoded one at a time."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from deepfake_core.detector import MAX_PIXELS, UnreadableImageError
from deepfake_core.serving.packets import Packets

ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
"""Holds the file's size from byte 40 on, and from 88 on flags, the lowest for a live stream (ASF Specification 3.2)."""

ASF_HEADER_BYTES = 65_536
"""In which the file's properties are searched."""


class ClipFrames:
    """Frames spread evenly over a clip with their seconds from its first frame, upright, one at a time.

    Where a key frame is near, it is taken, so that no other must be decoded; nothing is decoded twice.

    Args:
        count: how many, at most.

    Attributes:
        asked: how many were chosen: `count`, or all of a clip that holds fewer.
        seen: how many could be decoded so far.
        missing_seconds: what lacks of the length that the header states; None where it states more bytes than there
            are; 0 of a whole file, and where nothing is stated.
    """

    def __init__(self, file: Path, count: int) -> None:
        self._file, self._count = file, count
        self.asked = self.seen = 0
        self.missing_seconds: float | None = 0.0

    @property
    def warning(self) -> str | None:
        """What of the clip was not seen; None if all that was asked for was."""
        lines = []
        if self.missing_seconds != 0:
            much = f": {self.missing_seconds:.1f} seconds are missing" if self.missing_seconds else ""
            lines.append(f"the file is cut short{much}")
        if self.seen < self.asked:
            lines.append(f"only {self.seen} of {self.asked} frames could be decoded")
        return "; ".join(lines) or None

    def __iter__(self) -> Iterator[tuple[float, Image.Image]]:
        """Decode the frames.

        Raises:
            UnreadableImageError: if the file is no clip, holds no picture, or none that can be decoded; or if PyAV is
                not installed.
            OSError: if it can't be opened.
        """
        try:
            import av
        except ImportError as exc:
            raise UnreadableImageError(
                "not_a_clip", "is a clip, which needs PyAV to be read. Install deepfake-retraining[video]"
            ) from exc
        with self._file.open("rb") as opened:
            try:
                packets = Packets(opened)
                self.missing_seconds = None if _is_cut(opened) else packets.missing_seconds
                chosen = packets.choose(self._count)
                self.asked = len(chosen)
                for number, frame in packets.decode(chosen):
                    if not self.seen and number >= packets.first_key:  # of a recording that starts between two
                        self.asked = max(1, int((chosen >= packets.first_key).sum()))
                    if frame.width * frame.height > MAX_PIXELS:
                        continue
                    self.seen += 1
                    image = frame.to_image()
                    upright = image.rotate(frame.rotation, expand=True) if frame.rotation else image
                    yield float(packets.seconds[number]), upright
            except (av.error.FFmpegError, OSError) as exc:
                raise UnreadableImageError(
                    "not_a_clip", f"is no clip that can be read, or is damaged ({exc.strerror})"
                ) from exc
        if not self.seen:
            raise UnreadableImageError("truncated", "is truncated or damaged: no frame can be decoded")


def _is_cut(opened: BinaryIO) -> bool:
    """Whether an AVI or ASF holds fewer bytes than its header states; a stream that was recorded live states none."""
    opened.seek(0)
    head = opened.read(ASF_HEADER_BYTES)
    stated = 0
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        (size,) = struct.unpack_from("<I", head, 4)
        stated = size if size < 0xFFFFFFF0 else 0
    elif head.startswith(ASF_HEADER):
        place = head.find(ASF_FILE_PROPERTIES)
        if 0 <= place <= len(head) - 92 and not head[place + 88] & 1:
            (stated,) = struct.unpack_from("<Q", head, place + 40)
    return opened.seek(0, os.SEEK_END) < stated
