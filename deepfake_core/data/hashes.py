"""Perceptual hashes: pictures whose hashes are near may be copies of each other, or edits.

A hash is made from a 32 x 32 grey thumbnail, after PDQ (Facebook, "The TMK+PDQF Video-Hashing Algorithm and the PDQ
Image-Hashing Algorithm", 2019, chapter 3): 16 x 16 low frequencies of its cosine transform, each 1 if above their
median. Every sum is of whole numbers, so a hash depends on the picture alone and not on the order of additions.

A crop of 3 % changes a third of the bits, and edits are often shifted or cropped by that much. So each picture is
searched for through several views: whole, a little smaller, cut at each side, mirrored.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import faiss
import numpy as np

THUMBNAIL_SIZE = 32
HASH_BYTES = 32
FREQUENCIES = np.arange(1, 17)
"""Rows and columns of the cosine transform that are compared; 0, the mean brightness, is left out."""

SCALE = 512
"""The transform's coefficients are whole numbers in this unit: all sums stay below 2**53, exact in float64."""

NOISE = 16
"""Frequencies below this count as 0, so that smooth pictures get no bits by chance. Half of a face's are above 390."""


@dataclass(frozen=True)
class View:
    """A part of a picture: bounds as shares of its width and height; mirrored left to right or not."""

    left: float = 0.0
    right: float = 1.0
    top: float = 0.0
    bottom: float = 1.0
    mirrored: bool = False


VIEWS = (
    View(),
    View(0.0225, 0.9775, 0.0225, 0.9775),
    View(left=0.04),
    View(right=0.96),
    View(top=0.04),
    View(bottom=0.96),
    View(mirrored=True),
)
"""The first is the whole picture. Chosen on 2,400 faces: at 60 bits these find 22 of 23 known pairs, it alone 11."""

TABLES = 1600
TABLE_BITS = 20
"""Hash tables of the search among many, and sampled bits in each. Of hashes that are 60 bits apart, 99 % then share
some bucket, of those that are 40 apart all (benchmarks/data_speed.py)."""

MOST_IN_WORD = 0.45
"""Share of the differing bits that may lie in one of four words."""

EXACT_COMPARISONS = 10**10
"""Up to this many pairs of hashes, all are compared; it takes seconds."""

MOST_NEIGHBOURS = 64
"""Per hash. Thousands of nearly equal pictures, such as a film's frames, are linked all the same, each through some."""

MOST_WAITING = 10_000_000
"""Pairs found before they are merged with those of other tables; 80 MB."""


class Neighbours(NamedTuple):
    """Pairs of images of which one, seen through a view, is near the other: positions, positions, views, bits."""

    images: np.ndarray
    viewed: np.ndarray
    views: np.ndarray
    distances: np.ndarray


@cache
def _weigh_areas(size: int) -> np.ndarray:
    """Return (32, size) whole numbers that add up what each of 32 cells covers; rows add up to `size`."""
    edges = np.arange(THUMBNAIL_SIZE + 1)[:, None] * size
    pixels = np.arange(size + 1)[None] * THUMBNAIL_SIZE
    start = np.maximum(edges[:-1], pixels[:, :-1])
    stop = np.minimum(edges[1:], pixels[:, 1:])
    return np.maximum(stop - start, 0).astype(np.float32)


def shrink_images(pixels: np.ndarray) -> np.ndarray:
    """Average grey images over a grid of 32 x 32 cells.

    Args:
        pixels: uint8 of shape (n, height, width).

    Returns:
        uint8 of shape (n, 32, 32).
    """
    _, height, width = pixels.shape
    kind = np.float32 if 255 * height * width < 2**24 else np.float64  # whole numbers below 2**24 are exact in float32
    sums = _weigh_areas(height).astype(kind) @ pixels.astype(kind) @ _weigh_areas(width).T.astype(kind)
    return (sums / (height * width) + 0.5).astype(np.uint8)


