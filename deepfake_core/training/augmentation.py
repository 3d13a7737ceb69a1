"""Random changes to training images: what each image of an epoch is to go through, and how the CPU does it.

Degradation is what happens to images on their way through the web: edited, scaled down, blurred, recompressed. A
detector that saw fakes only as their generator wrote them lives on traces that the first upload removes.

A crop leaves a random part of the image: a generator's traces are everywhere in it, so that parts teach as much as the
whole, in less time, and are harder to learn by heart.

The warp is one affine transform per image, so that each is resampled once: bilinear, edges repeated. Without rotation
and zoom it moves whole pixels and resamples nothing, which leaves the traces of a generator as they are.

What is drawn does not depend on the hardware. The CPU changes image by image, by Pillow, libjpeg-turbo and OpenCV;
`degradation` does the same to whole batches, on an accelerator.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageFilter

from deepfake_core.config import AugmentationParameters

cv2.setNumThreads(1)
"""Of the process, in which nothing else uses OpenCV: on images this small, a second thread saves no time, and takes as
much again from the training."""

BRIGHTNESS, CONTRAST, SATURATION = (0.65, 1.5), (0.7, 1.4), (0.0, 1.6)
"""Factors. A saturation of 0 is grey."""

SAME_COLOURS = np.eye(3, 4, dtype=np.float32).ravel()

GREY_WEIGHTS = np.array([0.299, 0.587, 0.114])
"""Of red, green and blue: the luminance of ITU-R BT.601."""

RESIZE_SHARES = (0.5, 1.0)
BLUR_PIXELS = (0.3, 1.5)
JPEG_QUALITY = (40, 95)


@dataclass(frozen=True)
class Changes:
    """What becomes of n images, in the order in which it is done.

    Attributes:
        colours: float32 (n, 12): a matrix (3, 4), row by row, from (red, green, blue, 1) to red, green and blue.
        sides: int32 (n,): scale to this side and back; the images' own leaves them as they are.
        radii: float32 (n,): blur by a Gaussian of this radius in pixels, or 0.
        qualities: int32 (n,): recompress as JPEG of this quality, or 0.
        corners: int32 (n, 2): (y, x) of the upper left pixel of the square that is left.
        matrices: float32 (n, 6): a0, a1, a2, b0, b1, b2 take a pixel (x, y) of the warped square to the place
            (a0 x + a1 y + a2, b0 x + b1 y + b2) that it shows.
    """

    colours: np.ndarray
    sides: np.ndarray
    radii: np.ndarray
    qualities: np.ndarray
    corners: np.ndarray
    matrices: np.ndarray

    def take(self, positions: np.ndarray) -> "Changes":
        """Return those of some images, by position."""
        return Changes(**{field.name: getattr(self, field.name)[positions] for field in fields(self)})


def draw_changes(parameters: AugmentationParameters, count: int, size: int, random: np.random.Generator) -> Changes:
    """Draw what becomes of each of so many square images of a size in pixels."""

    def choose(share: float, drawn: np.ndarray, neutral: int, dtype: type) -> np.ndarray:
        return np.where(random.random(count) < share, drawn, neutral).astype(dtype)

    side = crop_side(size, parameters)
    scaled = np.round(size * random.uniform(*RESIZE_SHARES, count))
    return Changes(
        sides=choose(parameters.resize, scaled, size, np.int32),
        radii=choose(parameters.blur, random.uniform(*BLUR_PIXELS, count), 0, np.float32),
        qualities=choose(
            parameters.recompression, random.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1, count), 0, np.int32
        ),
        corners=random.integers(0, size - side + 1, (count, 2), np.int32),
        matrices=draw_matrices(parameters, count, side, random),
        colours=draw_colours(parameters, count, random),
    )


def crop_side(size: int, parameters: AugmentationParameters) -> int:
    """Return the side, in pixels, of the square that is left of an image of a size."""
    return round(size * parameters.crop)


def change_images(images: np.ndarray, changes: Changes, parameters: AugmentationParameters, pool: Any) -> np.ndarray:
    """Degrade, crop and warp images on the CPU.

    Args:
        images: uint8 (n, size, size, 3).
        pool: an executor, in whose threads images are degraded.

    Returns:
        uint8 (n, side, side, 3).
    """
    if parameters.degrades:
        degradations = changes.colours, changes.sides, changes.radii, changes.qualities
        images = np.stack(list(pool.map(degrade_image, images, *degradations)))
    side = crop_side(images.shape[1], parameters)
    if side < images.shape[1]:
        squares = [image[y : y + side, x : x + side] for image, (y, x) in zip(images, changes.corners, strict=True)]
        images = np.stack(squares)
    return warp_images(images, changes.matrices)


def warp_images(images: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """Rotate, shift, zoom and flip uint8 images (n, size, size, 3), each by its own matrix (n, 6)."""
    size = images.shape[1]
    warped = np.empty_like(images)
    for image, matrix, out in zip(images, matrices.reshape(-1, 2, 3), warped, strict=True):
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cv2.warpAffine(image, matrix, (size, size), dst=out, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return warped


def degrade_image(image: np.ndarray, colours: np.ndarray, side: int, radius: float, quality: int) -> np.ndarray:
    """Give a uint8 image (size, size, 3) other colours, scale it to a side and back, blur and recompress it; see
    `Changes`."""
    size = image.shape[0]
    if not np.array_equal(colours, SAME_COLOURS):
        matrix = colours.reshape(3, 4)
        image = np.clip(np.rint(image @ matrix[:, :3].T + matrix[:, 3]), 0, 255).astype(np.uint8)
    if side < size:
        small = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
        image = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))
    if radius:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(float(radius))))
    if quality:
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), int(quality), colorsubsampling="420")
        image = simplejpeg.decode_jpeg(data)
    return image


def draw_colours(parameters: AugmentationParameters, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw so many changes of colours, float32 (count, 12); see `Changes`: saturation, then brightness, then contrast
    about a middle grey."""
    changed = random.random(count) < parameters.colours
    brightness, contrast, saturation = (
        np.where(changed, random.uniform(*factors, count), 1) for factors in (BRIGHTNESS, CONTRAST, SATURATION)
    )
    matrices = np.empty((count, 3, 4))
    matrices[..., :3] = saturation[:, None, None] * np.eye(3) + (1 - saturation)[:, None, None] * GREY_WEIGHTS
    matrices[..., :3] *= (brightness * contrast)[:, None, None]
    matrices[..., 3] = (128 * (1 - contrast))[:, None]
    return matrices.reshape(count, 12).astype(np.float32)


