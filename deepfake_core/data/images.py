"""A split as arrays: decoded and resized once, kept on disk, read as a memory map.

Before a training on CPUs, images are decoded as they are read for the first time. Where the pixels would take too much
of the disk, they are decoded each time.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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

Decode = Literal["now", "once", "never"]

READ_AT_ONCE, DECODED_AT_ONCE = 1000, 16
"""Images that are decoded before progress is reported, and those that a thread decodes in a row."""

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


class DecodedOnce(DecodedOnRead):
    """What is read is decoded, and kept in a file, which is in its place once all images were read.

    The file's checksum (as `sha256sum` writes it) is in a file beside it.

    Raises:
        DiskError: if the pixels do not fit on the disk.
    """

    def __init__(self, dataset: Dataset, paths: Sequence[str], size: int, file: Path) -> None:
        super().__init__(dataset, paths, size)
        self._file, self._is_kept, self._finishing = file, np.zeros(len(paths), bool), threading.Lock()
        with ExitStack() as writing:
            self._beside = writing.enter_context(write_beside(file))
            self._line = writing.enter_context(write_beside(place_checksum(file)))
            remedy = "set `data.data_dir` to another disk, or `data.cache_gb` to less"
            require_space(file.parent, self.nbytes, str(file), remedy)
            self._pixels = np.lib.format.open_memmap(self._beside, mode="w+", dtype=np.uint8, shape=self.shape)
            with self._beside.open("r+b") as reserved:  # what does not fit later would end the process by SIGBUS
                os.posix_fallocate(reserved.fileno(), 0, self._beside.stat().st_size)
            self._writing = writing.pop_all()  # if not all is read, the files go with this object

    def __getitem__(self, index: Any) -> np.ndarray:
        chosen = np.arange(len(self))[index].ravel()
        missing = chosen[~self._is_kept[chosen]]
        for some in self._pool.map(self._keep, np.array_split(missing, -(-len(missing) // DECODED_AT_ONCE) or 1)):
            self._is_kept[some] = True
        if len(missing):
            self._finish_if_whole()
        return self._pixels[index]

    def _keep(self, positions: np.ndarray) -> np.ndarray:
        for position in positions:
            self._pixels[position] = self.decode(position)
        return positions

    def _finish_if_whole(self) -> None:
        with self._finishing:
            if not self._is_kept.all() or self._file.exists():
                return
            self._line.write_text(f"{hash_file(self._beside)}  {self._file.name}\n")
            self._writing.close()
        log.info("%s: %d images decoded at %d x %d", self._file.stem, len(self), self._size, self._size)


def place_checksum(file: Path) -> Path:
    return file.with_suffix(".sha256")


def load_images(
    dataset: Dataset, split: str, size: int, on_progress: Progress | None = None, decode: Decode = "now"
) -> Images:
    """Return a split's images as a memory map; decode and resize them if no run has done so before.

    The file's checksum is compared at each load; a file that differs is written again. Where the pixels of the whole
    data set would take more than `data.cache_gb`, images are decoded as they are read.

    Args:
        decode: `once`, as they are read, where they have to be decoded. `never`: none is kept, for a few of them.
    """
    rows = dataset.split(split)
    labels = rows["label"].map({name: label for label, name in enumerate(CLASS_NAMES)}).to_numpy(np.int8)
    file, paths = dataset.store.batches(dataset.version, size) / f"{split}.npy", rows["path"].tolist()
    checksum = place_checksum(file)
    if decode == "never":
        return Images(DecodedOnRead(dataset, paths, size), labels, rows)  # type: ignore[arg-type]
    if file.exists() and (not checksum.exists() or checksum.read_text().split()[:1] != [hash_file(file)]):
        log.warning("%s does not have the checksum in the file beside it: it is written again", file)
        file.unlink()
    needed_gb = int(dataset.manifest["kept"].sum()) * size**2 * 3 / 1e9
    if not file.exists() and needed_gb > dataset.cache_gb:
        files = DecodedOnRead(dataset, paths, size)
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
        once = DecodedOnce(dataset, paths, size, file)
        if decode == "once":
            return Images(once, labels, rows)  # type: ignore[arg-type]
        for start in range(0, len(once), READ_AT_ONCE):
            read = once[start : start + READ_AT_ONCE]
            if on_progress:
                on_progress(start + len(read), len(once))
    return Images(np.load(file, mmap_mode="r", allow_pickle=False), labels, rows)


def measure_files(images: Images, dataset: Dataset) -> list[ImageQuality]:
    """Measure images of a data set; of their bytes, only headers are parsed."""

    def measure(position: int) -> ImageQuality:
        with open_header(dataset.read(images.rows["path"].iloc[position])) as header:
            return ImageQuality.take(header, images.pixels[position], read_jpeg_quality(header))

    return [measure(position) for position in range(len(images))]


def load_seen(
    dataset: Dataset,
    split: str,
    size: int,
    holdout: Sequence[str],
    on_progress: Progress | None = None,
    decode: Decode = "now",
) -> Images:
    """Return a split without the sources that are held out.

    Raises:
        ConfigurationError: if a source to hold out is not in the data set, or no source is left.
    """
    images = load_images(dataset, split, size, on_progress, "now" if holdout else decode)  # else none would be kept
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
