"""Pairs of hashes that are near each other: all compared, or among many those that share a bucket of a hash table."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import faiss
import numpy as np

from deepfake_core.data.hash_tables import (
    MAX_NEIGHBOURS,
    Found,
    choose_tables,
    compare_buckets,
    count_fullest,
    share_bucket,
)
from deepfake_core.data.hashes import HASH_BYTES
from deepfake_core.storage.progress import Progress

MAX_EXACT_COMPARISONS = 10**10
"""Up to this many pairs of hashes, all are compared; it takes seconds."""

QUERIES_AT_ONCE = 1024

MAX_ROWS_JOINED = 1_000_000
"""Near pairs of which it is asked at once whether they share a bucket."""

MAX_PAIRS_WAITING = 10_000_000
"""Pairs found before they are merged with those of other tables; 80 MB."""


class Neighbours(NamedTuple):
    """Pairs of images of which one, seen through a view, is near the other: positions, positions, views, bits.

    `fullest`: whole pictures in the fullest bucket of the search's hash tables, or more. If it had no tables, more than
    `MAX_NEIGHBOURS`.
    """

    images: np.ndarray
    viewed: np.ndarray
    views: np.ndarray
    distances: np.ndarray
    fullest: int


class Pairs(NamedTuple):
    """What a part of a search found.

    `codes`: int64 of shape (n,), sorted: a pair, its distance and its view in one number. Each pair once.
    `fullest`: see `Neighbours`.
    """

    codes: np.ndarray
    fullest: int


def is_among_many(views: int, images: int) -> bool:
    """Whether not all pairs of so many images are compared, but those that share a bucket."""
    return views * images**2 > MAX_EXACT_COMPARISONS


def find_neighbours(hashes: np.ndarray, radius: int) -> Neighbours:
    """Find the pairs of images of which one, through some view, has a hash within `radius` bits of the other's.

    Where there are few, all are compared (faiss). Where there are many, only those are that agree on 20 bits, drawn at
    random for each of 1,600 hash tables, and from 2 million images on, on 22 bits for each of 2,700.
    faiss.IndexBinaryMultiHash finds as many only with 16 tables of 16 bits and 2 flips, in 11 s instead of 4 s for
    20,000 pictures of 7 views (benchmarks/data_speed.py).

    Args:
        hashes: uint8 of shape (views, n, 32); the first view is the whole picture.
        radius: distance in bits, 0 to 255.

    Returns:
        Each pair once, through the view that is nearest. The same from any number of threads.
    """
    views, count, _ = hashes.shape
    if is_among_many(views, count):
        tables, _ = choose_tables(count)
        return join_pairs([compare_tables(hashes, radius, range(tables), os.cpu_count() or 1)], views, count)
    rows = np.ascontiguousarray(hashes).reshape(-1, HASH_BYTES)
    found = _compare_all(rows, np.arange(count), np.arange(len(rows)), radius, count)
    return join_pairs([_encode((_keep_near(*some) for some in found), views, count)], views, count)


def find_new_neighbours(
    hashes: np.ndarray, radius: int, new: np.ndarray, fullest: int, on_progress: Progress | None = None
) -> Neighbours | None:
    """Find the pairs with a new image that `find_neighbours` finds among many, after a search without the new images.

    The new images are compared with all (faiss), and of what is near, those pairs count that share a bucket. A bucket's
    pairs depend on no other picture unless it is too full, so the other pairs are those of the earlier search.

    Args:
        hashes, radius: see `find_neighbours`.
        new: bool of shape (n,).
        fullest: of the earlier search.

    Returns:
        None if a bucket may be too full now, or so few are left that all are compared.
    """
    views, count, _ = hashes.shape
    if not is_among_many(views, count):
        return None
    fullest += count_fullest(hashes[0, new].view(np.uint64), count)
    if fullest > MAX_NEIGHBOURS:
        return None
    rows = np.ascontiguousarray(hashes).reshape(-1, HASH_BYTES)
    is_new = np.tile(new, views)
    searches = (np.arange(count), np.flatnonzero(is_new)), (np.flatnonzero(new), np.flatnonzero(~is_new))
    total = sum(len(whole) * len(queries) for whole, queries in searches)

    def search() -> Iterator[tuple[np.ndarray, ...]]:
        done = 0
        for whole, queries in searches:
            for found in _compare_all(rows, whole, queries, radius, count):
                yield found
                done += len(whole) * QUERIES_AT_ONCE
                if on_progress:
                    on_progress(min(done, total), total)

    def keep_sharing() -> Iterator[Found]:
        for image, query, distances in _join_some(search()):
            shares = share_bucket(rows[image].view(np.uint64), rows[query].view(np.uint64), radius, count)
            yield image[shares], query[shares], distances[shares], 0

    return join_pairs([_encode(keep_sharing(), views, count)], views, count)._replace(fullest=fullest)


def compare_tables(hashes: np.ndarray, radius: int, tables: Sequence[int], threads: int) -> Pairs:
    """Return the part of `find_neighbours` among many that some hash tables find, by their numbers."""
    views, count, _ = hashes.shape
    return _encode(compare_buckets(np.ascontiguousarray(hashes), radius, tables, threads), views, count)


def join_pairs(parts: Sequence[Pairs], views: int, count: int) -> Neighbours:
    """Return the pairs that the parts of a search among `count` images found."""
    nearest = _keep_nearest([part.codes for part in parts], views)
    pair = nearest // (256 * views)
    fullest = max(part.fullest for part in parts)
    return Neighbours(pair // count, pair % count, nearest % views, nearest // views % 256, fullest)


def _encode(search: Iterable[Found], views: int, count: int) -> Pairs:
    codes, waiting, fullest = [np.empty(0, np.int64)], 0, 0
    for found, query, distances, in_bucket in search:
        fullest = max(fullest, in_bucket)
        image, view = query % count, query // count
        pair = np.minimum(found, image) * count + np.maximum(found, image)
        codes.append((pair * 256 + distances) * views + view)
        waiting += len(pair)
        if waiting > MAX_PAIRS_WAITING:
            codes, waiting = [_keep_nearest(codes, views)], 0
    return Pairs(_keep_nearest(codes, views), fullest)


def _keep_nearest(codes: list[np.ndarray], views: int) -> np.ndarray:
    """Sort coded pairs, and keep the first of each pair: the one with the smallest distance."""
    ordered = np.sort(np.concatenate(codes))
    pair = ordered // (256 * views)
    return ordered[np.diff(pair, prepend=-1) > 0]


def _compare_all(
    rows: np.ndarray, whole: np.ndarray, queries: np.ndarray, radius: int, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Compare hashes at some positions of `rows` with those of some whole pictures; yield what is near, as `Found`."""
    index = faiss.IndexBinaryFlat(8 * HASH_BYTES)
    index.add(rows[whole])
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        some = queries[start : start + QUERIES_AT_ONCE]
        limits, distances, found = index.range_search(rows[some], radius + 1)
        found, query = whole[found], np.repeat(some, np.diff(limits.astype(np.int64)))
        pairs = np.flatnonzero(_counts_once(found, query, count))
        yield found[pairs], query[pairs], distances[pairs].astype(np.int64)


