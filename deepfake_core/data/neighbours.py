"""Pairs of hashes that are near each other, among many: all compared, or only those that share a bucket."""

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import faiss
import numpy as np

from deepfake_core.data.hashes import HASH_BYTES

TABLES = 1600
TABLE_BITS = 20
"""Hash tables of the search among many, and sampled bits in each. Of hashes that are 60 bits apart, 99 % then share
some bucket, of those that are 40 apart all (benchmarks/data_speed.py)."""

MAX_SHARE_IN_WORD = 0.45
"""Share of the differing bits that one of four words may hold."""

MAX_EXACT_COMPARISONS = 10**10
"""Up to this many pairs of hashes, all are compared; it takes seconds."""

MAX_NEIGHBOURS = 64
"""Per hash. Thousands of nearly equal pictures, such as a film's frames, are still linked, each through some."""

SLOT_BITS = 20
"""Of a bucket's number: enough to see that most buckets hold no whole picture, or no new one."""

MEMBERS_AT_ONCE = 1 << 16
"""Members of a table whose hashes are copied at once: 2 MB, which stay in the cache."""

MAX_TABLE_BYTES = 1 << 30
"""Of all tables that are in memory at once; a table takes 8 bytes a hash."""

NOTHING = (np.empty(0, np.int64),) * 3

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


