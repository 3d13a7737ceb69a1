"""The distinct pictures of image indexes: what the search for near copies needs of them, read a batch at a time.

Thumbnails and the hashes of all views (1.2 kB a picture) are in files of a folder, of which the search reads the pages
that it needs. In memory are 100 bytes a picture.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepfake_core.data.hashes import HASH_BYTES, THUMBNAIL_SIZE, VIEWS, hash_thumbnails
from deepfake_core.storage.files import remove_folder, require_space

MIN_CONTRAST_GREYS = 8
"""Grey levels between the darkest and the brightest of a thumbnail; the hash of an even picture is noise."""

ROWS_AT_ONCE = 4096
THUMBNAIL_BYTES = THUMBNAIL_SIZE**2

Read = Callable[[list[str]], Iterator[pa.RecordBatch]]
"""Gives some columns of image indexes, a batch of rows at a time; each call begins anew."""


@dataclass(frozen=True)
class Pictures:
    """The usable pictures that are not even, ordered by SHA-256.

    Of pictures with equal hashes, the first stands for all. A pair's link depends on nothing but the fingerprint of
    both (but see `find_neighbours`).

    Attributes:
        digests: SHA-256 of each picture's bytes, uint8 of shape (n, 32).
        stand_in: position of the picture that stands for each, int of shape (n,).
        fingerprints: uint8 of shape (n, 16).
        row: of each picture, among the usable rows in the order in which they are read.
    """

    digests: np.ndarray
    stand_in: np.ndarray
    fingerprints: np.ndarray
    row: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    @property
    def stands(self) -> np.ndarray:
        """Positions of the pictures that stand for themselves."""
        return np.flatnonzero(self.stand_in == np.arange(len(self)))

    def name(self, positions: np.ndarray) -> list[str]:
        """Return the SHA-256 of some pictures, in hex."""
        return list_hex(self.digests[positions])

    def find(self, names: Iterable[str]) -> np.ndarray:
        """Return the position of each SHA-256 in hex, or -1."""
        wanted = np.frombuffer(bytes.fromhex("".join(names)), np.uint8).reshape(-1, 32)
        order, first = sort_rows(np.concatenate([self.digests, wanted]))  # those of pictures come first
        found = np.empty(len(order), np.int64)
        found[order] = order[first][np.cumsum(first) - 1]
        return np.where(found < len(self), found, -1)[len(self) :]


@dataclass(frozen=True)
class Looks:
    """What pictures look like, mapped from files.

    Attributes:
        place: of each picture among the folder's thumbnails, int of shape (n,).
        hashes: uint8 of shape (views, m, 32), of the pictures that stand for themselves.
    """

    place: np.ndarray
    hashes: np.ndarray


def read_files(files: Sequence[Path]) -> Read:
    """Read image indexes from Parquet files."""

    def read(columns: list[str]) -> Iterator[pa.RecordBatch]:
        for file in files:
            with pq.ParquetFile(file, pre_buffer=False) as table:  # else all that was read stays in memory
                yield from table.iter_batches(ROWS_AT_ONCE, columns=columns)

    return read


def read_frame(index: pd.DataFrame) -> Read:
    """Read an image index that is in memory."""
    return lambda columns: iter(pa.Table.from_pandas(index[columns], preserve_index=False).to_batches(ROWS_AT_ONCE))


def list_pictures(read: Read) -> Pictures:
    """Find the distinct pictures among the usable rows of image indexes."""
    parts = [np.empty((0, 81), np.uint8)]
    for batch in _keep_usable(read, ["sha256", "hash", "thumbnail"]):
        names, bits, thumbnails = (column.to_pylist() for column in batch.columns)
        greys = _stack(thumbnails, THUMBNAIL_BYTES)
        has_contrast = greys.max(1) - greys.min(1) >= MIN_CONTRAST_GREYS
        looks = [hashlib.sha256(b"".join(each)).digest()[:16] for each in zip(thumbnails, bits, strict=True)]
        columns = (_stack([bytes.fromhex(name) for name in names], 32), _stack(bits, HASH_BYTES), _stack(looks, 16))
        parts.append(np.concatenate([*columns, has_contrast[:, None]], axis=1, dtype=np.uint8))
    found = np.concatenate(parts)
    parts.clear()
    order, first = sort_rows(np.ascontiguousarray(found[:, :32]))
    row = order[first]  # the first of equal ones: the sort is stable
    row = row[found[row, -1] != 0]
    found = found[row]
    order, first = sort_rows(np.ascontiguousarray(found[:, 32:64]))
    stand_in = np.empty(len(row), np.int64)
    stand_in[order] = order[first][np.cumsum(first) - 1]
    fingerprints = np.empty((len(row), 16), np.uint8)
    for start in range(0, len(row), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        facts = _list_bytes(np.concatenate([found[part, :32], found[stand_in[part], :32], found[part, 64:80]], axis=1))
        fingerprints[part] = _stack([hashlib.sha256(each).digest()[:16] for each in facts], 16)
    return Pictures(np.ascontiguousarray(found[:, :32]), stand_in, fingerprints, row)


def lay_out(pictures: Pictures, read: Read, folder: Path) -> Looks:
    """Write thumbnails and hashes of pictures into a folder, unless they are there from a run that was killed later.

    Args:
        read: what `list_pictures` had.

    Raises:
        DiskError: if they do not fit on the disk.
    """
    by_row = np.argsort(pictures.row)
    place = np.empty(len(pictures), np.int64)
    place[by_row] = np.arange(len(pictures))
    if not (whole := folder / "whole").exists():
        remove_folder(folder)
        folder.mkdir(parents=True)
        _write_looks(pictures, by_row, read, folder)
        whole.touch()
    return Looks(place, map_hashes(folder))


def map_thumbnails(folder: Path) -> np.ndarray:
    """Return the thumbnails that `lay_out` wrote, uint8 of shape (n, 32, 32)."""
    return _map(folder / "thumbnails").reshape(-1, THUMBNAIL_SIZE, THUMBNAIL_SIZE)


def map_hashes(folder: Path) -> np.ndarray:
    """Return the hashes that `lay_out` wrote, uint8 of shape (views, m, 32)."""
    return _map(folder / "hashes").reshape(len(VIEWS), -1, HASH_BYTES)


def _write_looks(pictures: Pictures, by_row: np.ndarray, read: Read, folder: Path) -> None:
    count = len(pictures)
    stands = pictures.stands
    needed = count * THUMBNAIL_BYTES + len(stands) * len(VIEWS) * HASH_BYTES
    require_space(folder, needed, f"The search for near copies in {folder}", "set `data.data_dir` to another disk")
    wanted = pictures.row[by_row]
    column = np.full(count, -1)  # of each picture's hash
    column[stands] = np.arange(len(stands))
    column = column[by_row]
    thumbnails = _map(folder / "thumbnails", count * THUMBNAIL_BYTES).reshape(count, THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    hashes = _map(folder / "hashes", len(VIEWS) * len(stands) * HASH_BYTES).reshape(len(VIEWS), -1, HASH_BYTES)
    begin = start = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in _keep_usable(read, ["thumbnail"]):
            stop = int(np.searchsorted(wanted, begin + len(batch)))
            rows, columns = wanted[start:stop] - begin, column[start:stop]
            greys = _stack(batch.column(0).take(pa.array(rows)).to_pylist(), THUMBNAIL_BYTES)
            thumbnails[start:stop] = greys = greys.reshape(-1, THUMBNAIL_SIZE, THUMBNAIL_SIZE)
            stands_here = columns >= 0
            found = pool.map(partial(hash_thumbnails, greys[stands_here]), VIEWS)
            for view, part in enumerate(found):
                hashes[view, columns[stands_here]] = part
            begin, start = begin + len(batch), stop


def list_hex(digests: np.ndarray) -> list[str]:
    """Return rows of bytes in hex."""
    return [one.hex() for one in _list_bytes(digests)]


def sort_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the stable order of rows of bytes (n, size), and whether each in that order is the first of equal ones."""
    words = rows.view(">u8").astype(np.uint64)
    order = np.lexsort(words.T[::-1])
    first = np.ones(len(rows), bool)
    first[1:] = (np.diff(words[order].view(np.int64), axis=0) != 0).any(1)
    return order, first


def _keep_usable(read: Read, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for batch in read(["reason", *columns]):
        yield batch.filter(pc.equal(batch.column(0), "")).select(columns)


def _map(file: Path, size: int | None = None) -> np.ndarray:
    """Return the bytes of a file as uint8 of shape (size,): of a new file of this size, or to read."""
    if size is not None:
        file.touch()
        os.truncate(file, size)
    mode: Literal["r", "r+"] = "r" if size is None else "r+"
    return np.asarray(np.memmap(file, np.uint8, mode)) if file.stat().st_size else np.empty(0, np.uint8)


def _stack(values: Sequence[bytes], size: int) -> np.ndarray:
    """Return bytes as uint8 of shape (rows, size)."""
    return np.frombuffer(b"".join(values), np.uint8).reshape(len(values), size)


def _list_bytes(rows: np.ndarray) -> list[bytes]:
    size, data = rows.shape[1], rows.tobytes()
    return [data[start : start + size] for start in range(0, len(data), size)]
