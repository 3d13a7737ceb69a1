"""An archive's index is made in shards: of some thousand files each, in order of names, the rows as a Parquet file.

A shard's file is named by all that its rows follow from: archive, label rule and format (the index's name), and the
range. It appears whole, so that the next run goes on where one was killed. Once the index is there, they are removed.

Where the store is at a URL, a node of a cluster needs nothing on its disk: it reads Kaggle's archives at the URL by
range, and writes its shards there. Their names end in the SHA-256 of the bytes: one that is not whole does not count,
and no other marker is needed.
"""

import contextlib
import hashlib
import logging
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from deepfake_core.data.archive import Archive, ArchiveReader
from deepfake_core.data.members import UNREADABLE, Member
from deepfake_core.errors import ArchiveError, ConfigurationError, CredentialsError, DownloadError, SourceError
from deepfake_core.storage.files import MAX_WRITING_SECONDS, remove_folder, translate_disk_errors, write_beside
from deepfake_core.storage.objects import open_objects
from deepfake_core.storage.ranges import RangeFile
from deepfake_core.storage.store import Store

log = logging.getLogger(__name__)

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
        """Write the rows' file into the folder that `cut_shards` made; without it, to the URL.

        Raises:
            SourceError: if there is no URL, and this machine does not see the folder.
        """
        data = rows.to_parquet(index=False, compression=None, use_dictionary=False, write_statistics=False)
        if self.file.parent.is_dir():
            _write(self.file, data)
        elif self.store.url:
            with _name_machine():
                self.store.write(self.file.with_stem(f"{self.file.stem}-{hashlib.sha256(data).hexdigest()}"), data)
        else:
            raise SourceError(
                "Each machine that writes shards must see the data folder at the same path. Received: "
                f"{socket.gethostname()}, which has no {self.file.parent}. Put `data.data_dir` on a disk that all "
                "nodes of `data.cluster` share, or make it a URL."
            )

    def fetch(self, name: str) -> None:
        """Bring the rows' file to this disk from an object of that name, unless that is not whole."""
        sha256 = name.removesuffix(".parquet").rpartition("-")[2]
        data = self.store.read(self.file.with_name(name))
        if data is not None and hashlib.sha256(data).hexdigest() == sha256:
            _write(self.file, data)
        else:
            log.warning("%s is not whole: made again", self.store.address_of(self.file.with_name(name)))


def _write(file: Path, data: bytes) -> None:
    with write_beside(file) as beside:
        beside.write_bytes(data)


@contextlib.contextmanager
def _name_machine() -> Iterator[None]:
    """Say of a store's errors on which machine they are met: each node has credentials and a network of its own."""
    try:
        yield
    except (ConfigurationError, CredentialsError, DownloadError) as exc:
        raise type(exc)(f"on {socket.gethostname()}: {exc}") from None


def is_whole(file: Path) -> bool:
    """Whether rows of an index are on disk, and none is of a file that could not be read then."""
    return file.is_file() and not pd.read_parquet(file, columns=["reason"])["reason"].eq(UNREADABLE).any()


def cut_shards(archive: Archive, store: Store, index: str, size: int) -> list[Shard]:
    """Return the shards of an archive, `size` files each; the last has the rest.

    Those that are finished at the URL are brought to this disk.
    """
    count = len(open_members(archive, store)[1])
    with translate_disk_errors(store.shards(index)):
        store.shards(index).mkdir(parents=True, exist_ok=True)
    starts = range(0, max(count, 1), size)
    shards = [Shard(archive, store, index, start, min(start + size, count)) for start in starts]
    finished = store.list_names(store.shards(index)) if store.url else []
    by_name = {shard.file.stem: shard for shard in shards}
    for name in finished:
        shard = by_name.get(name.rpartition("-")[0])
        if shard and not shard.is_done:
            shard.fetch(name)
    return shards


def remove_shards(store: Store, index: str) -> None:
    """Remove the shards of an index, on this disk and at the URL."""
    remove_folder(store.shards(index))
    if store.url:
        open_objects(store.address_of(store.shards(index))).remove_below("")


def list_abandoned(store: Store) -> list[str]:
    """Return the indexes of which there are shards at the URL, and none was added for a day."""
    objects = open_objects(store.address_of(store.indexes()))
    found: dict[str, list[str]] = {}
    for name in objects.scan():
        if match := re.match(r"\.(.+)\.partial/", name):
            found.setdefault(match[1], []).append(name)
    return [index for index, names in found.items() if min(map(objects.measure_age, names)) > MAX_WRITING_SECONDS]


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
def open_members(archive: Archive, store: Store) -> tuple[ArchiveReader, list[Member]]:
    """Open an archive; return its reader, and its members in order of names. `open_members.cache_clear` closes it.

    One that is not on this disk is read at the URL, if it was shared there.

    Raises:
        SourceError: if this machine does not have it.
        ArchiveError: if it is not what it was when it was hashed.
        ConfigurationError, CredentialsError, DownloadError: if this machine can't read from the URL; they name it.
    """
    remedy = "Run again: it is indexed anew."
    if archive.path.exists():
        reader = archive.open()
        found = sum(member.size for member in reader.members) if archive.path.is_dir() else archive.path.stat().st_size
    elif store.url and not archive.source.is_local:
        shared = store.archives(archive.source.name) / archive.path.name
        marker = store.address_of(shared.with_suffix(".json"))
        remedy = f"Delete {marker} and run `prepare` again: it is published again."
        with _name_machine():
            file = RangeFile(store.address_of(shared))
            reader, found = ArchiveReader(file), file.size
    else:
        raise SourceError(
            f"Each machine that reads an archive must have it at the same path. Received: {socket.gethostname()}, "
            f"which has no {archive.path}. Put sources and `data.data_dir` on a disk that all nodes of "
            "`data.cluster` share."
        )
    if found != archive.bytes:
        raise ArchiveError(
            f"An archive must not change during a run. {reader.place} had {archive.bytes:,} bytes, now it has "
            f"{found:,}. {remedy}"
        )
    return reader, sorted(reader.members, key=lambda member: member.name)
