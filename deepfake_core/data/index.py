"""An archive becomes an image index: one row per file, read straight from the zip.

Each image is read and decoded once, and gives everything that later stages ask of it. Columns:

- `source, member`: where it is; `sha256`: of its bytes; `label`: real or fake, by its folder;
- `width, height`: in pixels, upright; `bytes`: size of the file; `format`: JPEG, PNG or WEBP;
- `jpeg_table`: the quantisation tables' name, with the quality that libjpeg would call them; empty if no JPEG;
- `reason`: empty for images that can be used, and says why not for all other files, each of which has a row;
- `thumbnail`: 32 x 32 grey pixels (1,024 bytes), and `hash`: 256 bits made from it (32 bytes), see `hashes`.
"""

import contextlib
import hashlib
import logging
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepfake_core.config import Source
from deepfake_core.data.archive import Archive, ArchiveReader
from deepfake_core.data.contents import Content, Contents, decode, shrink_and_hash
from deepfake_core.data.labels import check_csv_files, check_labels, name_label
from deepfake_core.data.members import UNREADABLE, Member
from deepfake_core.data.shards import Shard, cut_shards, is_whole, join_shards, open_members, remove_shards
from deepfake_core.decoding import MAX_BYTES, MemoryBudget
from deepfake_core.errors import ArchiveError
from deepfake_core.storage.files import write_beside
from deepfake_core.storage.progress import Progress
from deepfake_core.storage.ranges import RangeFile
from deepfake_core.storage.store import Store

log = logging.getLogger(__name__)

INDEX_FORMAT = 5
"""Part of the cache's name: raise it when the same archive would give another index."""

SHARD_SIZE = 10_000
"""Files of an archive whose rows are written at once."""

DECODED_AT_ONCE = 128
"""Images that are in memory before they are shrunk, of 256 x 256 pixels at most."""

READERS = 8
"""Threads for each core that read at a URL: they wait for the network more than they decode."""

READING = MemoryBudget(2 * MAX_BYTES)
"""Memory of files from when they are read until they are decoded; `DECODING` is asked for after it, never before."""

OPENING = threading.Lock()
"""Of two shards that begin at once, one lists the archive and reads the last index, and the other uses it too."""

INDEX_COLUMNS = ["source", "member", "sha256", "label", *Content._fields]


FACTS = [column for column in INDEX_COLUMNS if column not in ("hash", "thumbnail")]
"""What stages after the search for near copies ask of an index: all but the pictures, which are 1.1 kB a row."""


REPEATED = ["source", "format", "jpeg_table"]
"""Facts of few values, which are read as categories."""


def build_index(archive: Archive, store: Store, on_progress: Progress | None = None) -> pd.DataFrame:
    """Return an archive's whole index, pictures included: for few images. See `write_index`."""
    return pd.read_parquet(write_index(archive, store, on_progress))


def read_facts(indexes: Sequence[Path]) -> pd.DataFrame:
    """Return the rows of image indexes, without the pictures.

    Each column is one array: to take some rows of one in chunks, Arrow joins all chunks first.
    """
    columns: dict[str, pa.ChunkedArray] = {}
    for name in FACTS:
        repeated = [name] if name in REPEATED else []
        parts = [pq.read_table(file, columns=[name], pre_buffer=False, read_dictionary=repeated) for file in indexes]
        whole = pa.concat_tables(part.replace_schema_metadata() for part in parts).unify_dictionaries()
        columns[name] = whole.column(name).combine_chunks()
    return pa.table(columns).to_pandas()


def write_index(archive: Archive, store: Store, on_progress: Progress | None = None) -> Path:
    """Describe every file of an archive; an archive that was indexed before is not read again,
    unless a file could not be read. Shards that are finished are not made again.

    Of a changed archive, only images whose bytes were not in the source's last index are decoded.

    Returns:
        The Parquet file, with one row per file of the archive, ordered by member name. See the module for the columns.

    Raises:
        DatasetError: if no image has a label, or a csv file and the folders disagree on one.
        ArchiveError: if the archive was replaced meanwhile.
    """
    source, name = archive.source, name_index(archive)
    if is_whole(file := _place_index(name, store)):
        remove_shards(store, name)  # which a run left that was killed at its very end
        log.info("%s: unchanged, its index is on disk already", source.short_name)
        return file
    try:
        shards = cut_shards(archive, store, name, SHARD_SIZE)
        for shard in shards:
            index_shard(shard, os.cpu_count() or 1, on_progress)
        try:
            archive.require_unchanged()
        except ArchiveError:
            remove_shards(store, name)  # they may hold other images than those that the name stands for
            raise
        index = read_facts([shard.file for shard in shards])
        reader, members = open_members(archive, store)
        check_labels(source, index, members)
        if source.csv_real_label is not None:
            check_csv_files(source, reader, index)
        new = set(index["sha256"]) - _read_contents(find_newest_index(store, _begin_name(source))).keys() - {""}
    finally:
        open_members.cache_clear()
        _read_contents.cache_clear()
    with write_beside(file) as beside:
        join_shards(shards, beside)
    remove_shards(store, name)
    unusable = index.loc[index["reason"] != "", "reason"].value_counts().to_dict()
    log.info(
        "%s: %d files, %d decoded now (others are copies, or were known), %d usable images, left out: %s",
        source.short_name,
        len(index),
        len(new),
        int((index["reason"] == "").sum()),
        unusable or "none",
    )
    return file


