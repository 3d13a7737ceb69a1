"""Random changes to training images, on the device that trains."""

import math
from typing import Any

import keras
from keras import layers

from deepfake_core.config import AugmentationParameters


class Augmentation(layers.Layer):
    """Rotate, shift, zoom and flip training images at random, in one warp.

    One affine transform per image, bilinear, edges repeated (`fill_mode="nearest"`), so that each
    image is resampled once. Active in training only.

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
        """Warp float32 images of shape (n, height, width, 3)."""
        if not training:
            return images
        return keras.ops.image.affine_transform(
            images,
            self._draw_transforms(images),
            interpolation="bilinear",
            fill_mode="nearest",
            data_format="channels_last",
        )

    def _draw_transforms(self, images: Any) -> Any:
        """Draw matrices (n, 8) that take output coordinates to input ones: a0 x + a1 y + a2, b0 x + b1 y + b2."""
        ops, chosen = keras.ops, self._parameters
        count = ops.shape(images)[0]
        height, width = (float(side) for side in images.shape[1:3])

        def draw(greatest: float) -> Any:
            return keras.random.uniform((count,), -greatest, greatest, seed=self._generator)

        angle = draw(math.radians(chosen.rotation))
        zoom_x, zoom_y = 1 + draw(chosen.zoom), 1 + draw(chosen.zoom)
        shift_x, shift_y = draw(chosen.width_shift) * width, draw(chosen.height_shift) * height
        flip = ops.where(draw(1.0) < 0, -1.0, 1.0) if chosen.horizontal_flip else ops.ones((count,))
        a0, a1 = flip * zoom_x * ops.cos(angle), -flip * zoom_x * ops.sin(angle)
        b0, b1 = zoom_y * ops.sin(angle), zoom_y * ops.cos(angle)
        centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
        a2 = centre_x - a0 * centre_x - a1 * centre_y + shift_x
        b2 = centre_y - b0 * centre_x - b1 * centre_y + shift_y
        zero = ops.zeros((count,))
        return ops.stack([a0, a1, a2, b0, b1, b2, zero, zero], axis=1)
