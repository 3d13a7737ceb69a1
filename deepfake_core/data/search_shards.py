"""The search for near copies among many runs in shards, on any machines that see the store's folder.

First some hash tables each, then some pairs of pictures each. A shard's file appears whole, so that the next run goes
on where one was killed.
"""

import hashlib
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepfake_core.data.hash_tables import choose_tables
from deepfake_core.data.likeness import measure_pairs
from deepfake_core.data.neighbours import Neighbours, Pairs, compare_tables, find_neighbours, is_among_many, join_pairs
from deepfake_core.data.pictures import map_hashes, map_thumbnails
from deepfake_core.errors import SourceError
from deepfake_core.storage.files import write_beside

TABLES_IN_SHARD, PAIRS_IN_SHARD = 100, 50_000
PAIR_COLUMNS = ("first", "second", "mirrored")


@dataclass(frozen=True)
class SearchShard(ABC):
    """What comes from `start` up to `stop` in a step of a search.

    Attributes:
        folder: holds the looks of pictures, and the shards' files.
    """

    folder: Path
    start: int
    stop: int

    @property
    @abstractmethod
    def file(self) -> Path:
        """The arrays that were found."""

    @abstractmethod
    def search(self, threads: int) -> dict[str, np.ndarray]:
        """Return the arrays that are found, by name."""

    def read(self) -> dict[str, np.ndarray]:
        with np.load(self.file) as found:
            return dict(found)


@dataclass(frozen=True)
class TableShard(SearchShard):
    """Hash tables, by their numbers, of a search within `radius` bits."""

    radius: int

    def __str__(self) -> str:
        return f"hash tables {self.start}-{self.stop}"

    @property
    def file(self) -> Path:
        return self.folder / f"tables-{self.start:04}-{self.stop:04}.npz"

    def search(self, threads: int) -> dict[str, np.ndarray]:
        found = compare_tables(map_hashes(self.folder), self.radius, range(self.start, self.stop), threads)
        return {"codes": found.codes, "fullest": np.array(found.fullest)}


@dataclass(frozen=True)
class PairShard(SearchShard):
    """Pairs of pictures, by their positions in the file `pairs`."""

    pairs: Path

    def __str__(self) -> str:
        return f"pairs {self.start}-{self.stop}"

    @property
    def file(self) -> Path:
        return self.folder / f"{self.pairs.stem}-{self.start:010}-{self.stop:010}.npz"

    def search(self, threads: int) -> dict[str, np.ndarray]:
        with np.load(self.pairs) as pairs:
            first, second, mirrored = (pairs[name][self.start : self.stop] for name in PAIR_COLUMNS)
        return {"measured": measure_pairs(map_thumbnails(self.folder), first, second, mirrored, threads)}


def search_shard(shard: SearchShard, threads: int) -> None:
    """Write what a shard finds, unless it is on disk.

    Raises:
        SourceError: if this machine does not see the folder.
    """
    if shard.file.exists():
        return
    if not shard.folder.is_dir():
        raise SourceError(
            "Each machine that searches near copies must see the data folder at the same path. Received: "
            f"{socket.gethostname()}, which has no {shard.folder}. Put `data.data_dir` on a disk that all nodes of "
            "`data.cluster` share."
        )
    _write(shard.file, shard.search(threads))


def _write(file: Path, arrays: dict[str, np.ndarray]) -> None:
    with write_beside(file) as beside, beside.open("wb") as opened:
        np.savez(opened, **arrays)  # type: ignore[arg-type] # names are not its own parameters


Run = Callable[[Sequence[SearchShard]], None]
"""Runs `search_shard` on each of some shards."""


def run_here(shards: Sequence[SearchShard]) -> None:
    """Search one shard after the other, with all cores."""
    for shard in shards:
        search_shard(shard, os.cpu_count() or 1)


def find_in_shards(folder: Path, radius: int, run: Run) -> Neighbours:
    """Return what `find_neighbours` does of the hashes in a folder; among many, shard by shard."""
    hashes = map_hashes(folder)
    views, count, _ = hashes.shape
    if not is_among_many(views, count):
        return find_neighbours(hashes, radius)
    tables, _ = choose_tables(count)
    starts = range(0, tables, TABLES_IN_SHARD)
    shards = [TableShard(folder, start, min(start + TABLES_IN_SHARD, tables), radius) for start in starts]
    found = _search_and_read(shards, run)
    return join_pairs([Pairs(part["codes"], int(part["fullest"])) for part in found], views, count)


def measure_in_shards(
    folder: Path, first: np.ndarray, second: np.ndarray, mirrored: np.ndarray, run: Run
) -> np.ndarray:
    """Return what `measure_pairs` does of the thumbnails in a folder; many pairs, shard by shard."""
    count = len(first)
    if count <= PAIRS_IN_SHARD:
        return measure_pairs(map_thumbnails(folder), first, second, mirrored)
    digest = hashlib.sha256(b"".join(column.tobytes() for column in (first, second, mirrored))).hexdigest()
    pairs = folder / f"pairs-{digest[:16]}.npz"
    _write(pairs, dict(zip(PAIR_COLUMNS, (first, second, mirrored), strict=True)))
    starts = range(0, count, PAIRS_IN_SHARD)
    shards = [PairShard(folder, start, min(start + PAIRS_IN_SHARD, count), pairs) for start in starts]
    return np.concatenate([part["measured"] for part in _search_and_read(shards, run)], axis=1)


def _search_and_read(shards: Sequence[SearchShard], run: Run) -> list[dict[str, np.ndarray]]:
    """Return what each shard found; only those that are not finished run."""
    run([shard for shard in shards if not shard.file.exists()])
    return [shard.read() for shard in shards]
