"""Pairs of hashes that are near each other: all compared, or among many those that share a bucket of a hash table."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import faiss
import numpy as np

from deepfake_core.data.hash_tables import MAX_NEIGHBOURS, Found, choose_tables, compare_buckets
from deepfake_core.data.hashes import HASH_BYTES

MAX_EXACT_COMPARISONS = 10**10
"""Up to this many pairs of hashes, all are compared; it takes seconds."""

MAX_PAIRS_WAITING = 10_000_000
"""Pairs found before they are merged with those of other tables; 80 MB."""


class Neighbours(NamedTuple):
    """Pairs of images of which one, seen through a view, is near the other: positions, positions, views, bits.

    `lasting`: whether a search among these images and others finds the same pairs of these.
    """

    images: np.ndarray
    viewed: np.ndarray
    views: np.ndarray
    distances: np.ndarray
    lasting: bool


class Pairs(NamedTuple):
    """What a part of a search found.

    `codes`: int64 of shape (n,), sorted: a pair, its distance and its view in one number. Each pair once.
    `complete`: whether no pair was left out because a bucket was too full.
    """

    codes: np.ndarray
    complete: bool


def is_among_many(views: int, images: int) -> bool:
    """Whether not all pairs of so many images are compared, but those that share a bucket."""
    return views * images**2 > MAX_EXACT_COMPARISONS


def find_neighbours(hashes: np.ndarray, radius: int, new: np.ndarray | None = None) -> Neighbours:
    """Find the pairs of images of which one, through some view, has a hash within `radius` bits of the other's.

    Where there are few, all are compared (faiss). Where there are many, only those are that agree on 20 bits, drawn at
    random for each of 1,600 hash tables, and from 2 million images on, on 22 bits for each of 2,700.
    faiss.IndexBinaryMultiHash finds as many only with 16 tables of 16 bits and 2 flips, in 54 s instead of 5 s for
    20,000 pictures of 7 views (benchmarks/data_speed.py).

    A bucket's pairs depend on no other picture, unless it is so full that not all of them are compared. Where none is,
    and where none was in a search without the new images, the pairs of that search are found again, and no others
    without a new image.

    Args:
        hashes: uint8 of shape (views, n, 32); the first view is the whole picture.
        radius: distance in bits, 0 to 255.
        new: bool of shape (n,). Among many, only pairs with a new image are found. None: all are new.

    Returns:
        Each pair once, through the view that is nearest. The same from any number of threads.
    """
    views, count, _ = hashes.shape
    if is_among_many(views, count):
        tables, _ = choose_tables(count)
        return join_pairs([compare_tables(hashes, radius, range(tables), new, os.cpu_count() or 1)], views, count)
    found = join_pairs([_encode(_compare_all(np.ascontiguousarray(hashes), radius), views, count)], views, count)
    return found._replace(lasting=False)


def compare_tables(
    hashes: np.ndarray, radius: int, tables: Sequence[int], new: np.ndarray | None, threads: int
) -> Pairs:
    """Return the part of `find_neighbours` among many that some hash tables find, by their numbers."""
    views, count, _ = hashes.shape
    return _encode(compare_buckets(np.ascontiguousarray(hashes), radius, tables, new, threads), views, count)


def join_pairs(parts: Sequence[Pairs], views: int, count: int) -> Neighbours:
    """Return the pairs that the parts of a search among `count` images found."""
    nearest = _keep_nearest([part.codes for part in parts], views)
    pair = nearest // (256 * views)
    lasting = all(part.complete for part in parts)
    return Neighbours(pair // count, pair % count, nearest % views, nearest // views % 256, lasting)


def _encode(search: Iterable[Found], views: int, count: int) -> Pairs:
    codes, waiting, complete = [np.empty(0, np.int64)], 0, True
    for found, query, distances, is_complete in search:
        complete &= is_complete
        image, view = query % count, query // count
        pair = np.minimum(found, image) * count + np.maximum(found, image)
        codes.append((pair * 256 + distances) * views + view)
        waiting += len(pair)
        if waiting > MAX_PAIRS_WAITING:
            codes, waiting = [_keep_nearest(codes, views)], 0
    return Pairs(_keep_nearest(codes, views), complete)


def _keep_nearest(codes: list[np.ndarray], views: int) -> np.ndarray:
    """Sort coded pairs, and keep the first of each pair: the one with the smallest distance."""
    ordered = np.sort(np.concatenate(codes))
    pair = ordered // (256 * views)
    return ordered[np.diff(pair, prepend=-1) > 0]


def _compare_all(hashes: np.ndarray, radius: int) -> Iterator[Found]:
    count = hashes.shape[1]
    index = faiss.IndexBinaryFlat(8 * HASH_BYTES)
    index.add(hashes[0])
    queries = hashes.reshape(-1, HASH_BYTES)
    for start in range(0, len(queries), 1024):
        limits, distances, found = index.range_search(queries[start : start + 1024], radius + 1)
        query = start + np.repeat(np.arange(len(limits) - 1), np.diff(limits.astype(np.int64)))
        pairs = np.flatnonzero(_counts_once(found, query, count))
        found, query, distances = found[pairs], query[pairs], distances[pairs].astype(np.int64)
        nearest = np.lexsort((found, distances, query))
        _, first, inverse = np.unique(query, return_index=True, return_inverse=True)
        nearest = nearest[np.arange(len(query)) - first[inverse] < MAX_NEIGHBOURS]
        yield found[nearest], query[nearest], distances[nearest], len(nearest) == len(pairs)


def _counts_once(found: np.ndarray, query: np.ndarray, count: int) -> np.ndarray:
    """Whether `found` is a whole picture, and of another image; of two whole ones the first is taken as found."""
    once = found < query
    once &= found < count
    once &= found != query % count
    return once
