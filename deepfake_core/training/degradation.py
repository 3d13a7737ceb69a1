"""Random changes to training images, as arithmetic on whole batches: the accelerator's version of `augmentation`.

Each function does to a batch what Pillow, libjpeg-turbo or OpenCV does to an image on the CPU, in `keras.ops`, so that
it compiles on TensorFlow and JAX. Shapes are known when it is traced; nothing else needs to be. Every image has its own
argument, and is left as it is, bit for bit, by a neutral one: all are computed, and the changed ones selected.

Images are float32 of shape (n, size, size, 3), whole numbers from 0 to 255, before and after each function.

GPUs multiply matrices in TF32 unless told otherwise: of each factor, they keep 11 binary digits. Pixels have no more,
so they lose nothing. Weights of interpolation lose up to a thousandth each: less than half a grey level.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from deepfake_core.training.recompression import cut, extend, per_image, recompress, select, to_whole

__all__ = ["blur", "recolour", "recompress", "rescale", "warp"]

BOX_REACH = 2
BOX_BLURS = 3


def recolour(images: Any, colours: Any) -> Any:
    """Multiply the colours of each image by a matrix, with a constant in addition.

    Args:
        images: float32 of shape (n, size, size, 3).
        colours: float32 of shape (n, 12): (3, 4) row by row, see `augmentation.Changes`.
    """
    matrices = ops.reshape(colours, (-1, 1, 1, 3, 4))
    shares = (matrices[..., column] * images[..., column : column + 1] for column in range(3))
    return to_whole(sum(shares) + matrices[..., 3])


def rescale(images: Any, sides: Any) -> Any:
    """Scale each image down to a side of its own and back, as Pillow does: bilinear, then bicubic.

    The filters are those of Pillow's `Image.resize`: scaled down, a filter covers all pixels that a new one takes the
    place of. Each pass is rounded, as Pillow's are.

    Args:
        images: float32 of shape (n, size, size, 3).
        sides: int32 of shape (n,), from 1 to the size, which leaves an image as it is.
    """
    size, each = images.shape[1], ops.cast(sides, "float32")[:, None, None]
    small = _filter(images, _interpolate(size, each, size, _triangle, 1.0))
    scaled = _filter(small, _interpolate(each, size, size, _cubic, 2.0))
    return select(sides < size, scaled, images)


def blur(images: Any, radii: Any) -> Any:
    """Blur each image by a Gaussian, as Pillow's `ImageFilter.GaussianBlur` does: by three box blurs, each rounded.

    Args:
        images: float32 of shape (n, size, size, 3). Edges are repeated.
        radii: float32 of shape (n,), the standard deviations in pixels, up to 2.4. 0 leaves an image as it is.
    """
    weights = _weigh_box(radii)
    blurred, size = images, images.shape[1]
    for axis in (2,) * BOX_BLURS + (1,) * BOX_BLURS:
        extended = extend(blurred, BOX_REACH, BOX_REACH, axis)
        shifted = [cut(extended, start, start + size, axis) for start in range(len(weights))]
        blurred = to_whole(sum(per_image(weight) * one for weight, one in zip(weights, shifted, strict=True)))
    return select(radii > 0, blurred, images)


def warp(images: Any, corners: Any, matrices: Any, side: int, resampled: bool) -> Any:
    """Cut a square out of each image and move its pixels by an affine map, the square's edges repeated.

    Args:
        images: uint8 or float32 of shape (n, size, size, 3); fewer than 2 ** 31 pixels in all.
        corners: int32 of shape (n, 2), the squares' (y, x) of the upper left pixel.
        matrices: float32 of shape (n, 6) or more: a0, a1, a2, b0, b1, b2 take the output's (x, y) to the pixel
            (a0 x + a1 y + a2, b0 x + b1 y + b2) of the square.
        side: the squares' side, in pixels.
        resampled: True to interpolate linearly, rounded; False if the matrices move whole pixels only.

    Returns:
        float32 of shape (n, side, side, 3).
    """
    count, size = images.shape[:2]
    first = np.arange(count, dtype=np.int32) * size * size
    first = (first + corners[:, 0] * size + corners[:, 1])[:, None, None]
    pixels = ops.reshape(images, (count * size * size, 3))
    x, y = np.arange(side, dtype=np.float32), np.arange(side, dtype=np.float32)[:, None]
    a0, a1, a2, b0, b1, b2 = (matrices[:, column, None, None] for column in range(6))
    across = ops.clip(a0 * x + a1 * y + a2, 0, side - 1)
    down = ops.clip(b0 * x + b1 * y + b2, 0, side - 1)

    def take(rows: Any, columns: Any) -> Any:
        places = first + ops.cast(rows, "int32") * size + ops.cast(columns, "int32")
        return ops.cast(ops.take(pixels, places, axis=0), "float32")

    if not resampled:
        return take(ops.round(down), ops.round(across))
    top, left = ops.floor(down), ops.floor(across)
    bottom, right = ops.minimum(top + 1, side - 1), ops.minimum(left + 1, side - 1)
    below, beside = (down - top)[..., None], (across - left)[..., None]
    upper = take(top, left) * (1 - beside) + take(top, right) * beside
    lower = take(bottom, left) * (1 - beside) + take(bottom, right) * beside
    return to_whole(upper * (1 - below) + lower * below)


def _filter(images: Any, matrices: Any) -> Any:
    """Multiply the rows of each image, then its columns, by its matrix (n, size, size); round after each."""
    count, size = images.shape[:2]
    for _ in range(2):
        lines = ops.reshape(ops.swapaxes(images, 1, 2), (count, size, size * 3))
        images = ops.reshape(to_whole(ops.matmul(matrices, lines)), (count, size, size, 3))
    return images


def _interpolate(inputs: Any, outputs: Any, size: int, weigh: Callable[[Any], Any], support: float) -> Any:
    """Return matrices (n, size, size) from so many inputs to so many outputs, of which the rest is ignored or unused.

    Args:
        inputs, outputs: a number, or a tensor (n, 1, 1).
        size: the greatest of them.
        weigh: the filter: weights by distance in pixels of the smaller scale, up to the support.
    """
    scale = inputs / outputs
    stretch = ops.maximum(scale, 1.0)
    places = np.arange(size, dtype=np.float32)
    centres = (places[:, None] + 0.5) * scale
    weights = weigh(ops.minimum(ops.absolute(places + 0.5 - centres) / stretch, support))
    weights = ops.where(places < inputs, weights, 0.0)
    return weights / ops.maximum(ops.sum(weights, axis=2, keepdims=True), 0.1)  # 0 in rows beyond the outputs


def _triangle(distance: Any) -> Any:
    return 1 - distance


def _cubic(distance: Any) -> Any:
    """Weigh as Keys's cubic convolution with a = -0.5 does."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return ops.where(distance < 1, near, far)


def _weigh_box(radii: Any) -> list[Any]:
    """Return the weights (n,) of the box blur of which three are a Gaussian: inner ones, and a part on either side.

    Its width is that of Gwosdek, Grewenig, Bruhn and Weickert, "Theoretical Foundations of Gaussian Convolution by
    Extended Box Filtering" (2011), equations 7 and 11.
    """
    variance = radii * radii / BOX_BLURS
    whole = ops.floor((ops.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    reach = whole + part
    distances = [abs(offset) for offset in range(-BOX_REACH, BOX_REACH + 1)]
    return [ops.clip(reach + 1 - distance, 0, 1) / (2 * reach + 1) for distance in distances]
