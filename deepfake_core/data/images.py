"""A split as arrays: decoded and resized once, kept on disk, read as a memory map.

Where the pixels would take too much of the disk, images are decoded as they are read.
"""

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deepfake_core.config import CLASS_NAMES
from deepfake_core.data.dataset import Dataset
from deepfake_core.decoding import open_header
from deepfake_core.detector import open_image, resize_image
from deepfake_core.errors import ConfigurationError
from deepfake_core.input_gate import ImageQuality, read_jpeg_quality
from deepfake_core.storage.files import hash_file, require_space, write_beside
from deepfake_core.storage.progress import Progress

log = logging.getLogger(__name__)

TIMED_IMAGES = 64
"""Decoded once more, to say how fast that is."""


@dataclass(frozen=True)
class Images:
    """One split at one input size.

    Attributes:
        pixels: uint8 memory map of shape (n, size, size, 3), or what reads and decodes the same, or a selection of
            either.
        labels: int8 array of shape (n,): 0 real, 1 fake.
        rows: the split's manifest rows, in the same order.
    """

    pixels: np.ndarray
    labels: np.ndarray
    rows: pd.DataFrame

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, mask: np.ndarray) -> "Images":
        """Return the images where a mask of shape (n,) is true; their pixels stay on disk until they are read."""
        if mask.all():
            return self
        rows = self.rows[mask].reset_index(drop=True)
        array, places = self.locate()
        return Images(_Selection(array, places[mask]), self.labels[mask], rows)  # type: ignore[arg-type]

    def locate(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the array that holds the pixels, and the place in it of each image, int64 (n,)."""
        if isinstance(self.pixels, _Selection):
            return self.pixels.array, self.pixels.positions
        return self.pixels, np.arange(len(self))


class _Selection:
    """Some images of an array, by an index of their own."""

    def __init__(self, pixels: np.ndarray, positions: np.ndarray) -> None:
        self.array, self.positions = pixels, positions
        self.shape = (len(positions), *pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.array[self.positions[index]]


class DecodedOnRead:
    """A data set's images as an array of shape (n, size, size, 3): what is read of it is decoded, on all cores."""

    def __init__(self, dataset: Dataset, paths: Sequence[str], size: int) -> None:
        self._dataset, self._paths, self._size = dataset, paths, size
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self.shape, self.dtype = (len(paths), size, size, 3), np.dtype(np.uint8)
        self.nbytes = int(np.prod(self.shape))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> np.ndarray:
        chosen = np.arange(len(self))[index]
        decoded = list(self._pool.map(self.decode, chosen.ravel()))
        return np.array(decoded, np.uint8).reshape(*chosen.shape, *self.shape[1:])

    def decode(self, position: int) -> np.ndarray:
        """Return uint8 of shape (size, size, 3)."""
        with open_image(self._dataset.read(self._paths[position])) as image:
            return resize_image(image, self._size)


def load_images(dataset: Dataset, split: str, size: int, on_progress: Progress | None = None) -> Images:
    """Return a split's images as a memory map; decode and resize them if no run has done so before.

    Where those of the whole data set would take more than `data.cache_gb`, they are decoded as they are read.
    The file's checksum (as `sha256sum` writes it) is in a file beside it and is compared at each load; a file that
    differs is written again.
    """
    rows = dataset.split(split)
    labels = rows["label"].map({name: label for label, name in enumerate(CLASS_NAMES)}).to_numpy(np.int8)
    file = dataset.store.batches(dataset.version, size) / f"{split}.npy"
    checksum = file.with_suffix(".sha256")
    if file.exists() and (not checksum.exists() or checksum.read_text().split()[:1] != [hash_file(file)]):
        log.warning("%s does not have the checksum in the file beside it: it is written again", file)
        file.unlink()
    files = DecodedOnRead(dataset, rows["path"].tolist(), size)
    needed_gb = int(dataset.manifest["kept"].sum()) * size**2 * 3 / 1e9
    if not file.exists() and needed_gb > dataset.cache_gb:
        start = time.perf_counter()
        timed = len(files[:TIMED_IMAGES])
        log.info(
            "%s: images are decoded as they are read, %.0f a second: at %d x %d all need %.1f GB, `cache_gb` is %g",
            split,
            timed / (time.perf_counter() - start),
            size,
            size,
            needed_gb,
            dataset.cache_gb,
        )
        return Images(files, labels, rows)  # type: ignore[arg-type]
    if not file.exists():
        with write_beside(file) as beside, write_beside(checksum) as line:
            _write_pixels(files, beside, on_progress)
            line.write_text(f"{hash_file(beside)}  {file.name}\n")
        log.info("%s: %d images decoded at %d x %d", split, len(rows), size, size)
    return Images(np.load(file, mmap_mode="r", allow_pickle=False), labels, rows)


def _write_pixels(files: DecodedOnRead, file: Path, on_progress: Progress | None) -> None:
    remedy = "set `data.data_dir` to another disk, or `data.cache_gb` to less"
    require_space(file.parent, files.nbytes, str(file), remedy)
    pixels = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=files.shape)
    with file.open("r+b") as reserved:  # what does not fit later would end the process by SIGBUS
        os.posix_fallocate(reserved.fileno(), 0, file.stat().st_size)

    def fill(position: int) -> None:
        pixels[position] = files.decode(position)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, _ in enumerate(pool.map(fill, range(len(files))), start=1):
            if on_progress and (done % 500 == 0 or done == len(files)):
                on_progress(done, len(files))
    pixels.flush()


def measure_files(images: Images, dataset: Dataset) -> list[ImageQuality]:
    """Measure images of a data set; of their bytes, only headers are parsed."""

    def measure(position: int) -> ImageQuality:
        with open_header(dataset.read(images.rows["path"].iloc[position])) as header:
            return ImageQuality.take(header, images.pixels[position], read_jpeg_quality(header))

    return [measure(position) for position in range(len(images))]


def load_seen(
    dataset: Dataset, split: str, size: int, holdout: Sequence[str], on_progress: Progress | None = None
) -> Images:
    """Return a split without the sources that are held out.

    Raises:
        ConfigurationError: if a source to hold out is not in the data set, or no source is left.
    """
    images = load_images(dataset, split, size, on_progress)
    sources = set(dataset.manifest.loc[dataset.manifest["kept"], "source"])
    if not set(holdout) < sources:
        raise ConfigurationError(
            "`evaluation.holdout_sources` must name sources that have images of their own in the data set, and leave "
            f"one to train on. Received: {', '.join(holdout)}; the data set has {', '.join(sorted(sources))}."
        )
    return images.select(~images.rows["source"].isin(holdout).to_numpy())


def load_same(dataset: Dataset, images: Images, size: int) -> Images:
    """Return the same images of the test split at another input size."""
    test = load_images(dataset, "test", size)
    return test.select(test.rows["sha256"].isin(images.rows["sha256"]).to_numpy())
