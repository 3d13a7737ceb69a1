"""Which pictures are near copies of each other: links, kept between runs, so that only new ones are searched for."""

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from deepfake_core.data.hash_tables import TABLE_BITS, choose_tables
from deepfake_core.data.hashes import VIEWS
from deepfake_core.data.index import find_newest_index
from deepfake_core.data.neighbours import find_new_neighbours
from deepfake_core.data.pictures import (
    ROWS_AT_ONCE,
    Looks,
    Pictures,
    lay_out,
    list_hex,
    list_pictures,
    read_files,
    read_frame,
    sort_rows,
)
from deepfake_core.data.search_shards import Run, find_in_shards, measure_in_shards, run_here
from deepfake_core.storage.files import remove_folder, translate_disk_errors, write_beside
from deepfake_core.storage.progress import Progress
from deepfake_core.storage.store import Store

log = logging.getLogger(__name__)

MAX_HASH_DISTANCE_BITS = 60
"""Candidates are pairs whose hashes are this near, in bits of 256. From 54 on, some are of different people."""

MIN_LIKENESS = 0.5
"""Share of windows that must agree in their details for a candidate to be a near copy; see `measure_likeness`."""

MAX_COPY_DIFFERENCE = 12.0
"""Grey levels by which a resized or recompressed copy may differ anywhere; see `measure_difference`."""

LINKS_FORMAT = 4
"""Part of the name under which links are kept: raise it when the same pictures would have other links."""

LINK_COLUMNS = ["image", "other", "distance", "likeness", "difference", "same_picture"]

MAX_SHARE_NEW = 0.03
"""Share of the pictures that may be new where only new ones are compared with all. From there on, to search all anew is
as quick among ten million."""

FULLEST = b"fullest"
"""In the metadata of a table of links: whole pictures in the fullest bucket of its search."""


def find_or_read_links(
    indexes: Sequence[Path], store: Store, run: Run = run_here, on_progress: Progress | None = None
) -> pd.DataFrame:
    """Return what `find_links` does; of pictures that were searched before, read it from the store.

    Each search is kept as a table of its links, and of a row per picture with its fingerprint as `image` and no
    `other`. The next search is for the pictures whose fingerprints are not in the newest table.

    Args:
        indexes: Parquet files of the image indexes of all sources.
        run: runs the shards of a search among many.
        on_progress: where only new pictures are searched.
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
        links, fullest = _search(pictures, looks, find_newest_index(store, prefix), folder, run, on_progress)
    with write_beside(kept) as beside:
        _write_links(beside, links, fullest, pictures.fingerprints)
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


def _search(
    pictures: Pictures, looks: Looks, before: Path | None, folder: Path, run: Run, on_progress: Progress | None = None
) -> tuple[pd.DataFrame, int]:
    """Return the links of pictures, and how many whole pictures the fullest bucket of the search holds.

    Args:
        before: a kept table of another search, whose links are taken over.
        folder: where `looks` are.
    """
    stand_in, stand_ins = pictures.stand_in, pictures.stands
    own = np.arange(len(pictures))
    near = None
    if before is not None and (new := ~_find_known(pictures, before)).mean() <= MAX_SHARE_NEW:
        fullest = int(pq.read_schema(before).metadata[FULLEST])
        near = find_new_neighbours(looks.hashes, MAX_HASH_DISTANCE_BITS, new[stand_ins], fullest, on_progress)
    if near is None:
        before, new = None, np.ones(len(pictures), bool)
        near = find_in_shards(folder, MAX_HASH_DISTANCE_BITS, run)

    equal = np.flatnonzero((stand_in != own) & (new | new[stand_in]))
    image = np.concatenate([stand_ins[near.images], stand_in[equal]])
    other = np.concatenate([stand_ins[near.viewed], equal])
    mirrored = np.zeros(len(image), bool)
    mirrored[: len(near.views)] = np.array([view.mirrored for view in VIEWS])[near.views]
    distance = np.zeros(len(image), int)
    distance[: len(near.distances)] = near.distances

    likeness, difference = measure_in_shards(folder, looks.place[image], looks.place[other], mirrored, run)
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
    return links.sort_values(["image", "other"], ignore_index=True), near.fullest


def _write_links(file: Path, links: pd.DataFrame, fullest: int, searched: np.ndarray) -> None:
    """Write a table of links, and of the fingerprints of all pictures that were searched."""
    table = pa.Table.from_pandas(links, preserve_index=False)
    schema = table.schema.with_metadata({**(table.schema.metadata or {}), FULLEST: str(fullest)})
    with pq.ParquetWriter(file, schema) as writer:
        writer.write_table(table.cast(schema))
        for start in range(0, len(searched), ROWS_AT_ONCE):
            rows = pd.DataFrame({**dict.fromkeys(LINK_COLUMNS, 0), "image": list_hex(searched[start:][:ROWS_AT_ONCE])})
            rows = rows.assign(other="").astype(links.dtypes)
            writer.write_table(pa.Table.from_pandas(rows, schema=schema, preserve_index=False))


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
