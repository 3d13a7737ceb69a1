"""A JPEG's header, read by Pillow without decoding the picture."""

import hashlib
import struct
from functools import lru_cache
from typing import NamedTuple

from PIL.JpegImagePlugin import zigzag_index

from deepfake_core.decoding import MAX_PIXELS, MAX_SIDE
from deepfake_core.image_header import JpegFile, is_turned
from deepfake_core.input_gate import estimate_jpeg_quality

MAX_REMEMBERED_BYTES = 4096
"""Longer headers hold Exif or a colour profile, and are hardly ever the same."""

DAMAGED = (SyntaxError, OSError, ValueError, IndexError, TypeError, struct.error)
"""What Pillow raises for damaged headers; `Image.open` catches the same."""


class JpegHeader(NamedTuple):
    """Size in pixels as stored, the name of the quantisation tables, and whether the image is plain.

    `is_plain` is False for what libjpeg's grey decoding does not do alone: turned, CMYK, too large.
    """

    width: int
    height: int
    table: str
    is_plain: bool


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Read a JPEG's header, up to its first scan; None if it is no JPEG, or a damaged one.

    Images of one encoder and size begin with the same bytes, so that most headers are remembered: reading one takes
    about 50 microseconds, which would make indexing small images a third slower.
    """
    scan = data.find(b"\xff\xda")
    if data[:3] != b"\xff\xd8\xff" or scan < 0:
        return None
    read = _read_remembered if scan <= MAX_REMEMBERED_BYTES else _read
    # The scan that was found may be an embedded thumbnail's; the header is then cut short, and all is read.
    return read(data[:scan] + b"\xff\xda\0\2") or _read(data)


def _read(data: bytes) -> JpegHeader | None:
    try:
        image = JpegFile(data)
    except DAMAGED:
        return None
    tables = tuple((number, *table) for number, table in image.quantization.items())
    is_small = image.width * image.height <= MAX_PIXELS and max(image.size) <= MAX_SIDE
    plain = image.layers in (1, 3) and not is_turned(image) and is_small
    return JpegHeader(*image.size, _name_tables(tables), plain) if tables else None


_read_remembered = lru_cache(1000)(_read)


@lru_cache(1000)
def _name_tables(tables: tuple[tuple[int, ...], ...]) -> str:
    """Name quantisation tables by their digest, and by the quality at which libjpeg would write the first.

    Args:
        tables: of each, its number and 64 values in natural order.
    """
    digest = hashlib.sha256(b"".join(_encode_table(number, values) for number, *values in tables)).hexdigest()[:6]
    quality = estimate_jpeg_quality(tables[0][1:])
    return digest if quality is None else f"q{quality:.0f}-{digest}"


def _encode_table(number: int, values: list[int]) -> bytes:
    """Return a table as it stands in the file, in zigzag order, which Pillow has undone."""
    size = 2 if max(values) > 255 else 1
    in_file = (value for _, value in sorted(zip(zigzag_index, values, strict=True)))
    return bytes([(size - 1) << 4 | number]) + b"".join(value.to_bytes(size, "big") for value in in_file)
