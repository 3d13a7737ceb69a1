"""Split folders become arrays on disk, decoded and resized once, and then batches."""

import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd

from deepfake_core.archive import Progress
from deepfake_core.augmentation import crop_images, degrade_image, warp_images
from deepfake_core.config import CLASS_NAMES, AugmentationParameters
from deepfake_core.detector import decode_image, resize_image
from deepfake_core.files import hash_file, write_beside
from deepfake_core.manifest import Dataset

log = logging.getLogger(__name__)

WORKERS = 2
"""Batches that are made at a time."""


@dataclass(frozen=True)
class Images:
    """One split at one input size.

    Attributes:
        pixels: uint8 memory map of shape (n, size, size, 3), or a selection that reads from one.
        labels: int8 array of shape (n,): 0 real, 1 fake.
        rows: the split's manifest rows, in the same order.
    """

    pixels: np.ndarray
    labels: np.ndarray
    rows: pd.DataFrame

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, mask: np.ndarray) -> "Images":
        """Return the images where a mask of shape (n,) is true; their pixels stay on disk until they are asked for."""
        if mask.all():
            return self
        rows = self.rows[mask].reset_index(drop=True)
        return Images(_Selection(self.pixels, np.flatnonzero(mask)), self.labels[mask], rows)  # type: ignore[arg-type]


class _Selection:
    """Some images of an array, by an index of their own."""

    def __init__(self, pixels: np.ndarray, positions: np.ndarray) -> None:
        self._pixels, self._positions = pixels, positions
        self.shape = (len(positions), *pixels.shape[1:])

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._pixels[self._positions[index]]


def load_images(dataset: Dataset, split: str, size: int, on_progress: Progress | None = None) -> Images:
    """Return a split's images as a memory map; decode and resize them if no run has done so before.

    The file's checksum (as `sha256sum` writes it) lies beside it and is compared at each load; a file that differs is
    written again.
    """
    rows = dataset.split(split)
    labels = rows["label"].map({name: label for label, name in enumerate(CLASS_NAMES)}).to_numpy(np.int8)
    file = dataset.path.parent.parent / "batches" / f"{dataset.version}-{size}px" / f"{split}.npy"
    checksum = file.with_suffix(".sha256")
    if file.exists() and (not checksum.exists() or checksum.read_text().split()[:1] != [hash_file(file)]):
        log.warning("%s does not have the checksum that lies beside it: it is written again", file)
        file.unlink()
    if not file.exists():
        with write_beside(file) as beside, write_beside(checksum) as line:
            _write_pixels(dataset, rows["path"].tolist(), size, beside, on_progress)
            line.write_text(f"{hash_file(beside)}  {file.name}\n")
        log.info("%s: %d images decoded at %d x %d", split, len(rows), size, size)
    return Images(np.load(file, mmap_mode="r", allow_pickle=False), labels, rows)


def _write_pixels(dataset: Dataset, paths: Sequence[str], size: int, file: Path, on_progress: Progress | None) -> None:
    shape = (len(paths), size, size, 3)
    needed, free = int(np.prod(shape)), shutil.disk_usage(file.parent).free
    if needed > free:
        raise OSError(f"{file} needs {needed / 1e9:.2f} GB; the disk has {free / 1e9:.2f} GB free.")
    pixels = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)

    def fill(position: int) -> None:
        data = (dataset.path / paths[position]).read_bytes()
        pixels[position] = resize_image(decode_image(data), size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, _ in enumerate(pool.map(fill, range(len(paths))), start=1):
            if on_progress and (done % 500 == 0 or done == len(paths)):
                on_progress(done, len(paths))
    pixels.flush()


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
        """Shuffle all images anew, in an order that follows from the seed and the epoch."""
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
