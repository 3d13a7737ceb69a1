"""Copies, edits and neighbours: which pictures belong together, and which copy is kept."""

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import DisjointSet
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from deepfake_core.data.hashes import HASH_BYTES, THUMBNAIL_SIZE, VIEWS, hash_thumbnails
from deepfake_core.data.index import find_newest_index
from deepfake_core.data.likeness import measure_pairs
from deepfake_core.data.neighbours import find_neighbours
from deepfake_core.data.reported_images import WHOLE_IMAGE, find_whole_images, link_faces
from deepfake_core.storage.files import write_beside
from deepfake_core.storage.store import Store

log = logging.getLogger(__name__)

MAX_HASH_DISTANCE_BITS = 60
"""Candidates are pairs whose hashes are this near, in bits of 256. From 54 on, some are of different people."""

MIN_LIKENESS = 0.5
"""Share of windows that must agree in their details for a candidate to be a near copy; see `measure_likeness`."""

MAX_COPY_DIFFERENCE = 12.0
"""Grey levels by which a resized or recompressed copy may differ anywhere; see `measure_difference`."""

MIN_CONTRAST_GREYS = 8
"""Grey levels between the darkest and the brightest of a thumbnail; the hash of an even picture is noise."""

MAX_GROUP_IMAGES, MAX_GROUP_SHARE = 50, 0.02
"""A group grows to 50 pictures or to this share of all, whichever is more: chains of likenesses must not swallow a
class. The strongest links are taken first; copies of one picture are not limited."""

LINKS_FORMAT = 2
"""Part of the name under which links are kept: raise it when the same pictures would have other links."""

LINK_COLUMNS = ["image", "other", "distance", "likeness", "difference", "same_picture"]


def find_or_read_links(index: pd.DataFrame, store: Store) -> pd.DataFrame:
    """Return what `find_links` does; of pictures that were searched before, read it from the store.

    Each search is kept as a table of its links, and of a row per picture with its fingerprint as `image` and no
    `other`. The next search is for the pictures whose fingerprints are not in the newest table.
    """
    pictures = _list_pictures(index)
    content = hashlib.sha256("".join(pictures["fingerprint"]).encode()).hexdigest()[:16]
    prefix = f"near copies-v{LINKS_FORMAT}-"
    kept = store.indexes() / f"{prefix}{content}.parquet"
    if kept.exists():
        log.info("%d pictures: unchanged, their near copies are on disk already", len(pictures))
        table = pd.read_parquet(kept)
        return table[table["other"] != ""].reset_index(drop=True)
    before = find_newest_index(store, prefix)
    links, lasting = _search(pictures, pd.read_parquet(before) if before else None)
    searched = pictures["fingerprint"].iloc[: len(pictures) if lasting else 0]
    rows = pd.DataFrame({**dict.fromkeys(LINK_COLUMNS, 0), "image": searched, "other": ""}).astype(links.dtypes)
    with write_beside(kept) as beside:
        pd.concat([links, rows]).to_parquet(beside, index=False)
    return links


def find_links(index: pd.DataFrame) -> pd.DataFrame:
    """Find the pairs of near copies among the usable images: candidates from the hash, confirmed by a look at pixels.

    Args:
        index: image indexes of all sources, concatenated.

    Returns:
        One row per pair: `image` and `other` (SHA-256, the smaller first), `distance` (bits, through the nearest view),
        `likeness` (0 to 1), `difference` (grey levels) and `same_picture`. Independent of the order of rows.
    """
    return _search(_list_pictures(index))[0]


def _list_pictures(index: pd.DataFrame) -> pd.DataFrame:
    """Return the usable pictures that are not even, ordered by `sha256`.

    Of pictures with equal hashes, the first stands for all: `stand_in` is its position. A pair's link depends on
    nothing but the `fingerprint` of both (but see `find_neighbours`).
    """
    distinct = index.loc[index["reason"] == "", ["sha256", "thumbnail", "hash"]].drop_duplicates("sha256")
    thumbnails = _stack(distinct["thumbnail"], THUMBNAIL_SIZE**2)
    contrast = thumbnails.max(1) - thumbnails.min(1)
    pictures = distinct[contrast >= MIN_CONTRAST_GREYS].sort_values("sha256", ignore_index=True)
    hashes = _stack(pictures["hash"], HASH_BYTES)
    _, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    pictures["stand_in"] = first[inverse.ravel()]
    names = pictures["sha256"].to_numpy()
    columns = (names, names[pictures["stand_in"]], pictures["thumbnail"], pictures["hash"])
    pictures["fingerprint"] = [
        hashlib.sha256(f"{name} {stand_in}".encode() + thumbnail + bits).hexdigest()[:32]
        for name, stand_in, thumbnail, bits in zip(*columns, strict=True)
    ]
    return pictures


def _stack(column: pd.Series, size: int) -> np.ndarray:
    """Return bytes as uint8 of shape (rows, size)."""
    return np.frombuffer(b"".join(column), np.uint8).reshape(len(column), size)


