"""From encoded images to pixels, with Pillow alone: what is refused, and how much memory and time the rest takes.

This file and `image_header` are also copied into every registered model, so they import nothing else of the project.
"""

import io
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .image_header import JpegFile, UnreadableImageError, is_turned, keep_chunks, keep_orientation

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

BYTES_PER_PIXEL = {"JPEG": 12, "PNG": 12, "WEBP": 20}
"""Memory while an image is decoded and made upright, at most, as measured: 0.6 and 1 GB for the largest."""

PILLOW_BLOCK_BYTES = 64 * 2**20
"""In which Pillow asks for memory. What is smaller than 32 MiB, as its own 16 are, glibc keeps for each thread."""

_JPEG = b"\xff\xd8\xff"
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
HEIF_BRANDS = rb"avi[fos]|hei[cfmsx]|hev[cmsx]|mi(?:af|f[123])|msf1"
"""Of files in the container of MP4 that hold HEIC, AVIF and their kin."""

_HEIF = re.compile(rb".{4}ftyp(?:" + HEIF_BRANDS + rb")", re.DOTALL)


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
    if _HEIF.match(data):
        raise UnreadableImageError("heic", "must be a JPEG, PNG or WebP image. Received: HEIC or AVIF; convert it")
    try:
        if data.startswith(_JPEG):
            image: Image.Image = JpegFile(data)
        else:
            image = Image.open(io.BytesIO(keep_chunks(data)), formats=("PNG", "WEBP"))
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
        keep_orientation(image.info)
        if is_turned(image):
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):  # Pillow would clip its 65,536 greys to the lowest 256
            converted = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        else:
            converted = image if image.mode == "RGB" else image.convert("RGB")
    except Exception as exc:
        raise UnreadableImageError("truncated", f"is truncated or damaged ({exc})") from exc
    if converted is not image:
        converted.format = image.format
        converted.quantization = getattr(image, "quantization", {})  # type: ignore[attr-defined] # of a JPEG
        image.close()
    return converted


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
