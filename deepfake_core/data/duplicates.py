"""Copies, edits and neighbours: which pictures belong together, and which copy is kept."""

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from deepfake_core.data.groups import find_components, find_repeated, join_groups
from deepfake_core.data.hashes import VIEWS
from deepfake_core.data.index import find_newest_index
from deepfake_core.data.likeness import measure_pairs
from deepfake_core.data.neighbours import find_neighbours
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
from deepfake_core.data.reported_images import WHOLE_IMAGE, find_linkable, find_whole_images, link_faces
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


def find_or_read_links(indexes: Sequence[Path], store: Store) -> pd.DataFrame:
    """Return what `find_links` does; of pictures that were searched before, read it from the store.

    Each search is kept as a table of its links, and of a row per picture with its fingerprint as `image` and no
    `other`. The next search is for the pictures whose fingerprints are not in the newest table.

    Args:
        indexes: Parquet files of the image indexes of all sources.
    """
    read = read_files(indexes)
    pictures = list_pictures(read)
    content = hashlib.sha256(pictures.fingerprints.tobytes()).hexdigest()[:16]
    prefix = f"near copies-v{LINKS_FORMAT}-"
    kept = store.indexes() / f"{prefix}{content}.parquet"
    if kept.exists():
        log.info("%d pictures: unchanged, their near copies are on disk already", len(pictures))
        return pd.read_parquet(kept, filters=[("other", "!=", "")])
    before = find_newest_index(store, prefix)
    folder = store.shards("near copies")
    remove_folder(folder)  # left by a run that was killed: the lock is ours
    with translate_disk_errors(folder):
        folder.mkdir(parents=True)
        try:
            looks = lay_out(pictures, read, folder)
            links, lasting = _search(pictures, looks, before)
        finally:
            remove_folder(folder)
    with write_beside(kept) as beside:
        _write_links(beside, links, pictures.fingerprints[: len(pictures) if lasting else 0])
    return links


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
    with tempfile.TemporaryDirectory() as folder:
        return _search(pictures, lay_out(pictures, read, Path(folder)))[0]


def _search(pictures: Pictures, looks: Looks, before: Path | None = None) -> tuple[pd.DataFrame, bool]:
    """Return the links of pictures, and whether a search of these and other pictures finds them again.

    Args:
        before: a kept table of another search, whose links are taken over.
    """
    stand_in = pictures.stand_in
    new = np.ones(len(pictures), bool) if before is None else ~_find_known(pictures, before)
    own = np.arange(len(pictures))
    stand_ins = np.flatnonzero(stand_in == own)
    near = find_neighbours(looks.hashes, MAX_HASH_DISTANCE_BITS, None if new.all() else new[stand_ins])
    if not (near.lasting or new.all()):
        return _search(pictures, looks)

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


def mark_duplicates(index: pd.DataFrame, links: pd.DataFrame) -> pd.DataFrame:
    """Name the group of each usable image, and decide which images are kept.

    Groups are the connected components of the links. Inside a group, of the images of one label that show the same
    picture the largest is kept (pixels, then bytes, then the source listed first, then the member's name). Other
    near copies are all kept, and so are images of different labels: an edit and its source belong to the most valuable
    pairs there are. Only where the same bytes have both labels, both are dropped: one label is wrong.

    Args:
        index: image indexes of all sources, concatenated in the order of `data.sources`.
        links: from `find_links`.

    Returns:
        The same rows without `hash` and `thumbnail`, with `group` (its smallest SHA-256), `kept` (bool), `copy_of`
        (SHA-256 of the image kept instead), and `reason` filled in: `kept`, `duplicate` (same bytes), `copy` (same
        picture), `label_conflict`, `whole_image` (only its face is used, which has its links), or what the index said.
    """
    rows = index.drop(columns=["hash", "thumbnail"], errors="ignore").reset_index(drop=True)
    rows.loc[find_whole_images(rows) & (rows["reason"] == ""), "reason"] = WHOLE_IMAGE
    usable = rows["reason"] == ""
    links = link_faces(rows[usable & find_linkable(rows, links)], links)
    rows["group"] = rows["sha256"].where(usable, "")
    rows["copy_of"] = ""
    rows.loc[usable, "reason"] = "kept"
    is_several = find_repeated(rows["sha256"]) | rows["sha256"].isin(pd.concat([links["image"], links["other"]]))
    several = rows[usable & is_several]  # all others are alone, and kept
    order = {source: position for position, source in enumerate(dict.fromkeys(index["source"]))}
    ranked = several.assign(rank=several["source"].map(order), pixels=several["width"] * several["height"])
    ranked = ranked.sort_values(
        ["pixels", "bytes", "rank", "member"], ascending=[False, False, True, True], kind="stable"
    )
    conflicting = ranked.groupby("sha256")["label"].transform("nunique") > 1
    names = pd.Index(sorted(set(several["sha256"])))
    ranked["picture"] = _find_same_pictures(names, links, ranked[~conflicting])[names.get_indexer(ranked["sha256"])]
    candidates = ranked[~conflicting]
    best = candidates.groupby("picture")["sha256"].transform("first")
    again = candidates.index[candidates.duplicated("picture")]
    count = int((usable & ~is_several).sum()) + len(names)
    group = names[join_groups(links, names, count)]
    rows.loc[several.index, "group"] = group[names.get_indexer(several["sha256"])]
    rows.loc[again, "copy_of"] = best[again]
    rows.loc[again, "reason"] = np.where(rows.loc[again, "sha256"] == best[again], "duplicate", "copy")
    rows.loc[ranked.index[conflicting], "reason"] = "label_conflict"
    rows["kept"] = rows["reason"] == "kept"
    counts = rows.loc[usable, "reason"].value_counts().sort_index()
    kept_groups = rows.loc[several.index].query("kept").groupby("group").size()
    log.info(
        "%d usable images: %s; %d groups of more than one kept image, the largest of %d",
        int(usable.sum()),
        ", ".join(f"{count} {name}" for name, count in counts.items()),
        int((kept_groups > 1).sum()),
        int(kept_groups.max() if len(kept_groups) else rows["kept"].any()),
    )
    return rows


def _find_same_pictures(names: pd.Index, links: pd.DataFrame, rows: pd.DataFrame) -> np.ndarray:
    """Number the pictures: images of one label that are linked as the same picture share a number."""
    label = rows.drop_duplicates("sha256").set_index("sha256")["label"]
    same = links[links["same_picture"].astype(bool)]
    one, other = same["image"].map(label), same["other"].map(label)
    return find_components(names, same[one.notna() & (one == other)])