def _sample_view(start: float, stop: float) -> np.ndarray:
    """Return the (32, 32) matrix that stretches a part of a line over the whole line, linearly interpolated."""
    at = np.clip(
        (start + (stop - start) * (np.arange(THUMBNAIL_SIZE) + 0.5) / THUMBNAIL_SIZE) * THUMBNAIL_SIZE - 0.5, 0, 31
    )
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(THUMBNAIL_SIZE)))


@cache
def _transform(view: View) -> tuple[np.ndarray, np.ndarray]:
    """Return the (16, 32) matrices for columns and rows that turn a view's thumbnail into its frequencies."""
    places = np.arange(THUMBNAIL_SIZE) + 0.5
    cosines = np.cos(np.pi * FREQUENCIES[:, None] * places / THUMBNAIL_SIZE)
    columns = np.round(SCALE * cosines @ _sample_view(view.top, view.bottom))
    rows = np.round(SCALE * cosines @ _sample_view(view.left, view.right))
    return columns, rows[:, ::-1] if view.mirrored else rows


def hash_thumbnails(thumbnails: np.ndarray, view: View = VIEWS[0]) -> np.ndarray:
    """Hash thumbnails as they would look if the pictures were cut to `view`.

    Args:
        thumbnails: uint8 of shape (n, 32, 32).

    Returns:
        uint8 of shape (n, 32): 256 bits each.
    """
    columns, rows = _transform(view)
    hashes = np.empty((len(thumbnails), HASH_BYTES), np.uint8)
    for start in range(0, len(thumbnails), 1024):
        part = thumbnails[start : start + 1024].astype(np.float64)
        frequencies = (columns @ part @ rows.T).reshape(len(part), -1) / (NOISE * SCALE**2)
        frequencies = frequencies.astype(np.int16)  # drops what is below the noise
        medians = np.partition(frequencies, 127, axis=1)[:, 127:128]  # the lower one of 256 numbers
        hashes[start : start + 1024] = np.packbits(frequencies > medians, axis=1)
    return hashes


