"""JPEG on whole batches of images, as arithmetic in `keras.ops`: what libjpeg-turbo does to an image, without a file.

Images are float32 of shape (n, size, size, 3), whole numbers from 0 to 255; a plane is one of their
colours, (n, height, width). All sums and products are of whole numbers that float32 holds, but for the inverse DCT.

GPUs multiply matrices in TF32 unless told otherwise: of each factor, they keep 11 binary digits. Coefficients are whole
numbers below 2048, which have no more; the inverse DCT's matrix is multiplied in two parts of 11 digits each.
"""

from typing import Any

import numpy as np
from keras import ops

BLOCK = 8
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)

ORDER = np.arange(BLOCK)
BASIS = np.cos((2 * ORDER + 1) * ORDER[:, None] * np.pi / (2 * BLOCK)) / np.where(ORDER == 0, np.sqrt(8), 2)[:, None]
INVERSE_DCT = np.kron(BASIS, BASIS)
"""Takes the 64 coefficients of a block to its values: T.81, A.3.3."""
COARSE_INVERSE_DCT = np.round(INVERSE_DCT * 2**13) / 2**13
FAST_DCT = np.where(ORDER == 0, 1, np.cos(ORDER * np.pi / (2 * BLOCK)) * np.sqrt(2))
SCALES = (np.round(np.outer(FAST_DCT, FAST_DCT).reshape(-1) * 2**14) / 2**11).astype(np.float32)
"""What libjpeg's fast DCT multiplies the 64 coefficients by, as it has them: with 11 binary places."""


