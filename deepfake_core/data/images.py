"""A split as arrays: decoded and resized once, kept on disk, read as a memory map."""

import logging
import os
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


def load_images(dataset: Dataset, split: str, size: int, on_progress: Progress | None = None) -> Images:
    """Return a split's images as a memory map; decode and resize them if no run has done so before.

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
    if not file.exists():
        with write_beside(file) as beside, write_beside(checksum) as line:
            _write_pixels(dataset, rows["path"].tolist(), size, beside, on_progress)
            line.write_text(f"{hash_file(beside)}  {file.name}\n")
        log.info("%s: %d images decoded at %d x %d", split, len(rows), size, size)
    return Images(np.load(file, mmap_mode="r", allow_pickle=False), labels, rows)


def _write_pixels(dataset: Dataset, paths: Sequence[str], size: int, file: Path, on_progress: Progress | None) -> None:
    shape = (len(paths), size, size, 3)
    require_space(file.parent, int(np.prod(shape)), str(file), "set `data.data_dir` to another disk")
    pixels = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    with file.open("r+b") as reserved:  # what does not fit later would end the process by SIGBUS
        os.posix_fallocate(reserved.fileno(), 0, file.stat().st_size)

    def fill(position: int) -> None:
        data = (dataset.path / paths[position]).read_bytes()
        with open_image(data) as image:
            pixels[position] = resize_image(image, size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, _ in enumerate(pool.map(fill, range(len(paths))), start=1):
            if on_progress and (done % 500 == 0 or done == len(paths)):
                on_progress(done, len(paths))
    pixels.flush()


def measure_files(images: Images, folder: Path) -> list[ImageQuality]:
    """Measure images, whose files lie in a data set's folder; of the files, only headers are read."""

    def measure(position: int) -> ImageQuality:
        with open_header((folder / images.rows["path"].iloc[position]).read_bytes()) as header:
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