def _join_some(parts: Iterable[tuple[np.ndarray, ...]]) -> Iterator[tuple[np.ndarray, ...]]:
    """Join parts of columns until there are many rows."""
    waiting: list[tuple[np.ndarray, ...]] = []
    rows = 0
    for part in parts:
        waiting.append(part)
        rows += len(part[0])
        if rows > MAX_ROWS_JOINED:
            yield tuple(map(np.concatenate, zip(*waiting, strict=True)))
            waiting, rows = [], 0
    if waiting:
        yield tuple(map(np.concatenate, zip(*waiting, strict=True)))


def _keep_near(found: np.ndarray, query: np.ndarray, distances: np.ndarray) -> Found:
    """Keep the nearest of each query: so many that thousands of nearly equal hashes take bounded space."""
    nearest = np.lexsort((found, distances, query))
    _, first, inverse = np.unique(query, return_index=True, return_inverse=True)
    nearest = nearest[np.arange(len(query)) - first[inverse] < MAX_NEIGHBOURS]
    return found[nearest], query[nearest], distances[nearest], MAX_NEIGHBOURS + 1


def _counts_once(found: np.ndarray, query: np.ndarray, count: int) -> np.ndarray:
    """Whether `found` is another image's than the query; of two whole pictures the first is taken as found."""
    once = found < query
    once &= found != query % count
    return once