def recompress(images: Any, qualities: Any) -> Any:
    """Compress each image as JPEG with 4:2:0 chroma, and decompress it, as TurboJPEG does, which `augmentation` calls.

    The colours are those of JFIF 1.02, page 3 ("Conversion to and from RGB"), with libjpeg's rounding. DCT and rounding
    of coefficients are those of ITU-T T.81, A.3.3 and A.3.4; the tables are K.1 and K.2 of its annex K.1, scaled as
    libjpeg's `jpeg_set_quality` does. Chroma is averaged over 2x2 pixels, and interpolated by libjpeg's triangle filter
    ("fancy upsampling"). Entropy coding changes no pixel, and is left out.

    Args:
        images: float32 of shape (n, size, size, 3).
        qualities: int32 of shape (n,), 1 to 95; 0 leaves an image as it is. (From 96, TurboJPEG takes another DCT.)
    """
    size = images.shape[1]
    red, green, blue = (images[..., channel] for channel in range(3))
    # Whole numbers below 2 ** 24: exact in float32, whatever the order of the sums.
    luma = ops.floor((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536)
    chroma_blue = ops.floor((-11059 * red - 21709 * green + 32768 * blue + 32767) / 65536)
    chroma_red = ops.floor((32768 * red - 27439 * green - 5329 * blue + 32767) / 65536)
    planes = [_fill(luma - 128), _halve(chroma_blue), _halve(chroma_red)]
    steps = [_scale_table(table, qualities) for table in (LUMINANCE, CHROMINANCE, CHROMINANCE)]
    luma, chroma_blue, chroma_red = (plane[:, :size, :size] for plane in _code(planes, steps))
    luma, half = luma + 128, -(-size // 2)
    chroma_blue, chroma_red = (_double(plane[:, :half, :half], size) for plane in (chroma_blue, chroma_red))
    red = luma + ops.floor((91881 * chroma_red + 32768) / 65536)
    green = luma + ops.floor((-22554 * chroma_blue - 46802 * chroma_red + 32768) / 65536)
    blue = luma + ops.floor((116130 * chroma_blue + 32768) / 65536)
    return select(qualities > 0, to_whole(ops.stack([red, green, blue], axis=-1)), images)


def _fill(planes: Any) -> Any:
    """Repeat the last column and row, up to whole blocks."""
    missing = -planes.shape[1] % BLOCK
    return extend(extend(planes, 0, missing, 1), 0, missing, 2)


def _halve(planes: Any) -> Any:
    """Average 2x2 values, rounded up and down in turn as libjpeg does, and fill whole blocks."""
    size = planes.shape[1]
    planes = extend(extend(planes, 0, size % 2, 1), 0, -size % (2 * BLOCK), 2)
    upper, lower = planes[:, ::2], planes[:, 1::2]
    sums = upper[..., ::2] + upper[..., 1::2] + lower[..., ::2] + lower[..., 1::2]
    halved = ops.floor((sums + 1 + np.arange(sums.shape[2], dtype=np.float32) % 2) / 4)
    return extend(halved, 0, -halved.shape[1] % BLOCK, 1)


def _double(planes: Any, size: int) -> Any:
    """Put two values in the place of one along each axis, a quarter of each its neighbour's, and keep the first `size`.

    Rounded up and down in turn, as libjpeg does.
    """
    for axis in (1, 2):
        length = planes.shape[axis]
        extended = extend(planes, 1, 1, axis)
        before, after = cut(extended, 0, length, axis), cut(extended, 2, length + 2, axis)
        pairs = ops.stack([3 * planes + before, 3 * planes + after], axis=axis + 1)
        planes = ops.reshape(pairs, (*planes.shape[:axis], 2 * length, *planes.shape[axis + 1 :]))
    return ops.floor((planes + 8 - np.arange(2 * length, dtype=np.float32) % 2) / 16)[:, :size, :size]


def _code(planes: list[Any], steps: list[Any]) -> list[Any]:
    """Round the coefficients of each plane's 8x8 blocks to multiples of its steps (n, 64). The values' middle is 0."""
    blocks = [_cut_blocks(plane) for plane in planes]
    numbers = [one.shape[1] for one in blocks]
    step = ops.concatenate([ops.repeat(one[:, None], number, 1) for one, number in zip(steps, numbers, strict=True)], 1)
    coefficients = ops.reshape(_transform(_transform(ops.concatenate(blocks, axis=1))), step.shape)
    divisors = ops.floor(step * SCALES + 0.5)
    halves = ops.floor(divisors / 2) + 0.5  # half more than libjpeg's, so that no quotient is whole: no error tips it
    multiples = ops.floor((ops.absolute(coefficients) + halves) / divisors)
    coefficients = ops.sign(coefficients) * multiples * step
    inverses = (one.astype(np.float32) for one in (COARSE_INVERSE_DCT, INVERSE_DCT - COARSE_INVERSE_DCT))
    values = sum(ops.matmul(coefficients, inverse) for inverse in inverses)
    parts = ops.split(ops.clip(ops.floor(values + 0.5), -128, 127), np.cumsum(numbers)[:-1].tolist(), axis=1)
    return [_join_blocks(part, plane.shape) for part, plane in zip(parts, planes, strict=True)]


def _cut_blocks(plane: Any) -> Any:
    count, height, width = plane.shape
    split = ops.reshape(plane, (count, height // BLOCK, BLOCK, width // BLOCK, BLOCK))
    return ops.reshape(ops.transpose(split, (0, 1, 3, 2, 4)), (count, -1, BLOCK, BLOCK))


def _join_blocks(blocks: Any, shape: tuple[int, int, int]) -> Any:
    count, height, width = shape
    split = ops.reshape(blocks, (count, height // BLOCK, width // BLOCK, BLOCK, BLOCK))
    return ops.reshape(ops.transpose(split, (0, 1, 3, 2, 4)), shape)


def _transform(blocks: Any) -> Any:
    """Transform the last axis of blocks (..., 8, 8), and swap the last two.

    This is libjpeg's fast DCT (that of Arai, Agui and Nakajima), whose factors have 8 binary places and whose products
    are rounded down: TurboJPEG compresses with it at qualities below 96.
    """

    def multiply(values: Any, factor: int) -> Any:
        return ops.floor(values * (factor / 256))

    columns = [blocks[..., column] for column in range(BLOCK)]
    sums = [left + right for left, right in zip(columns[:4], columns[:3:-1], strict=True)]
    differences = [left - right for left, right in zip(columns[:4], columns[:3:-1], strict=True)]
    outer, inner = sums[0] + sums[3], sums[1] + sums[2]
    outer_odd, inner_odd = sums[0] - sums[3], sums[1] - sums[2]
    turned = multiply(inner_odd + outer_odd, 181)
    first, second, third = (differences[one] + differences[one - 1] for one in (3, 2, 1))
    common = multiply(first - third, 98)
    low, high = multiply(first, 139) + common, multiply(third, 334) + common
    middle = multiply(second, 181)
    near, far = differences[0] + middle, differences[0] - middle
    frequencies = [outer + inner, near + high, outer_odd + turned, far - low]
    frequencies += [outer - inner, far + low, outer_odd - turned, near - high]
    return ops.stack(frequencies, axis=-2)


def _scale_table(table: tuple[tuple[int, ...], ...], qualities: Any) -> Any:
    """Return steps (n, 64) as libjpeg's `jpeg_set_quality` does, with baseline tables."""
    qualities = ops.maximum(qualities, 1)
    percent = ops.where(qualities < 50, 5000 // qualities, 200 - 2 * qualities)
    steps = (np.array(table, np.int32).reshape(1, -1) * percent[:, None] + 50) // 100
    return ops.cast(ops.clip(steps, 1, 255), "float32")


def to_whole(values: Any) -> Any:
    """Round to whole numbers from 0 to 255, a half up, as Pillow and libjpeg do."""
    return ops.clip(ops.floor(values + 0.5), 0, 255)


def per_image(values: Any) -> Any:
    return values[:, None, None, None]


def select(changed: Any, new: Any, images: Any) -> Any:
    """Return each new image where it is changed (n,), and the former ones, bit for bit, where not."""
    return ops.where(per_image(changed), new, images)


def cut(values: Any, start: int, end: int, axis: int) -> Any:
    return values[(slice(None),) * axis + (slice(start, end),)]


def extend(values: Any, before: int, after: int, axis: int) -> Any:
    """Repeat the first and the last values of an axis."""
    end = values.shape[axis]
    first, last = cut(values, 0, 1, axis), cut(values, end - 1, end, axis)
    return ops.concatenate([ops.repeat(first, before, axis), values, ops.repeat(last, after, axis)], axis)
