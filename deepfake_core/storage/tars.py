"""Images in tars of some thousand each, as WebDataset reads them, with an index to read one by its place.

WebDataset (github.com/webdataset/webdataset) takes files that follow each other and share a name up to the first dot
for one sample: here an image, and `cls`, its label as a digit.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from deepfake_core.config import CLASS_NAMES
from deepfake_core.detector import MAX_BYTES
from deepfake_core.errors import ArchiveError
from deepfake_core.storage.files import write_beside

PLACES = "shards.parquet"
"""The index of a folder's tars."""

TAR_NAME = re.compile(r"[a-z]+/\d{6}\.tar")
TAR_IMAGES = 10_000

PATH_BYTES = 96
"""Longer than any image's path; of a longer one in an index, the rest is cut, so that it is no image's."""

HEADER_BYTES = 512
BYTES_BESIDE = 4 * HEADER_BYTES
"""What a tar takes at most for an image besides its bytes: two headers, the label, and what fills the last block."""


class Place(NamedTuple):
    """Where an image's bytes are: in which tar, from which byte on, and how many."""

    path: str
    tar: str
    offset: int
    bytes: int


class Places:
    """Reads images of a folder by their paths. Threads may share it: nothing of it changes.

    Raises:
        ArchiveError: if the index can't be read, or names what is no tar of the folder, or one that ends too early.
    """

    def __init__(self, folder: Path) -> None:
        rule = f"{folder / PLACES} must list the images in tars, each once"
        try:
            rows = pd.read_parquet(folder / PLACES, columns=list(Place._fields))
            paths, tars = (
                rows["path"].to_numpy(object).astype(f"S{PATH_BYTES}"),
                pd.Categorical(rows["tar"].astype(str)),
            )
            offsets, sizes = (rows[column].astype("int64").to_numpy() for column in ("offset", "bytes"))
        except (OSError, ValueError, TypeError, OverflowError) as exc:
            raise ArchiveError(
                f"{rule}. Received: a file that can't be read ({exc}). Publish the images again."
            ) from exc
        order = np.argsort(paths)
        paths, codes, offsets, sizes = paths[order], tars.codes[order], offsets[order], sizes[order]
        odd = [name for name in tars.categories if not TAR_NAME.fullmatch(name)]
        is_odd = (codes < 0) | (offsets < 0) | (offsets + sizes < offsets) | (sizes > MAX_BYTES)
        if odd or is_odd.any() or (paths[1:] == paths[:-1]).any():
            raise ArchiveError(
                f"{rule}, in at most {MAX_BYTES:,} bytes each. Received: another list {odd[:1] or ''}. "
                "Publish the images again."
            )
        self._folder, self._paths = folder, paths
        self._tars, self._names, self._offsets, self._bytes = codes, list(tars.categories), offsets, sizes
        self._check_sizes()

    @property
    def paths(self) -> list[str]:
        return [path.decode() for path in self._paths]

    @property
    def tars(self) -> list[str]:
        return self._names

    def read(self, path: str) -> bytes:
        """Return an image's bytes.

        Raises:
            ArchiveError: if there is no such image, or the tar ends before it does.
            OSError: if the tar can't be read.
        """
        wanted = np.array(path.encode(), self._paths.dtype)  # of another width, all paths would be converted
        number = int(np.searchsorted(self._paths, wanted))
        if number == len(self._paths) or self._paths[number] != path.encode():
            raise ArchiveError(f"{self._folder / PLACES} must list each image. Received: none at {path}.")
        file, size = self._folder / self._names[self._tars[number]], int(self._bytes[number])
        with file.open("rb") as tar:
            tar.seek(self._offsets[number])
            data = tar.read(size)
        if len(data) != size:
            raise self._describe_damage(file, number)
        return data

    def _check_sizes(self) -> None:
        ends = pd.Series(self._offsets).add(self._bytes)
        last = ends.groupby(self._tars).idxmax()
        for code, number in zip(last.index.tolist(), last.tolist(), strict=True):
            file = self._folder / self._names[code]
            if not file.is_file() or file.stat().st_size < ends[number]:
                raise self._describe_damage(file, number)

    def _describe_damage(self, file: Path, number: int) -> ArchiveError:
        found = f"which ends within {self._paths[number].decode()}" if file.is_file() else "which is missing"
        return ArchiveError(
            f"A tar must hold what {PLACES} says. Received: {file}, {found}. Remove the data set and run `prepare` "
            "again."
        )


def write_tars(folder: Path, split: str, images: Iterable[tuple[str, bytes]]) -> Iterator[Place]:
    """Write a split's images in their order; yield the place of each once it is written.

    Args:
        images: paths, as split/label/SHA-256.suffix, and bytes. One is held at a time.
    """
    images, number = iter(images), 0
    while first := next(images, None):
        name = f"{split}/{number:06}.tar"
        with (
            (folder / name).open("wb") as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for path, data in chain([first], islice(images, TAR_IMAGES - 1)):
                _, label, image = path.split("/")
                place = Place(path, name, file.tell() + HEADER_BYTES, len(data))
                _add(tar, image, data)
                _add(tar, f"{image.partition('.')[0]}.cls", str(CLASS_NAMES.index(label)).encode())
                yield place
        number += 1


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # a fixed date and owner: same images, same bytes
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_places(folder: Path, places: Iterable[Place]) -> None:
    with write_beside(folder / PLACES) as beside:
        pd.DataFrame(places, columns=list(Place._fields)).to_parquet(beside, index=False)


def check_tars(folder: Path, members: Mapping[str, str]) -> None:
    """Verify that a folder's tars hold exactly these images.

    Args:
        members: paths, each with the SHA-256 of its bytes, or "" if it is not known.

    Raises:
        ArchiveError: if they don't.
    """
    places = Places(folder)
    if odd := set(places.paths) ^ members.keys():
        raise ArchiveError(
            f"{folder / PLACES} must list the images of the manifest, each once. Received: {min(odd)} in one alone. "
            "Nothing was taken over; publish the data set again."
        )
    for path, sha256 in members.items():
        received = hashlib.sha256(places.read(path)).hexdigest()
        if sha256 and received != sha256:
            raise ArchiveError(
                f"An image must have the bytes that the manifest names. Received: {path} in a tar of {folder} with the "
                f"SHA-256 {received}. Remove the data set and run `prepare` again."
            )
