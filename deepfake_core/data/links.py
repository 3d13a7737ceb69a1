"""Which pictures are near copies of each other: links, kept between runs, so that only new pictures are searched for.

The search among many runs in shards, of some hash tables each, on any machines that see the store's folder. A shard's
file appears whole, so that the next run goes on where one was killed.
"""

import hashlib
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from deepfake_core.data.hash_tables import TABLE_BITS, choose_tables
from deepfake_core.data.hashes import VIEWS
from deepfake_core.data.index import find_newest_index
from deepfake_core.data.likeness import measure_pairs
from deepfake_core.data.neighbours import Neighbours, Pairs, compare_tables, find_neighbours, is_among_many, join_pairs
from deepfake_core.data.pictures import (
    ROWS_AT_ONCE,
    Looks,
    Pictures,
    lay_out,
    list_hex,
    list_pictures,
    map_hashes,
    read_files,
    read_frame,
    sort_rows,
)
from deepfake_core.errors import SourceError
from deepfake_core.storage.files import remove_folder, translate_disk_errors, write_beside
from deepfake_core.storage.store import Store

log = logging.getLogger(__name__)

MAX_HASH_DISTANCE_BITS = 60
"""Candidates are pairs whose hashes are this near, in bits of 256. From 54 on, some are of different people."""

MIN_LIKENESS = 0.5
"""Share of windows that must agree in their details for a candidate to be a near copy; see `measure_likeness`."""

MAX_COPY_DIFFERENCE = 12.0
"""Grey levels by which a resized or recompressed copy may differ anywhere; see `measure_difference`."""

LINKS_FORMAT = 3
"""Part of the name under which links are kept: raise it when the same pictures would have other links."""

LINK_COLUMNS = ["image", "other", "distance", "likeness", "difference", "same_picture"]

TABLES_IN_SHARD = 100


@dataclass(frozen=True)
class TableShard:
    """The hash tables from `start` up to `stop` of a search, whose shards are in `folder`."""

    folder: Path
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.start}-{self.stop}"

    @property
    def file(self) -> Path:
        return self.folder / f"{self.start:04}-{self.stop:04}.npz"

    def read(self) -> Pairs:
        with np.load(self.file) as found:
            return Pairs(found["codes"], bool(found["complete"]))


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
    hashes, new = map_hashes(shard.folder.parent), np.load(shard.folder / "new.npy")
    tables = range(shard.start, shard.stop)
    found = compare_tables(hashes, MAX_HASH_DISTANCE_BITS, tables, None if new.all() else new, threads)
    with write_beside(shard.file) as beside, beside.open("wb") as file:
        np.savez(file, **found._asdict())


Run = Callable[[Sequence[TableShard]], None]
"""Runs `search_shard` on each of some shards."""


def run_here(shards: Sequence[TableShard]) -> None:
    """Search one shard after the other, with all cores."""
    for shard in shards:
        search_shard(shard, os.cpu_count() or 1)


def find_or_read_links(indexes: Sequence[Path], store: Store, run: Run = run_here) -> pd.DataFrame:
    """Return what `find_links` does; of pictures that were searched before, read it from the store.

    Each search is kept as a table of its links, and of a row per picture with its fingerprint as `image` and no
    `other`. The next search is for the pictures whose fingerprints are not in the newest table.

    Args:
        indexes: Parquet files of the image indexes of all sources.
        run: runs the shards of a search among many.
    """
    read = read_files(indexes)
    pictures = list_pictures(read)
    content = hashlib.sha256(pictures.fingerprints.tobytes()).hexdigest()[:16]
    _, bits = choose_tables(len(pictures.stands))
    name = "near copies" if bits == TABLE_BITS else f"near copies by {bits} bits"  # other pairs may be found then
    prefix = f"{name}-v{LINKS_FORMAT}-"
    kept = store.indexes() / f"{prefix}{content}.parquet"
    folder = store.shards(kept.stem)
    if kept.exists():
        _remove_searches(store)
        log.info("%d pictures: unchanged, their near copies are on disk already", len(pictures))
        return pd.read_parquet(kept, filters=[("other", "!=", "")])
    _remove_searches(store, but=folder)
    with translate_disk_errors(folder):
        looks = lay_out(pictures, read, folder)
        links, lasting = _search(pictures, looks, find_newest_index(store, prefix), folder, run)
    with write_beside(kept) as beside:
        _write_links(beside, links, pictures.fingerprints[: len(pictures) if lasting else 0])
    remove_folder(folder)
    return links


def _remove_searches(store: Store, but: Path | None = None) -> None:
    """Remove what searches left that were killed, of which no other pictures can make use."""
    for folder in store.indexes().glob(store.shards("near copies*").name):
        if folder != but:
            remove_folder(folder)


def find_links(index: pd.DataFrame) -> pd.DataFrame:
    """Find the pairs of near copies among the usable images: candidates from the hash, confirmed by a look at pixels.

    Args:
        index: image indexes of all sources, concatenated.

    Returns:
        One row per pair: `image` and `other` (SHA-256, the smaller first), `distance` (bits, through the nearest view),
        `likeness` (0 to 1), `difference` (grey levels) and `same_picture`. Independent of the order of rows.
    """
    read = read_frame(index)
    pictures = list_pictures(read)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "search"
        return _search(pictures, lay_out(pictures, read, folder), None, folder, run_here)[0]


