"""What Pillow is given of an image's header, and what is refused before: its own loops over it have no bound.

This file is also copied into every registered model, so it imports nothing of the project.
"""

import io
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngStream

MAX_SEGMENTS = 1000
"""Of a JPEG's header, or chunks of a PNG or WebP besides one for each 256 bytes. Of 2,400 photos, none has over 8."""

_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTING_TEXT = re.compile(rb"tEXtexif\0|[tzi][TE]Xt(?:Raw profile type exif|XML:com\.adobe\.xmp)\0")
_ORIENTATION = 0x0112


class UnreadableImageError(ValueError):
    """An image that can't be used.

    `reason` is `not_an_image`, `heic`, `too_large`, `too_many_scans`, `too_many_segments` or `truncated`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class _JpegBytes(io.BytesIO):
    """What Pillow reads a JPEG's header from, 3 or 4 times for each segment and once for each byte between them.

    Every 4 kB count as one reading more, so that a header has 16 MB at most: Pillow copies Exif once for each segment.
    """

    reads_left = 4 * MAX_SEGMENTS

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.reads_left -= 1 + len(data) // 4096
        if self.reads_left < 0:
            raise _refuse_segments(MAX_SEGMENTS)
        return data


class JpegFile(JpegImageFile):
    """A JPEG's first picture, whatever stands behind it (MPO), of whose Exif the orientation alone is read.

    Raises:
        UnreadableImageError: with the reason `too_many_segments`. What Pillow raises for damaged headers is left as is.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(file := _JpegBytes(data))
        file.reads_left = len(data)  # the header has been read

    def getexif(self) -> Image.Exif:
        keep_orientation(self.info)
        return super().getexif()


def is_turned(image: Image.Image) -> bool:
    """Whether an image is shown turned or mirrored, by its Exif or, where that says nothing, by its XMP."""
    return image.getexif().get(_ORIENTATION, 1) in range(2, 9)


def keep_chunks(data: bytes) -> bytes:
    """Return a WebP as it is, and of a PNG what its picture needs: other metadata may be damaged or too large to read.

    Raises:
        UnreadableImageError: with the reason `too_many_segments`.
    """
    most = MAX_SEGMENTS + len(data) // 256
    chunks = list(islice(_list_chunks(data), most + 1))
    if len(chunks) > most:
        raise _refuse_segments(most)
    if not data.startswith(_PNG):
        return data
    view = memoryview(data)
    kept = (view[start:end] for kind, start, end in chunks if _is_needed(kind, view[start + 8 : end - 4]))
    return b"".join([_PNG, *kept])


def _is_needed(kind: bytes, content: memoryview) -> bool:
    """Whether a PNG's picture needs a chunk: for its pixels, or for its orientation, if Pillow can read it."""
    if not kind[0] & 32 or kind in (b"tRNS", b"eXIf"):
        return True
    if not _ORIENTING_TEXT.match(kind + content[:30]):
        return False
    try:
        getattr(PngStream(io.BytesIO(content)), f"chunk_{kind.decode()}")(0, len(content))
    except (ValueError, IndexError, SyntaxError):  # such as compressed text of over 1 MB
        return False
    return True


def _list_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind of each chunk of a PNG or WebP, and where it begins and ends."""
    kind, position, end = b"", 8, len(data)
    is_png = data.startswith(_PNG)
    if not is_png:
        position, end = 12, min(end, 8 + int.from_bytes(data[4:8], "little"))
    while position + 8 <= end and kind != b"IEND":
        start = position
        if is_png:
            length, kind = struct.unpack_from(">L4s", data, start)
            position += 12 + length
        else:
            kind, length = struct.unpack_from("<4sL", data, start)
            position += 8 + length + length % 2
        yield kind, start, position


def _refuse_segments(most: int) -> UnreadableImageError:
    return UnreadableImageError("too_many_segments", f"may hold {most:,} segments or chunks at most. Save it again")


def keep_orientation(info: dict[Any, Any]) -> None:
    """Replace the Exif in an image's `info` by its orientation; all else is dropped unread.

    Pillow copies what each of up to 65,535 entries points to: 250 kB of Exif took 5 GB and 30 s.
    """
    raw = info.pop("Raw profile type exif", None)  # how ImageMagick once wrote Exif into a PNG
    exif = info.get("exif")
    if raw and not exif:
        with suppress(ValueError):  # no hex
            exif = bytes.fromhex("".join(raw.split("\n")[3:]))
    if exif is None:
        return
    kept = Image.Exif()
    if orientation := _find_orientation(exif):
        kept[_ORIENTATION] = orientation
    info["exif"] = kept.tobytes()


def _find_orientation(exif: bytes) -> int:
    """Return the orientation that Exif states, 1 to 8; 0 if it states none, or is damaged."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    big_endian = exif[:2] == b"MM"
    sign = ">" if big_endian else "<"
    found = 0
    try:
        (start,) = struct.unpack_from(f"{sign}L", exif, 4)
        (count,) = struct.unpack_from(f"{sign}H", exif, start)
        for position in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{sign}HHL4s", exif, position)
            if tag == _ORIENTATION and (size := {1: 1, 3: 2, 4: 4}.get(kind)):
                found = int.from_bytes(value[:size], "big" if big_endian else "little")
    except struct.error:
        pass
    return found if found in range(1, 9) else 0
