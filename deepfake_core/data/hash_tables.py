"""Pairs of hashes that share a bucket of a hash table: the search among many pictures, a table at a time.

Bit sampling: Indyk and Motwani, "Approximate nearest neighbors", STOC 1998, section 4.2.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from deepfake_core.data.hashes import HASH_BYTES

TABLES, TABLE_BITS = 1600, 20
"""Hash tables of the search among many, and sampled bits in each. Of hashes that are 60 bits apart, 99 % then share
some bucket, of those that are 40 apart all (benchmarks/data_speed.py)."""

MANY_IMAGES = 2_000_000
MORE_TABLES, MORE_TABLE_BITS = 2700, 22
"""The same from so many images on: as many pairs are found, in more tables whose buckets hold fewer. With 20 bits, time
grows with the square of the images by then."""

MAX_SHARE_IN_WORD = 0.45
"""Share of the differing bits that one of four words may hold."""

MAX_NEIGHBOURS = 64
"""Per hash. Thousands of nearly equal pictures, such as a film's frames, are still linked, each through some."""

SLOT_BITS = 20
"""Of a bucket's number: enough to see that most buckets hold no whole picture, or no new one."""

MEMBERS_AT_ONCE = 1 << 16
"""Members of a table whose hashes are copied at once: 2 MB, which stay in the cache."""

MAX_TABLE_BYTES = 1_200_000_000
"""Of all tables that are in memory at once; a table takes 8 bytes a hash. Two of ten million pictures fit."""

NOTHING = (np.empty(0, np.int64),) * 3

Found = tuple[np.ndarray, np.ndarray, np.ndarray, bool]
"""Positions of whole pictures, positions of queries (all views in a row), distances; whether no pair was left out."""


def choose_tables(images: int) -> tuple[int, int]:
    """Return how many hash tables a search among so many images has, and the sampled bits in each."""
    return (MORE_TABLES, MORE_TABLE_BITS) if images >= MANY_IMAGES else (TABLES, TABLE_BITS)


def compare_buckets(
    hashes: np.ndarray, radius: int, numbers: Sequence[int], new: np.ndarray | None, threads: int
) -> Iterator[Found]:
    """Compare the members of each bucket of some hash tables; yield what was found, some buckets at a time.

    Args:
        hashes: uint8 of shape (views, n, 32), contiguous; the first view is the whole picture.
        radius: distance in bits, 0 to 255.
        numbers: of the tables, below what `choose_tables` gives.
        new: bool of shape (n,): only pairs with a new image are found. None: all are new.
    """
    views, count, _ = hashes.shape
    _, bits = choose_tables(count)
    rows = hashes.reshape(-1, HASH_BYTES).view(np.uint64)
    is_new = None if new is None else np.tile(new, views)
    new_places = np.empty(0, int) if is_new is None else np.flatnonzero(is_new)

    def search_table(number: int, table: np.ndarray) -> list[Found]:
        _choose_buckets(rows, number, bits, table)
        needed = _mark_slots(table[:count])
        if is_new is not None:
            needed &= _mark_slots(table[new_places])
        table = _keep_slots(table, needed)
        table.sort()  # a bucket's members are neighbours now, in ascending order
        return [
            _compare_members(rows, table[start:stop], number % rows.shape[1], radius, count, is_new)
            for start, stop in itertools.pairwise(_cut_between_buckets(table))
        ]

    at_once = max(1, min(threads, MAX_TABLE_BYTES // max(1, 8 * len(rows))))
    tables = [np.empty(len(rows), np.uint64) for _ in range(at_once)]  # used again: new memory is slow
    with ThreadPoolExecutor(at_once) as pool:
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            for found in pool.map(search_table, some, tables):
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


def _choose_buckets(rows: np.ndarray, number: int, bits: int, table: np.ndarray) -> None:
    """Fill table `number` with uint64s whose upper halves are buckets, and whose lower halves count the rows.

    Args:
        rows: uint64 of shape (n, 4), a hash each.
        bits: how many are sampled, from two of the words.
    """
    random = np.random.default_rng(number)
    chosen = random.choice(rows.shape[1], 2, replace=False)
    sampled = np.zeros((2, 64), np.uint8)
    sampled.flat[random.choice(sampled.size, bits, replace=False)] = 1
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
