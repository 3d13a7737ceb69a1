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

MAX_NEIGHBOURS = 128
"""Whole pictures of a bucket that its members are compared with, the first ones. Thousands of nearly equal pictures,
such as a film's frames, are still linked, through these. Among 140,000 pictures of different faces, no bucket holds
half as many."""

SLOT_BITS = 20
"""Of a bucket's number: enough to see that most buckets hold no whole picture."""

SLOT_SHIFT, BUCKET_MASK = np.uint64(64 - SLOT_BITS), np.uint64(0xFFFFFFFF << 32)

MEMBERS_AT_ONCE = 1 << 17
"""Members of a table that are made at once, and whose hashes are copied at once: 4 MB, which stay in the cache."""

MAX_TABLE_BYTES = 1_200_000_000
"""Of all tables that are in memory at once; a table takes 8 bytes a hash. Two of ten million pictures fit."""

MAX_COPIED_BYTES = 200_000_000
"""Of hashes that are copied into memory for a search; more are read where they are."""

NOTHING = (np.empty(0, np.int64),) * 3

Found = tuple[np.ndarray, np.ndarray, np.ndarray, int]
"""Positions of whole pictures, positions of queries (all views in a row), distances; whole pictures in the fullest
bucket, or `MAX_NEIGHBOURS` + 1 where it has more, and pairs were left out."""


def choose_tables(images: int) -> tuple[int, int]:
    """Return how many hash tables a search among so many images has, and the sampled bits in each."""
    return (MORE_TABLES, MORE_TABLE_BITS) if images >= MANY_IMAGES else (TABLES, TABLE_BITS)