def find_neighbours(hashes: np.ndarray, radius: int) -> Neighbours:
    """Find the pairs of images of which one, through some view, has a hash within `radius` bits of the other's.

    Where there are few, all are compared (faiss). Where there are many, only those are that agree on 20 bits, drawn at
    random for each of 1,600 hash tables (bit sampling: Indyk and Motwani, "Approximate nearest neighbors", STOC 1998,
    section 4.2); time then grows almost with the number of images instead of its square.

    Args:
        hashes: uint8 of shape (views, n, 32); the first view is the whole picture.
        radius: distance in bits, 0 to 255.

    Returns:
        Each pair once, through the view that is nearest. The same from any number of threads.
    """
    views, count, _ = hashes.shape
    search = _compare_all if views * count**2 <= EXACT_COMPARISONS else _compare_buckets
    codes, waiting = [np.empty(0, np.int64)], 0
    for found, query, distances in search(np.ascontiguousarray(hashes), radius):
        image, view = query % count, query // count
        pair = np.minimum(found, image) * count + np.maximum(found, image)
        codes.append((pair * 256 + distances) * views + view)
        waiting += len(pair)
        if waiting > MOST_WAITING:
            codes, waiting = [_keep_nearest(codes, views)], 0
    nearest = _keep_nearest(codes, views)
    pair = nearest // (256 * views)
    return Neighbours(pair // count, pair % count, nearest % views, nearest // views % 256)


def _keep_nearest(codes: list[np.ndarray], views: int) -> np.ndarray:
    """Sort coded pairs, and keep the first of each pair: the one with the smallest distance."""
    ordered = np.sort(np.concatenate(codes))
    pair = ordered // (256 * views)
    return ordered[np.diff(pair, prepend=-1) > 0]


def _compare_all(hashes: np.ndarray, radius: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield positions of whole pictures, positions of queries (all views in a row), and distances."""
    count = hashes.shape[1]
    index = faiss.IndexBinaryFlat(8 * HASH_BYTES)
    index.add(hashes[0])
    queries = hashes.reshape(-1, HASH_BYTES)
    for start in range(0, len(queries), 1024):
        limits, distances, found = index.range_search(queries[start : start + 1024], radius + 1)
        query = start + np.repeat(np.arange(len(limits) - 1), np.diff(limits.astype(np.int64)))
        new = np.flatnonzero(_is_new(found, query, count))
        found, query, distances = found[new], query[new], distances[new].astype(np.int64)
        nearest = np.lexsort((found, distances, query))
        _, first, inverse = np.unique(query, return_index=True, return_inverse=True)
        nearest = nearest[np.arange(len(query)) - first[inverse] < MOST_NEIGHBOURS]
        yield found[nearest], query[nearest], distances[nearest]


def _compare_buckets(hashes: np.ndarray, radius: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the same as `_compare_all`, a hash table at a time."""
    count = hashes.shape[1]
    rows = hashes.reshape(-1, HASH_BYTES).view(np.uint64)
    words = np.ascontiguousarray(rows.T)

    def fill_table(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        table = _choose_buckets(words, number)
        table.sort()
        members, buckets = table.astype(np.uint32), (table >> np.uint64(32)).astype(np.uint32)
        found = []
        first = np.flatnonzero(buckets[:-1] == buckets[1:])  # a bucket's members lie side by side
        for offset in range(1, MOST_NEIGHBOURS + 1):
            found.append((members[first], members[first + offset]))  # within a bucket in ascending order
            first = first[: np.searchsorted(first, len(table) - offset - 1)]
            first = first[buckets[first] == buckets[first + offset + 1]]
            if not len(first):
                break
        image, query = (np.concatenate(members) for members in zip(*found, strict=True))
        # Most pairs differ too much in one of four words already, which is read sooner than all.
        word = words[number % len(words)]
        likely = np.bitwise_count(np.take(word, image) ^ np.take(word, query)) <= radius * MOST_IN_WORD
        likely &= _is_new(image, query, count)
        image, query = image[likely], query[likely]
        distances = _count_bits(rows, image, query)
        near = np.flatnonzero(distances <= radius)
        return image[near].astype(np.int64), query[near].astype(np.int64), distances[near].astype(np.int64)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(fill_table, range(TABLES))


def _is_new(found: np.ndarray, query: np.ndarray, count: int) -> np.ndarray:
    """Whether `found` is a whole picture, and of another image; of two whole ones the first is taken as found."""
    new = found < query
    new &= found < count
    new &= found != query % count
    return new


def _choose_buckets(words: np.ndarray, number: int) -> np.ndarray:
    """Return uint64s whose upper halves are buckets in table `number`, and whose lower halves count the columns.

    Args:
        words: uint64 of shape (4, n), a hash a column. Bits are sampled from two of the words.
    """
    random = np.random.default_rng(number)
    chosen = random.choice(len(words), 2, replace=False)
    sampled = np.zeros((2, 64), np.uint8)
    sampled.flat[random.choice(sampled.size, TABLE_BITS, replace=False)] = 1
    (one, other), factors = np.packbits(sampled, axis=1).view(np.uint64).ravel(), random.integers(0, 2**63, 2) * 2 + 1
    first, second = words[chosen]
    factor, other_factor = factors.astype(np.uint64)
    table = np.empty(words.shape[1], np.uint64)
    for start in range(0, len(table), 1 << 15):  # few enough to stay in the cache
        part = slice(start, start + (1 << 15))
        buckets = first[part] & one
        buckets *= factor
        rest = second[part] & other
        rest *= other_factor
        buckets += rest
        buckets &= np.uint64(0xFFFFFFFF << 32)
        buckets |= np.arange(start, start + len(buckets), dtype=np.uint64)
        table[part] = buckets
    return table


def _count_bits(rows: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the distances in bits, uint32, of rows of shape (n, 4), uint64. Of opposites, which no bucket holds, 0."""
    differing = np.take(rows, first, axis=0)
    differing ^= np.take(rows, second, axis=0)
    counts = np.bitwise_count(differing).view(np.uint32)[:, 0]  # four counts of one byte each
    return counts * np.uint32(0x01010101) >> np.uint32(24)
