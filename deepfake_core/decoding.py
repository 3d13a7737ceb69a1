"""From encoded images to pixels, with Pillow alone: what is refused, and how much memory and time the rest takes.

This file is also copied into every registered model, so it imports nothing of the project.
"""

import io
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

MAX_BYTES = 100_000_000
"""Larger files are refused unread."""

MAX_PIXELS = 50_000_000
"""Larger images are refused from their header alone, before memory is spent on them (150 MB as RGB)."""

MAX_SIDE = 30_000
"""Pixels; resizing takes memory for each pixel of a side, 800 MB for a line of `MAX_PIXELS`."""

MAX_SCANS, MAX_SCANNED_PIXELS = 100, 20 * MAX_PIXELS
"""Of a JPEG, and scans times pixels: decoding takes as long for each scan. Of 800 progressive photos, none has over 16.
"""

MAX_DECODING_BYTES = 1_000_000_000
"""Memory that images take while they are decoded by `open_image`, whatever the number of threads."""

MAX_SEGMENTS = 1000
"""Of a JPEG's header, or chunks of a PNG or WebP besides one for each 256 bytes. Of 2,400 photos, none has over 8."""

BYTES_PER_PIXEL = {"JPEG": 12, "PNG": 12, "WEBP": 20}
"""Memory while an image is decoded and made upright, at most, as measured: 0.6 and 1 GB for the largest."""

PILLOW_BLOCK_BYTES = 64 * 2**20
"""In which Pillow asks for memory. What is smaller than 32 MiB, as its own 16 are, glibc keeps for each thread."""

_JPEG = b"\xff\xd8\xff"
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis")
_ORIENTATION = 0x0112


class UnreadableImageError(ValueError):
    """An image that can't be used.

    `reason` is `not_an_image`, `heic`, `too_large`, `too_many_scans`, `too_many_segments` or `truncated`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class MemoryBudget:
    """Memory that threads share: who asks for more than is left waits; who asks for more than all waits to be alone."""

    def __init__(self, total: int) -> None:
        self._total, self._held = total, 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + amount <= self._total)
            self._held += amount
        try:
            yield
        finally:
            with self._changed:
                self._held -= amount
                self._changed.notify_all()


DECODING = MemoryBudget(MAX_DECODING_BYTES)


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
        _keep_orientation(self.info)
        return super().getexif()


def decode_image(data: bytes) -> Image.Image:
    """Decode a JPEG, PNG or WebP to an upright RGB image, whose `format` says which it was.

    Raises:
        UnreadableImageError: if `data` is none of these, is truncated or damaged, or declares more pixels or scans
            than are decoded.
    """
    return _decode_pixels(open_header(data))


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """Decode an image as `decode_image` does, and hold memory of `DECODING` for it until the block ends.

    Open no second one inside the block: each could wait for the other.
    """
    header = open_header(data)
    Image.core.set_block_size(PILLOW_BLOCK_BYTES)
    with DECODING.hold(header.width * header.height * BYTES_PER_PIXEL[header.format or "WEBP"]):
        yield _decode_pixels(header)


def open_header(data: bytes) -> Image.Image:
    """Open an image without decoding it.

    Raises:
        UnreadableImageError: as `decode_image`, except for what only decoding finds.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise UnreadableImageError("not_an_image", "must be the bytes of an image, not a path, an address or nothing")
    data = bytes(data)
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        raise UnreadableImageError("heic", "must be a JPEG, PNG or WebP image. Received: HEIC or AVIF; convert it")
    try:
        if data.startswith(_JPEG):
            image: Image.Image = JpegFile(data)
        else:
            check_chunks(data)
            image = Image.open(io.BytesIO(data), formats=("PNG", "WEBP"))
    except UnreadableImageError:
        raise
    except (UnidentifiedImageError, SyntaxError, IndexError, TypeError, struct.error) as exc:
        raise UnreadableImageError("not_an_image", "must be a JPEG, PNG or WebP image") from exc
    except Image.DecompressionBombError as exc:
        raise UnreadableImageError("too_large", str(exc)) from exc
    except Exception as exc:
        raise UnreadableImageError("truncated", f"the header is damaged ({exc})") from exc
    width, height = image.size
    if width * height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        most = f"{MAX_PIXELS:,} pixels at most, {MAX_SIDE:,} a side"
        raise UnreadableImageError("too_large", f"may hold {most}. Received: {width} x {height}")
    if image.format == "JPEG":
        check_scans(data, width * height)
    return image


def _decode_pixels(image: Image.Image) -> Image.Image:
    try:
        image.load()
        _keep_orientation(image.info)
        if is_turned(image):
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):  # Pillow would clip its 65,536 greys to the lowest 256
            converted = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        else:
            converted = image.convert("RGB")
    except Exception as exc:
        raise UnreadableImageError("truncated", f"is truncated or damaged ({exc})") from exc
    converted.format = image.format
    converted.quantization = getattr(image, "quantization", {})  # type: ignore[attr-defined] # of a JPEG
    image.close()
    return converted


def is_turned(image: Image.Image) -> bool:
    """Whether an image is shown turned or mirrored, by its Exif or, where that says nothing, by its XMP."""
    return image.getexif().get(_ORIENTATION, 1) in range(2, 9)


def check_scans(data: bytes, pixels: int) -> None:
    """Refuse a JPEG of more scans than a picture needs; nothing is decoded, and embedded pictures don't count.

    Raises:
        UnreadableImageError: with the reason `too_many_scans`.
    """
    most = min(MAX_SCANS, MAX_SCANNED_PIXELS // max(pixels, 1))
    if data.count(b"\xff\xda") <= most:  # nearly always
        return
    position, scans = 2, 0
    while (marker := _MARKER.search(data, position)) and marker[1] != b"\xd9":
        position = marker.end()
        if marker[1] not in b"\x01\xd8":  # all others are followed by the length of what they begin
            position += max(2, int.from_bytes(data[position : position + 2]))
        scans += marker[1] == b"\xda"
        if scans > most:
            raise UnreadableImageError(
                "too_many_scans", f"may hold {most} scans at most, as a JPEG of {pixels:,} pixels"
            )


def check_chunks(data: bytes) -> None:
    """Refuse a PNG or WebP of more chunks than a picture needs.

    Raises:
        UnreadableImageError: with the reason `too_many_segments`.
    """
    most = MAX_SEGMENTS + len(data) // 256
    if sum(1 for _ in islice(_list_chunks(data), most + 1)) > most:
        raise _refuse_segments(most)


def _list_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind of each chunk of a PNG or WebP, and where it begins and ends."""
    kind, position, end = b"", 8, len(data)
    is_png = data.startswith(b"\x89PNG\r\n\x1a\n")
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


def _keep_orientation(info: dict[Any, Any]) -> None:
    """Replace the Exif in an image's `info` by its orientation; all else is dropped unread.

    Pillow copies what each of up to 65,535 entries points to: 250 kB of Exif took 5 GB and 30 s.
    """
    raw = info.pop("Raw profile type exif", None)  # how ImageMagick once wrote Exif into a PNG
    exif = info.get("exif") or (bytes.fromhex("".join(raw.split("\n")[3:])) if raw else None)
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
