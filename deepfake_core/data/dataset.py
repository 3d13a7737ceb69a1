"""A data set: a split folder that was published, its manifest, and its version, which is made from its content."""

import contextlib
import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from deepfake_core.config import CLASS_NAMES, DEFAULT_CACHE_GB, SPLITS, Normalisation
from deepfake_core.data.split_memory import share_memory
from deepfake_core.errors import ArchiveError, DatasetError
from deepfake_core.storage.files import translate_disk_errors
from deepfake_core.storage.progress import Progress
from deepfake_core.storage.shared_folder import fetch_folder, publish_folder
from deepfake_core.storage.store import Store, locate_dataset
from deepfake_core.storage.tars import PLACES, Places

VERSION = re.compile(r"[0-9a-f]{16}")

SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}

NORMAL_PIXELS, NORMAL_QUALITY = 256, 90
"""Side and JPEG quality of all images where `normalise` is `reencode`."""

LINES_AT_ONCE = 100_000
"""Of what a version is the hash of."""


@dataclass(frozen=True)
class Dataset:
    """A published split folder: images, each a file or in tars, `manifest.parquet` and `dataset.json`.

    Attributes:
        path: the folder on this disk.
        store: what it belongs to.
    """

    path: Path
    store: Store

    @property
    def address(self) -> str:
        """Where other machines find it: a URL, or the folder where nothing is shared."""
        return self.store.address_of(self.path)

    @cached_property
    def description(self) -> dict[str, Any]:
        return json.loads((self.path / "dataset.json").read_text())

    @property
    def version(self) -> str:
        return self.description["version"]

    @property
    def splits(self) -> dict[str, dict[str, int]]:
        """The number of real and fake images of each split; an empty regression set is no split."""
        return self.description["counts"]["splits"]

    @property
    def cache_gb(self) -> float:
        """What the decoded pixels at one input size may take on the disk."""
        return self.description["parameters"].get("cache_gb", DEFAULT_CACHE_GB)  # former data sets have none

    @property
    def is_drawn(self) -> bool:
        """Whether any image is drawn, so that metrics say nothing about real faces."""
        return any(source["drawn"] for source in self.description["sources"])

    @property
    def source_names(self) -> list[str]:
        """The sources, each with its Kaggle version, or the SHA-256 of a local one."""
        return [
            f"{source['name']}@{source['kaggle_version'] or source['archive_sha256']}"
            for source in self.description["sources"]
        ]

    def list_sources(self) -> list[str]:
        """Return the short names of the sources that images were kept of, in order."""
        return sorted(set(self.manifest.loc[self.manifest["kept"], "source"]))

    @cached_property
    def manifest(self) -> pd.DataFrame:
        return pd.read_parquet(self.path / "manifest.parquet")

    @cached_property
    def published_ns(self) -> int:
        """When the manifest was written, after all images: nanoseconds since 1970."""
        return (self.path / "manifest.parquet").stat().st_mtime_ns

    @property
    def has_files(self) -> bool:
        """Whether each image is a file of its own."""
        return not (self.path / PLACES).exists()

    @cached_property
    def _places(self) -> Places | None:
        return None if self.has_files else Places(self.path)

    def read(self, path: str) -> bytes:
        """Return an image's bytes, by its `path` in the manifest, whatever the layout. Threads may call it.

        Raises:
            OSError: if its file can't be read.
            ArchiveError: if its tar is damaged.
        """
        return self._places.read(path) if self._places else (self.path / path).read_bytes()

    def link(self, path: str, size: int, folder: Path) -> bool:
        """Give an image's file a second name, the same path in another folder, so that it takes no room again.

        Args:
            size: bytes that the image has, where it was not encoded again.

        Returns:
            Whether it is there now. It is not if it is no image of this data set, if it was changed since this was
            published, or if the disk has no hard links.
        """
        with contextlib.suppress(OSError):
            found = os.lstat(f"{self.path}/{path}")
            is_whole = found.st_size == size or self.description["parameters"]["normalise"] != "none"
            if stat.S_ISREG(found.st_mode) and is_whole and found.st_mtime_ns <= self.published_ns:
                os.link(f"{self.path}/{path}", folder / path)
                return True
        return False

    @property
    def report(self) -> Path:
        """The page that says what the data set holds."""
        return self.path / "report.html"

    def split(self, name: str) -> pd.DataFrame:
        """Return the rows of one split's images, ordered by SHA-256."""
        manifest = self.manifest
        return manifest[manifest["kept"] & (manifest["split"] == name)].sort_values("sha256", ignore_index=True)


