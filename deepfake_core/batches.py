"""Split folders become arrays on disk, decoded and resized once, and then batches."""

import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from deepfake_core.archive import Progress
from deepfake_core.config import CLASS_NAMES
from deepfake_core.detector import decode_image, resize_image
from deepfake_core.files import write_beside
from deepfake_core.manifest import Dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Images:
    """One split at one input size.

    Attributes:
        pixels: uint8 memory map of shape (n, size, size, 3).
        labels: int8 array of shape (n,): 0 real, 1 fake.
        rows: the split's manifest rows, in the same order.
    """

    pixels: np.ndarray
    labels: np.ndarray
    rows: pd.DataFrame

    def __len__(self) -> int:
        return len(self.labels)


def load_images(dataset: Dataset, split: str, size: int, on_progress: Progress | None = None) -> Images:
    """Return a split's images as a memory map; decode and resize them if no run has done so before."""
    rows = dataset.split(split)
    labels = rows["label"].map({name: label for label, name in enumerate(CLASS_NAMES)}).to_numpy(np.int8)
    folder = dataset.path.parent.parent / "batches" / f"{dataset.version}-{size}px"
    cached = folder / f"{split}.npy"
    if not cached.exists():
        with write_beside(cached) as beside:
            _write_pixels(dataset, rows["path"].tolist(), size, beside, on_progress)
        log.info("%s: %d images decoded at %d x %d", split, len(rows), size, size)
    return Images(np.load(cached, mmap_mode="r", allow_pickle=False), labels, rows)


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
    """Batches of images and labels, in a new order each epoch.

    Args:
        images: one split.
        batch_size: images per batch; the last one may be smaller.
        shuffle_seed: seed of the orders; None keeps the images' own.
    """

    def __init__(self, images: Images, batch_size: int, shuffle_seed: int | None = None) -> None:
        super().__init__(workers=1, use_multiprocessing=False, max_queue_size=10)
        self._images, self._batch_size = images, batch_size
        self._random = None if shuffle_seed is None else np.random.default_rng(shuffle_seed)
        self._order = np.arange(len(images))
        self.on_epoch_end()

    def __len__(self) -> int:
        return -(-len(self._images) // self._batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.sort(self._order[index * self._batch_size : (index + 1) * self._batch_size])
        return self._images.pixels[chosen], self._images.labels[chosen].astype(np.float32)

    def on_epoch_end(self) -> None:
        if self._random is not None:
            self._order = self._random.permutation(len(self._images))
