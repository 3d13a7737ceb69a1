"""What follows from an image's bytes alone: size, format, thumbnail, hash, or the reason why it can't be used."""

import builtins
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from deepfake_core.data.hashes import hash_thumbnails, shrink_images
from deepfake_core.data.jpeg_header import read_jpeg_header
from deepfake_core.decoding import BYTES_PER_PIXEL, DECODING, UnreadableImageError, check_scans, open_image

MIN_DECODED_PIXELS = 64
"""JPEGs are decoded at the smallest of libjpeg's scales that leaves this many pixels a side."""

NO_PIXELS = np.empty((0, 0), np.uint8)


class Content(NamedTuple):
    """What follows from an image's bytes alone: the columns from `width` on."""

    width: int = 0
    height: int = 0
    bytes: int = 0
    format: str = ""
    jpeg_table: str = ""
    reason: str = ""
    hash: builtins.bytes = b""
    thumbnail: builtins.bytes = b""


Contents = dict[str, Content]
"""By the SHA-256 of the bytes."""


def decode(data: bytes) -> tuple[Content, np.ndarray]:
    """Return an image's content without thumbnail and hash, and grey pixels (h, w), if any, to make those from."""
    header = read_jpeg_header(data)
    table = header.table if header else ""
    if header and header.is_plain:
        try:
            area = header.width * header.height
            check_scans(data, area)
            with DECODING.hold(area * BYTES_PER_PIXEL["JPEG"]):
                pixels = simplejpeg.decode_jpeg(
                    data, "GRAY", min_height=MIN_DECODED_PIXELS, min_width=MIN_DECODED_PIXELS
                )
                return Content(header.width, header.height, len(data), "JPEG", table), _reduce(pixels[:, :, 0])
        except ValueError:
            pass  # damaged, or of a rare kind: Pillow raises the exact error
    try:
        with open_image(data) as image:
            content = Content(image.width, image.height, len(data), image.format or "", table)
            return content, _reduce(np.asarray(image.convert("L")))
    except UnreadableImageError as exc:
        return Content(bytes=len(data), jpeg_table=table, reason=exc.reason), NO_PIXELS


def _reduce(pixels: np.ndarray) -> np.ndarray:
    """Average blocks of a large picture's pixels, so that both sides are 256 pixels at most."""
    if max(pixels.shape) <= 4 * MIN_DECODED_PIXELS:
        return pixels
    height, width = (max(1, side // MIN_DECODED_PIXELS) for side in pixels.shape)
    return np.asarray(Image.fromarray(pixels).reduce((width, height)))


def shrink_and_hash(decoded: dict[str, tuple[Content, np.ndarray]]) -> Contents:
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for digest, (_, pixels) in decoded.items():
        by_shape.setdefault(pixels.shape, []).append(digest)
    contents: Contents = {}
    for shape, digests in by_shape.items():
        if shape == NO_PIXELS.shape:
            contents |= {digest: decoded[digest][0] for digest in digests}
            continue
        thumbnails = shrink_images(np.stack([decoded[digest][1] for digest in digests]))
        for digest, bits, thumbnail in zip(digests, hash_thumbnails(thumbnails), thumbnails, strict=True):
            contents[digest] = Content(*decoded[digest][0][:-2], bits.tobytes(), thumbnail.tobytes())
    return contents