def list_datasets(store: Store) -> list[Dataset]:
    """Return the data sets that are published on this disk, the one that was last asked for at the end."""
    folders = [path.parent for path in store.splits().glob("*/dataset.json") if VERSION.fullmatch(path.parent.name)]
    folders.sort(key=lambda folder: (folder.stat().st_mtime_ns, folder.name))
    return [Dataset(folder, store) for folder in folders]


def open_dataset(address: str | Path, on_progress: Progress | None = None) -> Dataset:
    """Open a published split folder; of a URL, fetch it to this disk unless it is here.

    Raises:
        DatasetError: if there is none.
        ArchiveError: if what is fetched is damaged.
    """
    store, path = locate_dataset(address)
    if not store.url:
        if not (path / "dataset.json").is_file() or not (path / "manifest.parquet").is_file():
            raise DatasetError(
                "A data set must be a folder that the prepare flow published, with dataset.json and manifest.parquet. "
                f"Received: {path}. Run `prepare`, or check that this machine shares the data folder."
            )
        return Dataset(path, store)
    if not VERSION.fullmatch(path.name) or not fetch_folder(
        store, path, lambda folder: _list_images(Dataset(folder, store), path.name), on_progress
    ):
        raise DatasetError(
            "A data set must be one that the prepare flow published whole, at <data_dir>/splits/<dataset version>. "
            f"Received: {address}. Run `prepare` again: it publishes what is missing."
        )
    return Dataset(path, store)


def share_dataset(dataset: Dataset, on_progress: Progress | None = None) -> None:
    """Publish a data set, and the splits that this machine remembers, for other machines. Its store is at a URL."""
    with translate_disk_errors(dataset.path):
        share_memory(dataset.store)
        publish_folder(dataset.store, dataset.path, _list_images(dataset, dataset.version), on_progress)


def hash_content(manifest: pd.DataFrame, normalise: Normalisation) -> str:
    """Return a data set's version: a hash of every kept image's bytes, label and split, and of `normalise`."""
    rows = pa.Table.from_pandas(manifest[["sha256", "label", "split"]], preserve_index=False)
    order = pc.sort_indices(rows, [(name, "ascending") for name in rows.column_names]).to_numpy()
    order = order[manifest["kept"].to_numpy(bool)[order]]
    digest, between = hashlib.sha256(), b""
    for start in range(0, len(order), LINES_AT_ONCE):
        part = rows.take(order[start : start + LINES_AT_ONCE])
        lines = map(" ".join, zip(*(column.to_pylist() for column in part.columns), strict=True))
        digest.update(between + "\n".join(lines).encode())
        between = b"\n"
    if normalise != "none":
        digest.update(between + f"{normalise} {NORMAL_PIXELS} {NORMAL_QUALITY}".encode())
    return digest.hexdigest()[:16]


def _list_images(dataset: Dataset, version: str) -> dict[str, str]:
    """Return a data set's images: path, and SHA-256 of the bytes, or "" where they were encoded again.

    Raises:
        ArchiveError: if the manifest does not hold the images that the version is the hash of, or leads elsewhere.
    """
    try:
        normalise = dataset.description["parameters"]["normalise"]
        kept = dataset.manifest[dataset.manifest["kept"]]
        stem = kept["split"] + "/" + kept["label"] + "/" + kept["sha256"]
        pattern = rf"({'|'.join(SPLITS)})/({'|'.join(CLASS_NAMES)})/[0-9a-f]{{64}}({'|'.join(SUFFIXES.values())})"
        in_place = kept["path"].str.fullmatch(pattern) & (kept["path"].str.rsplit(".", n=1).str[0] == stem)
        is_right = hash_content(kept, normalise) == dataset.version == version and bool(in_place.all())
    except (KeyError, TypeError, ValueError) as exc:
        raise ArchiveError(f"A data set must have a readable manifest. Received: {version} ({exc!r}).") from exc
    if not is_right:
        raise ArchiveError(
            "A manifest must list the images that its version is the hash of, as split/label/SHA-256. Received: "
            f"another one for {version}. Nothing was taken over; remove that data set and run `prepare` again."
        )
    return dict(zip(kept["path"], kept["sha256"] if normalise == "none" else [""] * len(kept), strict=True))