def _search(pictures: Pictures, looks: Looks, before: Path | None, folder: Path, run: Run) -> tuple[pd.DataFrame, bool]:
    """Return the links of pictures, and whether a search of these and other pictures finds them again.

    Args:
        before: a kept table of another search, whose links are taken over.
        folder: where `looks` are.
    """
    stand_in = pictures.stand_in
    new = np.ones(len(pictures), bool) if before is None else ~_find_known(pictures, before)
    own = np.arange(len(pictures))
    stand_ins = pictures.stands
    parts = folder / ("all" if before is None else before.stem)
    near = _find_near(looks.hashes, new[stand_ins], parts, run)
    if not (near.lasting or new.all()):
        return _search(pictures, looks, None, folder, run)

    equal = np.flatnonzero((stand_in != own) & (new | new[stand_in]))
    image = np.concatenate([stand_ins[near.images], stand_in[equal]])
    other = np.concatenate([stand_ins[near.viewed], equal])
    mirrored = np.zeros(len(image), bool)
    mirrored[: len(near.views)] = np.array([view.mirrored for view in VIEWS])[near.views]
    distance = np.zeros(len(image), int)
    distance[: len(near.distances)] = near.distances

    likeness, difference = measure_pairs(looks.thumbnails, looks.place[image], looks.place[other], mirrored)
    same = ~mirrored & (difference <= MAX_COPY_DIFFERENCE)
    linked = np.flatnonzero(same | (likeness >= MIN_LIKENESS))
    names = (pd.Series(pictures.name(each[linked]), dtype="str") for each in (image, other))
    columns = [*names, *(each[linked] for each in (distance, likeness, difference, same))]
    links = pd.DataFrame(dict(zip(LINK_COLUMNS, columns, strict=True)))
    if before is not None:
        links = pd.concat([_take_over(before, pictures, new), links])
    log.info(
        "%d pictures, %d of them new: %d candidates of the new, %d near copies of all, %d of them the same picture",
        len(pictures),
        int(new.sum()),
        len(image),
        len(links),
        int(links["same_picture"].sum()),
    )
    return links.sort_values(["image", "other"], ignore_index=True), near.lasting


def _find_near(hashes: np.ndarray, new: np.ndarray, parts: Path, run: Run) -> Neighbours:
    """Return what `find_neighbours` does; among many, by shards whose files are in a folder of their own."""
    views, count, _ = hashes.shape
    if not is_among_many(views, count):
        return find_neighbours(hashes, MAX_HASH_DISTANCE_BITS)
    parts.mkdir(exist_ok=True)
    with write_beside(parts / "new.npy") as beside, beside.open("wb") as file:
        np.save(file, new)
    tables, _ = choose_tables(count)
    starts = range(0, tables, TABLES_IN_SHARD)
    shards = [TableShard(parts, start, min(start + TABLES_IN_SHARD, tables)) for start in starts]
    run([shard for shard in shards if not shard.file.exists()])
    return join_pairs([shard.read() for shard in shards], views, count)


def _write_links(file: Path, links: pd.DataFrame, searched: np.ndarray) -> None:
    """Write a table of links, and of the fingerprints of all pictures that were searched."""
    table = pa.Table.from_pandas(links, preserve_index=False)
    with pq.ParquetWriter(file, table.schema) as writer:
        writer.write_table(table)
        for start in range(0, len(searched), ROWS_AT_ONCE):
            rows = pd.DataFrame({**dict.fromkeys(LINK_COLUMNS, 0), "image": list_hex(searched[start:][:ROWS_AT_ONCE])})
            rows = rows.assign(other="").astype(links.dtypes)
            writer.write_table(pa.Table.from_pandas(rows, schema=table.schema, preserve_index=False))


def _find_known(pictures: Pictures, before: Path) -> np.ndarray:
    """Return whether each picture was in the search whose table `before` is; bool of shape (n,)."""
    searched = pq.read_table(before, columns=["image"], filters=[("other", "=", "")]).column("image")
    known = np.frombuffer(bytes.fromhex("".join(searched.to_pylist())), np.uint8).reshape(-1, 16)
    order, first = sort_rows(np.concatenate([known, pictures.fingerprints]))  # those known come first
    is_known = np.empty(len(order), bool)
    is_known[order] = (order[first] < len(known))[np.cumsum(first) - 1]
    return is_known[len(known) :]


def _take_over(before: Path, pictures: Pictures, new: np.ndarray) -> pd.DataFrame:
    """Return the links of another search between pictures that are not new."""
    links = pd.read_parquet(before, filters=[("other", "!=", "")])
    ends = [pictures.find(links[end]) for end in ("image", "other")]
    stays = np.logical_and(*((end >= 0) & ~new[end] for end in ends))
    return links[stays]
