"""An archive's index is made in shards: of some thousand files each, in order of names, the rows as a Parquet file.

A shard's file is named by all that its rows follow from: archive, label rule and format (the index's name), and the
range. It appears whole, so that the next run goes on where one was killed. Once the index is there, they are removed.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from deepfake_core.data.archive import Archive, ArchiveReader
from deepfake_core.data.members import UNREADABLE, Member
from deepfake_core.errors import ArchiveError, SourceError
from deepfake_core.storage.files import translate_disk_errors, write_beside
from deepfake_core.storage.store import Store

ROWS_IN_GROUP = 10_000
"""Rows of an index's file that are read at once, 11 MB."""


@dataclass(frozen=True)
class Shard:
    """The files from `start` up to `stop` of an archive, in order of names; `index` names what they are a part of."""

    archive: Archive
    store: Store
    index: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.archive.source.short_name} {self.start}-{self.stop}"

    @property
    def file(self) -> Path:
        return self.store.shards(self.index) / f"{self.start:010}-{self.stop:010}.parquet"

    @property
    def is_done(self) -> bool:
        return is_whole(self.file)

    def write(self, rows: pd.DataFrame) -> None:
        """Write the rows' file into the folder that `cut_shards` made.

        Raises:
            SourceError: if this machine does not see it.
        """
        if not self.file.parent.is_dir():
            raise SourceError(
                "Each machine that writes shards must see the data folder at the same path. Received: "
                f"{socket.gethostname()}, which has no {self.file.parent}. Put `data.data_dir` on a disk that all "
                "nodes of `data.cluster` share."
            )
        with write_beside(self.file) as beside:
            rows.to_parquet(beside, index=False, compression=None, use_dictionary=False, write_statistics=False)


def is_whole(file: Path) -> bool:
    """Whether rows of an index are on disk, and none is of a file that could not be read then."""
    return file.is_file() and not pd.read_parquet(file, columns=["reason"])["reason"].eq(UNREADABLE).any()


def cut_shards(archive: Archive, store: Store, index: str, size: int) -> list[Shard]:
    """Return the shards of an archive, `size` files each; the last has the rest."""
    count = len(open_members(archive)[1])
    with translate_disk_errors(store.shards(index)):
        store.shards(index).mkdir(parents=True, exist_ok=True)
    return [Shard(archive, store, index, start, min(start + size, count)) for start in range(0, max(count, 1), size)]


def join_shards(shards: Sequence[Shard], file: Path) -> None:
    """Write the rows of an archive's shards into one Parquet file, as if they had never been apart.

    It is written and read in groups of rows, so that thumbnails of few are in memory.
    """
    waiting = pq.read_schema(shards[0].file).remove_metadata().empty_table()
    with pq.ParquetWriter(file, waiting.schema) as writer:
        for shard in shards:
            waiting = pa.concat_tables([waiting, pq.read_table(shard.file).cast(waiting.schema)])
            while len(waiting) >= ROWS_IN_GROUP:
                writer.write_table(waiting.slice(0, ROWS_IN_GROUP).combine_chunks())
                waiting = waiting.slice(ROWS_IN_GROUP)
        if len(waiting):
            writer.write_table(waiting.combine_chunks())


@lru_cache(maxsize=2)  # one that ends and one that begins; to list a large archive takes seconds
def open_members(archive: Archive) -> tuple[ArchiveReader, list[Member]]:
    """Open an archive; return its reader, and its members in order of names. `open_members.cache_clear` closes it.

    Raises:
        SourceError: if this machine does not have it.
        ArchiveError: if it is not what it was when it was hashed.
    """
    if not archive.path.exists():
        raise SourceError(
            f"Each machine that reads an archive must have it at the same path. Received: {socket.gethostname()}, "
            f"which has no {archive.path}. Put sources and `data.data_dir` on a disk that all nodes of "
            "`data.cluster` share."
        )
    reader = archive.open()
    found = sum(member.size for member in reader.members) if archive.path.is_dir() else archive.path.stat().st_size
    if found != archive.bytes:
        raise ArchiveError(
            f"An archive must not change during a run. {archive.path} had {archive.bytes:,} bytes, now it has "
            f"{found:,}. Run again: it is indexed anew."
        )
    return reader, sorted(reader.members, key=lambda member: member.name)