def draw_matrices(parameters: AugmentationParameters, count: int, size: int, random: np.random.Generator) -> np.ndarray:
    """Draw matrices of so many warps, float32 (count, 6), of squares of a size in pixels; see `Changes`."""

    def draw(greatest: float) -> np.ndarray:
        return random.uniform(-greatest, greatest, count)

    angle = draw(math.radians(parameters.rotation))
    zoom_x, zoom_y = 1 + draw(parameters.zoom), 1 + draw(parameters.zoom)
    shift_x, shift_y = draw(parameters.width_shift) * size, draw(parameters.height_shift) * size
    if not parameters.resamples:
        shift_x, shift_y = np.round(shift_x), np.round(shift_y)
    flip = np.where(draw(1.0) < 0, -1.0, 1.0) if parameters.horizontal_flip else 1.0
    a0, a1 = flip * zoom_x * np.cos(angle), -flip * zoom_x * np.sin(angle)
    b0, b1 = zoom_y * np.sin(angle), zoom_y * np.cos(angle)
    centre = (size - 1) / 2
    a2 = centre - a0 * centre - a1 * centre + shift_x
    b2 = centre - b0 * centre - b1 * centre + shift_y
    return np.stack([a0, a1, a2, b0, b1, b2], axis=1).astype(np.float32)