def _search(pictures: pd.DataFrame, before: pd.DataFrame | None = None) -> tuple[pd.DataFrame, bool]:
    """Return the links of `_list_pictures`, and whether a search of these and other pictures finds them again.

    Args:
        before: a kept table of another search, whose links are taken over.
    """
    names, stand_in = pictures["sha256"].to_numpy(), pictures["stand_in"].to_numpy()
    new = np.ones(len(pictures), bool)
    if before is not None:
        new = ~pictures["fingerprint"].isin(before.loc[before["other"] == "", "image"]).to_numpy()
    thumbnails = _stack(pictures["thumbnail"], THUMBNAIL_SIZE**2).reshape(-1, THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    stand_ins = np.unique(stand_in)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = np.stack([*pool.map(lambda view: hash_thumbnails(thumbnails, view)[stand_ins], VIEWS)])
    near = find_neighbours(hashes, MAX_HASH_DISTANCE_BITS, None if new.all() else new[stand_ins])
    if not (near.lasting or new.all()):
        return _search(pictures)

    equal = np.flatnonzero((stand_in != np.arange(len(pictures))) & (new | new[stand_in]))
    image = np.concatenate([stand_ins[near.images], stand_in[equal]])
    other = np.concatenate([stand_ins[near.viewed], equal])
    mirrored = np.zeros(len(image), bool)
    mirrored[: len(near.views)] = np.array([view.mirrored for view in VIEWS])[near.views]
    distance = np.zeros(len(image), int)
    distance[: len(near.distances)] = near.distances

    likeness, difference = measure_pairs(thumbnails, image, other, mirrored)
    same = ~mirrored & (difference <= MAX_COPY_DIFFERENCE)
    columns = [names[image], names[other], distance, likeness, difference, same]
    links = pd.DataFrame(dict(zip(LINK_COLUMNS, columns, strict=True))).astype({"image": "str", "other": "str"})
    links = links[links["same_picture"] | (links["likeness"] >= MIN_LIKENESS)]
    if before is not None:
        stays = before["image"].isin(names[~new]) & before["other"].isin(names[~new])
        links = pd.concat([before[stays], links])
    log.info(
        "%d pictures, %d of them new: %d candidates of the new, %d near copies of all, %d of them the same picture",
        len(pictures),
        int(new.sum()),
        len(image),
        len(links),
        int(links["same_picture"].sum()),
    )
    return links.sort_values(["image", "other"], ignore_index=True), near.lasting


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
    usable = rows[rows["reason"] == ""]
    links = link_faces(usable, links)
    order = {source: position for position, source in enumerate(dict.fromkeys(index["source"]))}
    ranked = usable.assign(rank=usable["source"].map(order), pixels=usable["width"] * usable["height"])
    ranked = ranked.sort_values(
        ["pixels", "bytes", "rank", "member"], ascending=[False, False, True, True], kind="stable"
    )
    conflicting = ranked.groupby("sha256")["label"].transform("nunique") > 1
    names = pd.Index(sorted(set(usable["sha256"])))
    ranked["picture"] = _find_same_pictures(names, links, ranked[~conflicting])[names.get_indexer(ranked["sha256"])]
    candidates = ranked[~conflicting]
    best = candidates.groupby("picture")["sha256"].transform("first")
    again = candidates.index[candidates.duplicated("picture")]

    group = pd.Series(names[_join(links, names)], index=names)
    rows["group"] = rows["sha256"].where(rows["reason"] == "").map(group).astype(object).fillna("")
    rows["copy_of"] = best.reindex(again).reindex(rows.index).astype(object).fillna("")
    reason = rows["reason"].mask(rows["reason"] == "", "kept")
    reason[again] = np.where(rows.loc[again, "sha256"] == rows.loc[again, "copy_of"], "duplicate", "copy")
    reason[ranked.index[conflicting]] = "label_conflict"
    rows["reason"], rows["kept"] = reason, reason == "kept"
    counts = reason[usable.index].value_counts().sort_index()
    kept_groups = rows[rows["kept"]].groupby("group").size()
    log.info(
        "%d usable images: %s; %d groups of more than one kept image, the largest of %d",
        len(usable),
        ", ".join(f"{count} {name}" for name, count in counts.items()),
        int((kept_groups > 1).sum()),
        int(kept_groups.max()) if len(kept_groups) else 0,
    )
    return rows


def _find_same_pictures(names: pd.Index, links: pd.DataFrame, rows: pd.DataFrame) -> np.ndarray:
    """Number the pictures: images of one label that are linked as the same picture share a number."""
    label = rows.drop_duplicates("sha256").set_index("sha256")["label"]
    same = links[links["same_picture"].astype(bool)]
    one, other = same["image"].map(label), same["other"].map(label)
    return find_components(names, same[one.notna() & (one == other)])


def find_ends(names: pd.Index, links: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions in `names` of both ends of each link."""
    return names.get_indexer(pd.Index(links["image"])), names.get_indexer(pd.Index(links["other"]))


def find_components(names: pd.Index, links: pd.DataFrame) -> np.ndarray:
    """Number the connected components of `links` between images; returns int of shape (len(names),)."""
    graph = coo_array((np.ones(len(links), bool), find_ends(names, links)), shape=(len(names), len(names)))
    return connected_components(graph, directed=False)[1]


def _join(links: pd.DataFrame, names: pd.Index) -> np.ndarray:
    """Join linked images, strongest links first, to groups of limited size (Kruskal 1956).

    Returns:
        Position in `names` of the first member of each image's group.
    """
    most = max(MAX_GROUP_IMAGES, int(MAX_GROUP_SHARE * len(names)))
    strongest = links.sort_values(
        ["same_picture", "likeness", "distance", "image", "other"], ascending=[False, False, True, True, True]
    )
    images, others = (ends.tolist() for ends in find_ends(names, strongest))
    groups, cut = DisjointSet([*images, *others]), 0  # of the linked images: all others are groups of their own
    for image, other, same in zip(images, others, strongest["same_picture"], strict=True):
        if groups.connected(image, other):
            continue
        if not same and groups.subset_size(image) + groups.subset_size(other) > most:
            cut += 1
            continue
        groups.merge(image, other)
    if cut:
        log.warning("%d near copies were left in groups of their own: a group may hold %d pictures", cut, most)
    first = np.arange(len(names))
    for group in groups.subsets():
        first[list(group)] = min(group)
    return first
