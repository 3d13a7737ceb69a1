"""What stands before a JPEG's first scan, read without decoding."""

import hashlib
import logging
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from deepfake_core.detector import MAX_PIXELS

log = logging.getLogger(__name__)
LUMA_SUM = 3688
"""Of ITU-T T.81 (JPEG), table K.1, which libjpeg scales to a quality."""


class JpegHeader(NamedTuple):
    """What stands before a JPEG's first scan.

    `is_plain` is False for what libjpeg's grey decoding does not do alone: turned by Exif, CMYK, too large.
    """

    width: int
    height: int
    table: str
    is_plain: bool


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Read a JPEG's segments up to its first scan; None if it is no JPEG, or a damaged one."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    return _read_jpeg_segments(data[: data.find(b"\xff\xda") + 4]) or _read_jpeg_segments.__wrapped__(data)


@lru_cache(1000)  # images of one encoder and size have the same segments
def _read_jpeg_segments(data: bytes) -> JpegHeader | None:
    at, tables, size, plain = 2, [], b"", True
    while True:
        marker = data[at + 1 : at + 2]
        if data[at : at + 1] == b"\xff" and marker == b"\xda":
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at : at + 1] != b"\xff" or end > len(data) or end < at + 4:
            return None
        if marker == b"\xdb":
            tables.append(data[at + 4 : end])
        elif marker in (b"\xc0", b"\xc1", b"\xc2"):
            size = data[at + 5 : at + 9]
            plain &= data[at + 9 : at + 10] in (b"\x01", b"\x03")
        elif marker == b"\xe1":
            plain &= data[at + 4 : at + 8] != b"Exif"
        at = end
    height, width = int.from_bytes(size[:2], "big"), int.from_bytes(size[2:], "big")
    if not (width and height and tables):
        return None
    return JpegHeader(width, height, _name_table(b"".join(tables)), plain and width * height <= MAX_PIXELS)


@lru_cache(1000)
def _name_table(tables: bytes) -> str:
    """Name quantisation tables by their digest, and by the quality at which libjpeg would write the first."""
    digest = hashlib.sha256(tables).hexdigest()[:6]
    if tables[0] >> 4 or len(tables) < 65:  # 16 bits each, or cut short
        return digest
    percent = 100 * np.frombuffer(tables[1:65], np.uint8).sum() / LUMA_SUM
    quality = (200 - percent) / 2 if percent <= 100 else 5000 / percent
    return f"q{quality:.0f}-{digest}"
