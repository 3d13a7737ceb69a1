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

import pandas as pd

from deepfake_core.config import CLASS_NAMES
from deepfake_core.detector import MAX_BYTES
from deepfake_core.errors import ArchiveError
from deepfake_core.storage.files import write_beside

PLACES = "shards.parquet"
"""The index of a folder's tars."""

TAR_NAME = re.compile(r"[a-z]+/\d{6}\.tar")
TAR_IMAGES = 10_000

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
    """Reads images of a folder by their paths.

    Raises:
        ArchiveError: if the index can't be read, or names a file that is no tar of the folder.
    """

    def __init__(self, folder: Path) -> None:
        rule = f"{folder / PLACES} must list the images in tars, each once"
        try:
            rows = pd.read_parquet(folder / PLACES, columns=list(Place._fields))
        except (OSError, ValueError) as exc:
            raise ArchiveError(
                f"{rule}. Received: a file that can't be read ({exc}). Publish the images again."
            ) from exc
        tars = rows["tar"].astype("category")
        odd = [name for name in tars.cat.categories if not TAR_NAME.fullmatch(str(name))]
        if (
            odd
            or not rows["path"].is_unique
            or not rows["bytes"].between(0, MAX_BYTES).all()
            or (rows["offset"] < 0).any()
        ):
            raise ArchiveError(
                f"{rule}, in at most {MAX_BYTES:,} bytes each. Received: another list {odd[:1] or ''}. "
                "Publish the images again."
            )
        self._folder, self.paths = folder, pd.Index(rows["path"])
        self._tars, self._names = tars.cat.codes.to_numpy(), list(tars.cat.categories)
        self._offsets, self._bytes = rows["offset"].to_numpy(), rows["bytes"].to_numpy()

    @property
    def tars(self) -> list[str]:
        return self._names

    def read(self, path: str) -> bytes:
        """Return an image's bytes.

        Raises:
            ArchiveError: if there is no such image, or the tar ends before it does.
        """
        try:
            number = self.paths.get_loc(path)
        except KeyError:
            raise ArchiveError(f"{self._folder / PLACES} must list each image. Received: none at {path}.") from None
        file, wanted = self._folder / self._names[self._tars[number]], int(self._bytes[number])
        with file.open("rb") as tar:
            tar.seek(self._offsets[number])
            data = tar.read(wanted)
        if len(data) != wanted:
            raise ArchiveError(
                f"A tar must hold what {PLACES} says. Received: {file}, which ends within {path}. Remove the data set "
                "and run `prepare` again."
            )
        return data


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
