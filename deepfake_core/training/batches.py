"""Images become batches: shuffled, cropped, degraded and warped again in each epoch."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np

from deepfake_core.config import AugmentationParameters
from deepfake_core.data.images import Images
from deepfake_core.training.augmentation import crop_images, degrade_image, warp_images

WORKERS = 2
"""Batches that are made at a time."""


class Batches(keras.utils.PyDataset):
    """Batches of images and labels: uint8 (n, side, side, 3) and float32 (n,); the side is the images', or a crop's.

    Args:
        images: one split.
        batch_size: images per batch; the last one may be smaller.
        augmentation: how images are changed, where `seed` is given.
        seed: of the orders and changes. None keeps the images and their order as they are.
        warp: False where an accelerator will warp the batch.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        augmentation: AugmentationParameters = AugmentationParameters(),  # noqa: B008 - frozen
        seed: int | None = None,
        warp: bool = True,
    ) -> None:
        super().__init__(workers=WORKERS, use_multiprocessing=False)
        self._images, self._batch_size, self._seed = images, batch_size, seed
        self._augmentation, self._warp = augmentation, warp
        degrades = augmentation.resize or augmentation.blur or augmentation.recompression
        self._pool = ThreadPoolExecutor(os.cpu_count()) if degrades and seed is not None else None
        self.start_epoch(0)

    def for_fit(self) -> Any:
        """Return what Keras's `fit` takes; in each epoch it fetches the order that `start_epoch` set.

        On TensorFlow, a `tf.data` pipeline. What Keras would make of this class waits at each epoch's end: 0.1 s, or up
        to 5 s with one worker.
        """
        if keras.backend.backend() != "tensorflow":
            return self
        import tensorflow as tf

        def fetch(index: Any) -> Any:
            pixels, labels = tf.numpy_function(self.__getitem__, [index], [tf.uint8, tf.float32])
            pixels.set_shape(shape)
            labels.set_shape([None])
            return pixels, labels

        shape = (None, *self[0][0].shape[1:])
        options = tf.data.Options()
        options.autotune.enabled = False
        return tf.data.Dataset.range(len(self)).map(fetch, WORKERS).prefetch(WORKERS).with_options(options)

    def start_epoch(self, epoch: int) -> None:
        """Shuffle all images again, in an order that follows from the seed and the epoch."""
        self._epoch = epoch
        self._order = np.arange(len(self._images))
        if self._seed is not None:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._order)

    def __len__(self) -> int:
        return -(-len(self._images) // self._batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.sort(self._order[index * self._batch_size : (index + 1) * self._batch_size])
        pixels = self._images.pixels[chosen]
        if self._pool:
            pixels = np.stack(list(self._pool.map(self._degrade, chosen, pixels)))
        if self._seed is not None:
            random = np.random.default_rng([self._seed, self._epoch, index])
            if self._augmentation.crop < 1:
                pixels = crop_images(pixels, self._augmentation.crop, random)
            if self._warp:
                pixels = warp_images(pixels, self._augmentation, random)
        return pixels, self._images.labels[chosen].astype(np.float32)

    def _degrade(self, position: int, image: np.ndarray) -> np.ndarray:
        random = np.random.default_rng([self._seed or 0, self._epoch, position])
        return degrade_image(image, self._augmentation, random)
