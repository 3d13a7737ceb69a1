"""Random changes to training images.

Degradation is what happens to images on their way through the web: scaled down, blurred, recompressed. A detector that
saw fakes only as their generator wrote them lives on traces that the first upload removes. It is the CPU's work.

A crop leaves a random part of the image: a generator's traces are everywhere in it, so that parts teach as much as the
whole, in less time, and are harder to learn by heart.

The warp is one affine transform per image, so that each is resampled once: bilinear, edges repeated. Without rotation
and zoom it moves whole pixels and resamples nothing, which leaves the traces of a generator as they are. An accelerator
warps whole batches (`Augmentation`); on the CPU, OpenCV does it in a fraction of TensorFlow's time (`warp_images`).
"""

import math
from collections.abc import Callable
from typing import Any

import cv2
import keras
import numpy as np
import simplejpeg
from keras import layers
from PIL import Image, ImageFilter

from deepfake_core.config import AugmentationParameters

cv2.setNumThreads(1)
"""Of the process, in which nothing else uses OpenCV: on images this small, a second thread saves no time, and takes as
much again from the training."""

RESIZE_SHARES = (0.5, 1.0)
BLUR_PIXELS = (0.3, 1.5)
JPEG_QUALITY = (40, 95)


def crop_images(images: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """Cut a square out of each image, each elsewhere.

    Args:
        images: uint8 array of shape (n, size, size, 3).
        share: the square's side over the images'.

    Returns:
        uint8 array of shape (n, side, side, 3).
    """
    count, size = images.shape[:2]
    side = round(size * share)
    corners = random.integers(0, size - side + 1, (count, 2))
    squares = [image[y : y + side, x : x + side] for image, (y, x) in zip(images, corners, strict=True)]
    return np.stack(squares)


def warp_images(images: np.ndarray, parameters: AugmentationParameters, random: np.random.Generator) -> np.ndarray:
    """Rotate, shift, zoom and flip images, each by its own transform.

    Args:
        images: uint8 array of shape (n, size, size, 3).

    Returns:
        uint8 array of the same shape.
    """
    count, size = images.shape[:2]
    matrices = draw_matrices(parameters, size, lambda greatest: random.uniform(-greatest, greatest, count), np)
    warped = np.empty_like(images)
    for image, matrix, out in zip(images, matrices[:, :6].reshape(count, 2, 3), warped, strict=True):
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cv2.warpAffine(image, matrix, (size, size), dst=out, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return warped


def degrade_image(image: np.ndarray, shares: AugmentationParameters, random: np.random.Generator) -> np.ndarray:
    """Scale, blur and recompress an image, each with its own chance (`resize`, `blur`, `recompression`).

    Args:
        image: uint8 array of shape (size, size, 3).

    Returns:
        uint8 array of the same shape.
    """
    size = image.shape[0]
    if random.random() < shares.resize:
        side = round(size * random.uniform(*RESIZE_SHARES))
        small = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
        image = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))
    if random.random() < shares.blur:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(random.uniform(*BLUR_PIXELS))))
    if random.random() < shares.recompression:
        quality = int(random.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1))
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, colorsubsampling="420")
        image = simplejpeg.decode_jpeg(data)
    return image


class Augmentation(layers.Layer):
    """Rotate, shift, zoom and flip float32 images of shape (n, size, size, 3), in training only.

    Args:
        parameters: greatest rotation (degrees), shifts (share of the side), zoom; flip or not.
        seed: seed of the random numbers.
    """

    def __init__(self, parameters: AugmentationParameters, seed: int, name: str | None = None) -> None:
        super().__init__(name=name, dtype="float32")
        self.supports_jit = keras.backend.backend() != "tensorflow"  # XLA has no projective transform
        self._parameters = parameters
        self._generator = keras.random.SeedGenerator(seed)

    def call(self, images: Any, training: bool = False) -> Any:
        if not training:
            return images
        count, size = keras.ops.shape(images)[:2]

        def draw(greatest: float) -> Any:
            return keras.random.uniform((count,), -greatest, greatest, seed=self._generator)

        return keras.ops.image.affine_transform(
            images,
            draw_matrices(self._parameters, keras.ops.cast(size, "float32"), draw, keras.ops),
            interpolation="bilinear",
            fill_mode="nearest",
            data_format="channels_last",
        )


def draw_matrices(parameters: AugmentationParameters, size: Any, draw: Callable[[float], Any], ops: Any) -> Any:
    """Draw matrices (n, 8) that take output coordinates to input ones: a0 x + a1 y + a2, b0 x + b1 y + b2, 0, 0.

    Args:
        size: side of the images, in pixels: a number, or a tensor of one.
        draw: returns n numbers, uniform between minus and plus its argument.
        ops: `numpy` or `keras.ops`.
    """
    angle = draw(math.radians(parameters.rotation))
    zoom_x, zoom_y = 1 + draw(parameters.zoom), 1 + draw(parameters.zoom)
    shift_x, shift_y = draw(parameters.width_shift) * size, draw(parameters.height_shift) * size
    if not (parameters.rotation or parameters.zoom):
        shift_x, shift_y = ops.round(shift_x), ops.round(shift_y)
    flip = ops.where(draw(1.0) < 0, -1.0, 1.0) if parameters.horizontal_flip else 1.0
    a0, a1 = flip * zoom_x * ops.cos(angle), -flip * zoom_x * ops.sin(angle)
    b0, b1 = zoom_y * ops.sin(angle), zoom_y * ops.cos(angle)
    centre = (size - 1) / 2
    a2 = centre - a0 * centre - a1 * centre + shift_x
    b2 = centre - b0 * centre - b1 * centre + shift_y
    zero = ops.zeros_like(angle)
    return ops.stack([a0, a1, a2, b0, b1, b2, zero, zero], axis=1)
