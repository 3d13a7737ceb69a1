"""Images become batches: shuffled, cropped, degraded and warped again in each epoch."""

import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from deepfake_core.config import AugmentationParameters
from deepfake_core.data.images import Images
from deepfake_core.training.augmentation import change_images, draw_changes

WORKERS = 2
"""Batches that are made at a time."""


class Batches:
    """What each epoch shows, and the CPU's batches of it: uint8 (n, side, side, 3) and float32 labels (n,).

    Args:
        images: one split.
        batch_size: images per batch; the last one may be smaller.
        augmentation: how images are changed, where `seed` is given.
        seed: of the orders and changes. None keeps the images and their order as they are.

    Attributes:
        order: int64 (n,): the positions of the images, in the order in which the epoch shows them.
        changes: of each image, by its position; None where there is no seed.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        augmentation: AugmentationParameters = AugmentationParameters(),  # noqa: B008 - frozen
        seed: int | None = None,
    ) -> None:
        self.images, self.batch_size, self.augmentation, self._seed = images, batch_size, augmentation, seed
        self._pool = ThreadPoolExecutor(os.cpu_count())  # starts threads when it is used
        self.start_epoch(0)

    def for_fit(self) -> Any:
        """Return a `tf.data` pipeline for Keras's `fit`; in each epoch it fetches the order that `start_epoch` set.

        It lasts as long as these batches are referred to.
        """
        import tensorflow as tf

        batches = weakref.ref(self)  # TensorFlow keeps the function for as long as the process lives

        def get(index: int) -> Any:
            return batches()[index]  # type: ignore[index] # `fit`'s caller holds them

        def fetch(index: Any) -> Any:
            pixels, labels = tf.numpy_function(get, [index], [tf.uint8, tf.float32])
            pixels.set_shape(shape)
            labels.set_shape([None])
            return pixels, labels

        shape = (None, *self[0][0].shape[1:])
        options = tf.data.Options()
        options.autotune.enabled = False
        return tf.data.Dataset.range(len(self)).map(fetch, WORKERS).prefetch(WORKERS).with_options(options)

    def start_epoch(self, epoch: int) -> None:
        """Shuffle all images, and draw their changes, again. Both follow from the seed and the epoch."""
        count, size = len(self.images), self.images.pixels.shape[1]
        self.order, self.changes = np.arange(count), None
        if self._seed is not None:
            random = np.random.default_rng([self._seed, epoch])
            self.order = random.permutation(count)
            self.changes = draw_changes(self.augmentation, count, size, random)

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.sort(self.order[index * self.batch_size : (index + 1) * self.batch_size])
        pixels = self.images.pixels[chosen]
        if self.changes:
            pixels = change_images(pixels, self.changes.take(chosen), self.augmentation, self._pool)
        return pixels, self.images.labels[chosen].astype(np.float32)
