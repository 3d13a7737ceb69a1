"""The search among many pictures runs in shards, of some hash tables each, on any machines that see the store's folder.

A shard's file appears whole, so that the next run goes on where one was killed.
"""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepfake_core.data.hash_tables import choose_tables
from deepfake_core.data.neighbours import Neighbours, Pairs, compare_tables, find_neighbours, is_among_many, join_pairs
from deepfake_core.data.pictures import map_hashes
from deepfake_core.errors import SourceError
from deepfake_core.storage.files import write_beside

TABLES_IN_SHARD = 100


@dataclass(frozen=True)
class TableShard:
    """The hash tables from `start` up to `stop` of a search within `radius` bits.

    Attributes:
        folder: holds the hashes, and the shards' files.
    """

    folder: Path
    radius: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.start}-{self.stop}"

    @property
    def file(self) -> Path:
        return self.folder / f"{self.start:04}-{self.stop:04}.npz"

    def read(self) -> Pairs:
        with np.load(self.file) as found:
            return Pairs(found["codes"], int(found["fullest"]))


def search_shard(shard: TableShard, threads: int) -> None:
    """Write the pairs of pictures that a shard's tables find, unless they are on disk.

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
    found = compare_tables(map_hashes(shard.folder), shard.radius, range(shard.start, shard.stop), threads)
    with write_beside(shard.file) as beside, beside.open("wb") as file:
        np.savez(file, **found._asdict())


Run = Callable[[Sequence[TableShard]], None]
"""Runs `search_shard` on each of some shards."""


def run_here(shards: Sequence[TableShard]) -> None:
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
    shards = [TableShard(folder, radius, start, min(start + TABLES_IN_SHARD, tables)) for start in starts]
    run([shard for shard in shards if not shard.file.exists()])
    return join_pairs([shard.read() for shard in shards], views, count)