def list_shards(archives: Sequence[Archive], store: Store) -> list[Shard]:
    """Return the shards that are still to be made of the archives that have several.

    `build_index` makes what there is left to do.
    """
    missing: list[Shard] = []
    for archive in archives:
        name = name_index(archive)
        if not is_whole(_place_index(name, store)):
            shards = cut_shards(archive, store, name, SHARD_SIZE)
            missing += [shard for shard in shards if len(shards) > 1 and not shard.is_done]
    return missing


def index_shard(shard: Shard, threads: int, on_progress: Progress | None = None) -> None:
    """Write a shard's rows, unless they are on disk.

    On a node of a cluster, where the store is at a URL, the rows are written there, and an archive that is not on its
    disk is read there.

    Raises:
        DeepfakeError: that names the shard.
    """
    if shard.is_done:
        return
    source = shard.archive.source
    with OPENING:
        reader, all_members = open_members(shard.archive, shard.store)
        known = dict(_read_contents(find_newest_index(shard.store, _begin_name(source))))
    threads *= READERS if isinstance(reader.place, RangeFile) else 1
    members = all_members[shard.start : shard.stop]
    size = max(DECODED_AT_ONCE, len(members) // (16 * threads))
    parts = [members[start : start + size] for start in range(0, len(members), size)]
    rows: list[tuple] = []
    with ThreadPoolExecutor(threads) as pool:
        for part in pool.map(lambda part: index_members(source, reader, part, known), parts):
            rows += part
            if on_progress:
                on_progress(shard.start + len(rows), len(all_members))
    types = {"width": "int32", "height": "int32", "bytes": "int64"}
    shard.write(pd.DataFrame(rows, columns=INDEX_COLUMNS).astype(types))


def name_index(archive: Archive) -> str:
    """Return the name of an archive's index, by all that it follows from."""
    rule = archive.source.model_dump_json(include={"real_folder", "fake_folder", "csv_real_label", "follow_links"})
    key = hashlib.sha256(f"{archive.sha256} {rule}".encode()).hexdigest()[:16]
    return f"{_begin_name(archive.source)}{key}"


def _begin_name(source: Source) -> str:
    """Return what the names of a source's indexes begin with."""
    return f"{source.short_name}-v{INDEX_FORMAT}-"


def _place_index(name: str, store: Store) -> Path:
    return store.indexes() / f"{name}.parquet"


def find_newest_index(store: Store, prefix: str) -> Path | None:
    """Return the table of a name and format that was written last; `prefix` is both."""
    name = re.compile(re.escape(prefix) + r"[0-9a-f]{16}\.parquet")
    indexes = [path for path in store.indexes().glob("*.parquet") if name.fullmatch(path.name)]
    return max(indexes, key=os.path.getmtime, default=None)


@lru_cache(maxsize=2)
def _read_contents(index: Path | None) -> Contents:
    """Return what an earlier index of the source knows, whatever its labels."""
    if index is None:
        return {}
    table = pq.read_table(index, columns=["sha256", *Content._fields])
    table = table.filter((pc.field("sha256") != "") & (pc.field("reason") != "no_label"))
    digests, *facts = (column.to_pylist() for column in table.columns)
    return dict(zip(digests, map(Content._make, zip(*facts, strict=True)), strict=True))


def index_members(source: Source, reader: ArchiveReader, members: Sequence[Member], known: Contents) -> list[tuple]:
    """Describe some members: a pure function of the archive and their names.

    Args:
        known: saves time only: images whose bytes are known are not decoded again. Receives those that were.
    """
    rows: list[tuple] = []
    name = source.short_name
    name_folder = cache(lambda folder: name_label(source, folder))
    for start in range(0, len(members), DECODED_AT_ONCE):
        part = members[start : start + DECODED_AT_ONCE]
        digests, new = [], {}
        for member in part:
            with READING.hold(member.size):
                data = _read(reader, member)
                digests.append("" if data is None else hashlib.sha256(data).hexdigest())
                if data is not None and digests[-1] not in known and digests[-1] not in new:
                    new[digests[-1]] = decode(data)
        known |= shrink_and_hash(new)
        for member, digest in zip(part, digests, strict=True):
            content = known[digest] if digest else Content(reason=member.problem or UNREADABLE)
            label = name_folder(member.name.rpartition("/")[0])
            if not label and not content.reason:
                content = content._replace(reason="no_label")
            rows.append((name, member.name, digest, label, *content))
    return rows


def _read(reader: ArchiveReader, member: Member) -> bytes | None:
    with contextlib.suppress(OSError):  # of a folder's file, which is gone or can't be read
        return None if member.problem else reader.read(member)
    return None
