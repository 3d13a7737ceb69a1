"""Links between images make groups: connected components, or groups of limited size."""

import logging

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy.cluster.hierarchy import DisjointSet
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

log = logging.getLogger(__name__)

NAMES_AT_ONCE = 10_000

MAX_GROUP_IMAGES, MAX_GROUP_SHARE = 50, 0.02
"""A group grows to 50 pictures or to this share of all, whichever is more: chains of likenesses must not swallow a
class. The strongest links are taken first; copies of one picture are not limited."""


def find_repeated(names: pd.Series) -> np.ndarray:
    """Return whether each name occurs several times, bool of shape (len(names),); true of a few others too.

    Names become objects of Python some at a time: a SHA-256 takes 72 bytes in Arrow's memory, 113 as an object.
    """
    hashes = np.empty(len(names), np.int64)
    for start in range(0, len(names), NAMES_AT_ONCE):
        part = names.iloc[start : start + NAMES_AT_ONCE].tolist()
        hashes[start : start + len(part)] = [hash(name) for name in part]
    ordered = np.sort(hashes)
    return np.isin(hashes, ordered[1:][ordered[1:] == ordered[:-1]])


def replace_some(values: pd.Series, positions: pd.Index, others: pd.Series) -> pd.Series:
    """Return text with that at some positions, in order, replaced; nothing but the result takes memory."""
    mask = np.zeros(len(values), bool)
    mask[positions] = True
    text = (pa.array(each.astype("str")) for each in (values, others))
    whole, some = (each.combine_chunks() if isinstance(each, pa.ChunkedArray) else each for each in text)
    return pc.replace_with_mask(whole, pa.array(mask), some).to_pandas()


def find_ends(names: pd.Index, links: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions in `names` of both ends of each link."""
    return names.get_indexer(pd.Index(links["image"])), names.get_indexer(pd.Index(links["other"]))


def find_components(names: pd.Index, links: pd.DataFrame) -> np.ndarray:
    """Number the connected components of `links` between images; returns int of shape (len(names),)."""
    graph = coo_array((np.ones(len(links), bool), find_ends(names, links)), shape=(len(names), len(names)))
    return connected_components(graph, directed=False)[1]


def join_groups(links: pd.DataFrame, names: pd.Index, count: int) -> np.ndarray:
    """Join linked images, strongest links first, to groups of limited size (Kruskal 1956).

    Args:
        names: of the images that may be linked, sorted.
        count: of all images.

    Returns:
        Position in `names` of the first member of each image's group.
    """
    most = max(MAX_GROUP_IMAGES, int(MAX_GROUP_SHARE * count))
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