def compare_buckets(hashes: np.ndarray, radius: int, numbers: Sequence[int], threads: int) -> Iterator[Found]:
    """Compare the members of each bucket of some hash tables; yield what was found, some buckets at a time.

    Args:
        hashes: uint8 of shape (views, n, 32), contiguous; the first view is the whole picture.
        radius: distance in bits, 0 to 255.
        numbers: of the tables, below what `choose_tables` gives.
    """
    _, count, _ = hashes.shape
    _, bits = choose_tables(count)
    rows = hashes.reshape(-1, HASH_BYTES).view(np.uint64)
    words = np.ascontiguousarray(rows.T) if rows.nbytes < MAX_COPIED_BYTES else rows.T  # word by word is faster

    def search_table(number: int, table: np.ndarray) -> list[Found]:
        needed = np.zeros(1 << SLOT_BITS, bool)
        for part in _list_members(words[:, :count], number, bits):  # a bucket without a whole picture holds no pair
            needed[part >> SLOT_SHIFT] = True
        kept = 0
        for part in _list_members(words, number, bits, needed):
            table[kept : kept + len(part)] = part
            kept += len(part)
        table = table[:kept]
        table.sort()  # a bucket's members are neighbours now, in ascending order
        return [
            _compare_members(rows, table[start:stop], number % rows.shape[1], radius, count)
            for start, stop in itertools.pairwise(_cut_between_buckets(table))
        ]

    at_once = max(1, min(threads, MAX_TABLE_BYTES // max(1, 8 * len(rows))))
    tables = [np.empty(len(rows), np.uint64) for _ in range(at_once)]  # used again: new memory is slow
    with ThreadPoolExecutor(at_once) as pool:
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            for found in pool.map(search_table, some, tables):
                yield from found


def _cut_between_buckets(table: np.ndarray) -> list[int]:
    """Return where parts of a sorted table begin, and its end: each of about `MEMBERS_AT_ONCE`, with whole buckets."""
    near = table[MEMBERS_AT_ONCE::MEMBERS_AT_ONCE] >> np.uint64(32) << np.uint64(32)
    return [*np.unique([0, *np.searchsorted(table, near)]).tolist(), len(table)]


def _compare_members(rows: np.ndarray, table: np.ndarray, word: int, radius: int, count: int) -> Found:
    """Compare the members of each bucket of a part of a table with the whole pictures of the bucket.

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
    begins = np.diff(buckets, prepend=~buckets[:1]) != 0
    whole = np.flatnonzero(begins)[np.cumsum(begins) - 1]  # the bucket's first member, for each
    later = np.arange(len(table))
    fullest = 0
    while True:
        stays = np.flatnonzero((whole < later) & (np.take(members, whole) < count))  # whole pictures come first
        whole, later = whole[stays], later[stays]
        if fullest == MAX_NEIGHBOURS or not len(whole):
            break
        # Most pairs differ too much in one of four words already, which is read sooner than all.
        differing = np.bitwise_count(np.take(words, whole) ^ np.take(words, later))
        in_word = np.flatnonzero(differing <= radius * MAX_SHARE_IN_WORD)
        one, other = whole[in_word], later[in_word]
        distances = _count_bits(hashes, one, other)
        near = np.flatnonzero(distances <= radius)
        image, query = members[one[near]], members[other[near]]
        keep = image != query % count
        found.append(tuple(each[keep].astype(np.int64) for each in (image, query, distances[near])))
        whole += 1
        fullest += 1
    columns = [np.concatenate(each) for each in zip(*found, strict=True)] if found else NOTHING
    return columns[0], columns[1], columns[2], fullest + bool(len(whole))


def share_bucket(one: np.ndarray, other: np.ndarray, radius: int, images: int) -> np.ndarray:
    """Return which pairs of hashes `compare_buckets` compares among so many images, if no bucket is too full.

    Args:
        one, other: uint64 of shape (n, 4), a hash each.

    Returns:
        bool of shape (n,).
    """
    shares = np.zeros(len(one), bool)
    is_near = np.bitwise_count(one ^ other) <= radius * MAX_SHARE_IN_WORD
    tables, bits = choose_tables(images)
    for number in range(tables):
        left = np.flatnonzero(~shares & is_near[:, number % one.shape[1]])
        buckets = (_list_buckets(each[left], number, bits) for each in (one, other))
        shares[left] = np.equal(*buckets)
    return shares


def count_fullest(hashes: np.ndarray, images: int) -> int:
    """Return how many of some hashes are in one bucket at most, of any table among so many images.

    Args:
        hashes: uint64 of shape (n, 4).
    """
    tables, bits = choose_tables(images)
    buckets = (np.sort(_list_buckets(hashes, number, bits)) for number in range(tables))
    return max(int(np.unique_counts(each).counts.max(initial=0)) for each in buckets)


def _list_buckets(hashes: np.ndarray, number: int, bits: int) -> np.ndarray:
    """Return the bucket of each hash in table `number`."""
    parts = [part >> np.uint64(32) for part in _list_members(hashes.T, number, bits)]
    return np.concatenate([np.empty(0, np.uint64), *parts])


def _list_members(words: np.ndarray, number: int, bits: int, needed: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Yield the members of table `number`: uint64s whose upper halves are buckets, and whose lower halves count hashes.

    Args:
        words: uint64 of shape (4, n), a hash in each column.
        bits: how many are sampled, from two of the words.
        needed: bool of shape (2**SLOT_BITS,); members of other slots are left out.
    """
    random = np.random.default_rng(number)
    chosen = random.choice(len(words), 2, replace=False)
    sampled = np.zeros((2, 64), np.uint8)
    sampled.flat[random.choice(sampled.size, bits, replace=False)] = 1
    masks = np.packbits(sampled, axis=1).view(np.uint64).ravel()
    factors = (random.integers(0, 2**63, 2) * 2 + 1).astype(np.uint64)
    one, other = (words[each] for each in chosen)
    (mask, other_mask), (factor, other_factor) = masks, factors
    for start in range(0, len(one), MEMBERS_AT_ONCE):
        part = slice(start, start + MEMBERS_AT_ONCE)
        buckets = one[part] & mask
        buckets *= factor
        rest = other[part] & other_mask
        rest *= other_factor
        buckets += rest
        members = np.arange(start, start + len(buckets), dtype=np.uint64)
        if needed is not None:
            np.right_shift(buckets, SLOT_SHIFT, out=rest)
            kept = np.flatnonzero(needed[rest.view(np.int64)])
            buckets, members = buckets[kept], members[kept]
        buckets &= BUCKET_MASK
        yield buckets | members


def _count_bits(rows: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the distances in bits, uint32, of rows of shape (n, 4), uint64. Of opposites, which no bucket holds, 0."""
    differing = np.take(rows, first, axis=0)
    differing ^= np.take(rows, second, axis=0)
    counts = np.bitwise_count(differing).view(np.uint32)[:, 0]  # four counts of one byte each
    return counts * np.uint32(0x01010101) >> np.uint32(24)