def find_neighbours(hashes: np.ndarray, radius: int, new: np.ndarray | None = None) -> Neighbours:
    """Find the pairs of images of which one, through some view, has a hash within `radius` bits of the other's.

    Where there are few, all are compared (faiss). Where there are many, only those are that agree on 20 bits, drawn at
    random for each of 1,600 hash tables (bit sampling: Indyk and Motwani, "Approximate nearest neighbors", STOC 1998,
    section 4.2); time then grows almost with the number of images instead of its square.
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
    hashes = np.ascontiguousarray(hashes)
    among_many = views * count**2 > MAX_EXACT_COMPARISONS
    search = _compare_buckets(hashes, radius, new) if among_many else _compare_all(hashes, radius)
    codes, waiting, lasting = [np.empty(0, np.int64)], 0, among_many
    for found, query, distances, is_complete in search:
        lasting &= is_complete
        image, view = query % count, query // count
        pair = np.minimum(found, image) * count + np.maximum(found, image)
        codes.append((pair * 256 + distances) * views + view)
        waiting += len(pair)
        if waiting > MAX_PAIRS_WAITING:
            codes, waiting = [_keep_nearest(codes, views)], 0
    nearest = _keep_nearest(codes, views)
    pair = nearest // (256 * views)
    return Neighbours(pair // count, pair % count, nearest % views, nearest // views % 256, lasting)


def _keep_nearest(codes: list[np.ndarray], views: int) -> np.ndarray:
    """Sort coded pairs, and keep the first of each pair: the one with the smallest distance."""
    ordered = np.sort(np.concatenate(codes))
    pair = ordered // (256 * views)
    return ordered[np.diff(pair, prepend=-1) > 0]


Found = tuple[np.ndarray, np.ndarray, np.ndarray, bool]
"""Positions of whole pictures, positions of queries (all views in a row), distances; whether no pair was left out."""


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


def _compare_buckets(hashes: np.ndarray, radius: int, new: np.ndarray | None) -> Iterator[Found]:
    """Yield the same as `_compare_all`, some buckets of a hash table at a time."""
    views, count, _ = hashes.shape
    rows = hashes.reshape(-1, HASH_BYTES).view(np.uint64)
    is_new = None if new is None else np.tile(new, views)
    new_places = np.empty(0, int) if is_new is None else np.flatnonzero(is_new)

    def search_table(number: int) -> list[Found]:
        table = tables[number % threads]
        _choose_buckets(rows, number, table)
        needed = _mark_slots(table[:count])
        if is_new is not None:
            needed &= _mark_slots(table[new_places])
        table = _keep_slots(table, needed)
        table.sort()  # a bucket's members are neighbours now, in ascending order
        return [
            _compare_members(rows, table[start:stop], number % rows.shape[1], radius, count, is_new)
            for start, stop in itertools.pairwise(_cut_between_buckets(table))
        ]

    threads = max(1, min(os.cpu_count() or 1, MAX_TABLE_BYTES // max(1, 8 * len(rows))))
    tables = [np.empty(len(rows), np.uint64) for _ in range(threads)]  # used again: new memory is slow
    with ThreadPoolExecutor(threads) as pool:
        for number in range(0, TABLES, threads):
            for found in pool.map(search_table, range(number, min(number + threads, TABLES))):
                yield from found


def _mark_slots(table: np.ndarray) -> np.ndarray:
    """Return whether each slot holds a member of a table; bool of shape (2**SLOT_BITS,)."""
    marked = np.zeros(1 << SLOT_BITS, bool)
    for start in range(0, len(table), MEMBERS_AT_ONCE):
        marked[table[start : start + MEMBERS_AT_ONCE] >> np.uint64(64 - SLOT_BITS)] = True
    return marked


def _keep_slots(table: np.ndarray, needed: np.ndarray) -> np.ndarray:
    """Move the members of needed slots to the front of a table, and return that part."""
    kept = 0
    for start in range(0, len(table), MEMBERS_AT_ONCE):
        part = table[start : start + MEMBERS_AT_ONCE]
        part = part[needed[part >> np.uint64(64 - SLOT_BITS)]]
        table[kept : kept + len(part)] = part
        kept += len(part)
    return table[:kept]


def _cut_between_buckets(table: np.ndarray) -> list[int]:
    """Return where parts of a sorted table begin, and its end: each of about `MEMBERS_AT_ONCE`, with whole buckets."""
    near = table[MEMBERS_AT_ONCE::MEMBERS_AT_ONCE] >> np.uint64(32) << np.uint64(32)
    return [*np.unique([0, *np.searchsorted(table, near)]).tolist(), len(table)]


def _compare_members(
    rows: np.ndarray, table: np.ndarray, word: int, radius: int, count: int, is_new: np.ndarray | None
) -> Found:
    """Compare the members of each bucket of a part of a table.

    The hashes are copied in the order of buckets first: what is compared then lies side by side in memory.
    """
    has_mate = np.zeros(len(table), bool)
    np.equal(table[:-1] >> np.uint64(32), table[1:] >> np.uint64(32), out=has_mate[1:])
    has_mate[:-1] |= has_mate[1:]
    table = table[np.flatnonzero(has_mate)]
    members, buckets = table.astype(np.uint32), (table >> np.uint64(32)).astype(np.uint32)
    hashes = np.take(rows, members, axis=0)
    words = np.ascontiguousarray(hashes[:, word])
    found: list[tuple[np.ndarray, ...]] = []
    first = np.flatnonzero((buckets[:-1] == buckets[1:]) & (members[:-1] < count))
    for offset in range(1, MAX_NEIGHBOURS + 1):
        if not len(first):
            break
        # Most pairs differ too much in one of four words already, which is read sooner than all.
        differing = np.bitwise_count(np.take(words, first) ^ np.take(words, first + offset))
        one = first[differing <= radius * MAX_SHARE_IN_WORD]
        distances = _count_bits(hashes, one, one + offset)
        near = np.flatnonzero(distances <= radius)
        image, query = members[one[near]], members[one[near] + offset]
        keep = image != query % count
        if is_new is not None:
            keep &= is_new[image] | is_new[query]
        found.append(tuple(each[keep].astype(np.int64) for each in (image, query, distances[near])))
        first = first[: np.searchsorted(first, len(table) - offset - 1)]
        first = first[buckets[first] == buckets[first + offset + 1]]
    image, query, distances = (np.concatenate(each) for each in zip(*found, strict=True)) if found else NOTHING
    return image, query, distances, not len(first)


def _counts_once(found: np.ndarray, query: np.ndarray, count: int) -> np.ndarray:
    """Whether `found` is a whole picture, and of another image; of two whole ones the first is taken as found."""
    once = found < query
    once &= found < count
    once &= found != query % count
    return once


def _choose_buckets(rows: np.ndarray, number: int, table: np.ndarray) -> None:
    """Fill table `number` with uint64s whose upper halves are buckets, and whose lower halves count the rows.

    Args:
        rows: uint64 of shape (n, 4), a hash each. Bits are sampled from two of the words.
    """
    random = np.random.default_rng(number)
    chosen = random.choice(rows.shape[1], 2, replace=False)
    sampled = np.zeros((2, 64), np.uint8)
    sampled.flat[random.choice(sampled.size, TABLE_BITS, replace=False)] = 1
    one, other = np.packbits(sampled, axis=1).view(np.uint64).ravel()
    factor, other_factor = (random.integers(0, 2**63, 2) * 2 + 1).astype(np.uint64)
    for start in range(0, len(rows), 1 << 13):  # few enough to stay in the cache
        part, buckets = rows[start : start + (1 << 13)], table[start : start + (1 << 13)]
        np.bitwise_and(part[:, chosen[0]], one, out=buckets)
        buckets *= factor
        rest = part[:, chosen[1]] & other
        rest *= other_factor
        buckets += rest
        buckets &= np.uint64(0xFFFFFFFF << 32)
        buckets |= np.arange(start, start + len(part), dtype=np.uint64)


def _count_bits(rows: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the distances in bits, uint32, of rows of shape (n, 4), uint64. Of opposites, which no bucket holds, 0."""
    differing = np.take(rows, first, axis=0)
    differing ^= np.take(rows, second, axis=0)
    counts = np.bitwise_count(differing).view(np.uint32)[:, 0]  # four counts of one byte each
    return counts * np.uint32(0x01010101) >> np.uint32(24)
