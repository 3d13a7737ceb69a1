import itertools
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deepfake_core.data import hash_tables, neighbours
from deepfake_core.data.hashes import VIEWS, View, hash_thumbnails, shrink_images
from deepfake_core.data.neighbours import find_neighbours, find_new_neighbours
from tests.builders import CHANGES, draw_image

MAX_HASH_DISTANCE_BITS = 60


def thumbnail(image: Image.Image) -> np.ndarray:
    return shrink_images(np.asarray(image.convert("L"))[None])


def count_bits(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.bitwise_count(one ^ other).sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_a_thumbnail_is_the_exact_mean_of_each_cell(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (2, height, width), dtype=np.uint8)
    fine = pixels.astype(int).repeat(32, axis=1).repeat(32, axis=2)
    sums = fine.reshape(2, 32, height, 32, width).sum((2, 4))
    assert (shrink_images(pixels) == (2 * sums + height * width) // (2 * height * width)).all()


def test_a_hash_does_not_depend_on_what_is_hashed_with_it():
    thumbnails = np.random.default_rng(0).integers(0, 256, (3000, 32, 32), dtype=np.uint8)
    for view in VIEWS:
        together = hash_thumbnails(thumbnails, view)
        assert all((hash_thumbnails(thumbnails[i : i + 1], view) == together[i]).all() for i in range(0, 3000, 97))


def test_about_half_of_the_bits_are_set_and_other_pictures_have_other_hashes():
    images = [hash_thumbnails(thumbnail(draw_image(seed, 128, 24)))[0] for seed in range(12)]
    assert all(112 <= np.bitwise_count(bits).sum() <= 128 for bits in images)
    assert min(count_bits(images[i], images[j]) for i in range(12) for j in range(i)) > MAX_HASH_DISTANCE_BITS


@pytest.mark.parametrize("change", CHANGES)
def test_copies_have_near_hashes(change):
    for seed in range(5):
        image = draw_image(seed, 256, 24)
        ours, theirs = (hash_thumbnails(thumbnail(each))[0] for each in (image, CHANGES[change](image)))
        assert count_bits(ours, theirs) <= 24


CROPS = {
    (6, 6, 250, 250): VIEWS[1],
    (10, 0, 256, 256): View(left=0.04),
    (0, 0, 246, 256): View(right=0.96),
    (0, 10, 256, 256): View(top=0.04),
    (0, 0, 256, 246): View(bottom=0.96),
}


@pytest.mark.parametrize("box", CROPS)
def test_a_view_is_how_a_cropped_copy_looks(box):
    assert CROPS[box] in VIEWS
    for seed in range(5):
        image = draw_image(seed, 256, 24)
        whole, cropped = thumbnail(image), thumbnail(image.crop(box))
        through = count_bits(hash_thumbnails(whole, CROPS[box])[0], hash_thumbnails(cropped)[0])
        assert through < count_bits(hash_thumbnails(whole)[0], hash_thumbnails(cropped)[0])
        assert through <= 24


def test_the_mirrored_view_is_the_mirrored_picture():
    image = draw_image(1, 256, 24)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert View(mirrored=True) in VIEWS
    assert (hash_thumbnails(thumbnail(image), View(mirrored=True)) == hash_thumbnails(thumbnail(mirrored))).all()


def simulate(count: int, distances: tuple[int, ...], pairs: int = 200) -> tuple[np.ndarray, dict[int, set]]:
    random = np.random.default_rng(count)
    simulated = random.integers(0, 256, (count, 32), dtype=np.uint8)
    planted: dict[int, set] = {}
    places = iter(random.permutation(count))
    for distance in distances:
        planted[distance] = set()
        for one, other in zip(*[iter([next(places) for _ in range(2 * pairs)])] * 2, strict=True):
            flipped = np.zeros(256, bool)
            flipped[random.choice(256, distance, replace=False)] = True
            simulated[other] = simulated[one] ^ np.packbits(flipped)
            planted[distance].add((min(one, other), max(one, other)))
    return simulated, planted


def test_all_that_are_compared_are_found_and_no_others():
    simulated, planted = simulate(5000, (0, 1, 30, MAX_HASH_DISTANCE_BITS, MAX_HASH_DISTANCE_BITS + 1))
    near = find_neighbours(simulated[None], MAX_HASH_DISTANCE_BITS)
    found = dict(zip(zip(near.images, near.viewed, strict=True), near.distances, strict=True))
    assert len(found) == len(near.images)
    assert set(found) == planted[0] | planted[1] | planted[30] | planted[MAX_HASH_DISTANCE_BITS]
    for distance in (0, 1, 30, MAX_HASH_DISTANCE_BITS):
        assert {found[pair] for pair in planted[distance]} == {distance}


@pytest.mark.slow
def test_among_many_nearly_all_are_found_and_no_others(monkeypatch):
    simulated, planted = simulate(
        20_000, (0, 20, 40, 50, MAX_HASH_DISTANCE_BITS, MAX_HASH_DISTANCE_BITS + 1), pairs=400
    )
    monkeypatch.setattr(neighbours, "MAX_EXACT_COMPARISONS", 0)
    near = find_neighbours(simulated[None], MAX_HASH_DISTANCE_BITS)
    found = dict(zip(zip(near.images, near.viewed, strict=True), near.distances, strict=True))
    assert set(found) <= set().union(*(planted[distance] for distance in (0, 20, 40, 50, MAX_HASH_DISTANCE_BITS)))
    for distance, least in ((0, 1), (20, 1), (40, 1), (50, 0.99), (MAX_HASH_DISTANCE_BITS, 0.97)):
        assert len(planted[distance] & set(found)) >= least * 400
        assert {found[pair] for pair in planted[distance] & set(found)} == {distance}

    monkeypatch.setattr("os.cpu_count", lambda: 5)
    again = find_neighbours(simulated[None], MAX_HASH_DISTANCE_BITS)
    assert all((one == other).all() for one, other in zip(near[:4], again[:4], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("exact_comparisons", [10**10, 0])
def test_pairs_are_found_through_the_view_that_is_nearest(monkeypatch, exact_comparisons):
    monkeypatch.setattr(neighbours, "MAX_EXACT_COMPARISONS", exact_comparisons)
    random = np.random.default_rng(0)
    views = random.integers(0, 256, (3, 500, 32), dtype=np.uint8)
    views[1, 7] = views[0, 3]  # image 7 seen through view 1 is image 3
    views[2, 3] = views[0, 7] ^ np.uint8(1)  # and the other way round through view 2, 32 bits away
    views[2, 9] = views[0, 9]  # an image is no neighbour of itself
    near = find_neighbours(views, MAX_HASH_DISTANCE_BITS)
    assert [column.tolist() for column in near[:4]] == [[3], [7], [1], [0]]


@pytest.mark.parametrize("members_at_once", [1 << 16, 7])
@pytest.mark.parametrize("among", ["all", "new"])
@pytest.mark.parametrize(("many_images", "table_bits"), [(2_000_000, 20), (0, 22)])
def test_among_many_exactly_those_pairs_are_found_that_share_a_bucket(
    monkeypatch, members_at_once, among, many_images, table_bits
):
    """Against a search that compares the sampled bits of all pairs, one by one."""
    monkeypatch.setattr(neighbours, "MAX_EXACT_COMPARISONS", 0)
    monkeypatch.setattr(hash_tables, "MANY_IMAGES", many_images)
    monkeypatch.setattr(hash_tables, "TABLES", 5)
    monkeypatch.setattr(hash_tables, "MORE_TABLES", 5)
    monkeypatch.setattr(hash_tables, "MEMBERS_AT_ONCE", members_at_once)
    random = np.random.default_rng(2)
    views = random.integers(0, 256, (3, 120, 32), dtype=np.uint8)
    flipped = random.random((3, 60, 256)) < random.choice([0, 0.05, 0.1, 0.2], (3, 60, 1))
    views[:, 60:] = views[0, :60] ^ np.packbits(flipped, axis=-1)
    new = random.random(120) < 0.3 if among == "new" else None
    bits = np.unpackbits(views.reshape(-1, 32), axis=1)
    shares_bucket = np.zeros((120, 360), bool)
    for number in range(5):
        chosen = np.random.default_rng(number)
        words = chosen.choice(4, 2, replace=False)
        sampled = np.zeros((2, 64), np.uint8)
        sampled.flat[chosen.choice(128, table_bits, replace=False)] = 1
        places = np.concatenate([64 * word + np.flatnonzero(part) for word, part in zip(words, sampled, strict=True)])
        part = bits[:, places]
        near_in_word = (bits[:, None] != bits[None])[:120, :, 64 * (number % 4) :][:, :, :64].sum(2) <= 27
        shares_bucket |= (part[:120, None] == part[None]).all(2) & near_in_word
    distances = (bits[:120, None] != bits[None]).sum(2)
    wanted: dict[tuple[int, int], int] = {}
    for image, query in np.argwhere(shares_bucket & (distances <= MAX_HASH_DISTANCE_BITS)).tolist():
        pair = (min(image, query % 120), max(image, query % 120))
        if pair[0] != pair[1] and (new is None or new[list(pair)].any()):
            wanted[pair] = min(wanted.get(pair, 256), int(distances[image, query]))
    if new is None:
        near = find_neighbours(views, MAX_HASH_DISTANCE_BITS)
    else:
        near = find_new_neighbours(views, MAX_HASH_DISTANCE_BITS, new, 0)
    assert dict(zip(zip(near.images, near.viewed, strict=True), near.distances, strict=True)) == wanted
    assert len(near.images) == len(wanted) > 20


@pytest.mark.slow
@pytest.mark.parametrize("images", [0, hash_tables.MANY_IMAGES])
def test_of_hashes_60_bits_apart_99_percent_share_a_bucket(images):
    """By the share of tables that can hold a pair: those none of whose sampled bits differ."""
    tables, bits = hash_tables.choose_tables(images)
    random = np.random.default_rng(0)
    missed = []
    for _ in range(3000):
        counts = np.bincount(random.choice(256, MAX_HASH_DISTANCE_BITS, replace=False) // 64, minlength=4)
        shares = [
            comb(128 - int(one + other), bits) / comb(128, bits) for one, other in itertools.combinations(counts, 2)
        ]
        missed.append((1 - np.mean(shares)) ** tables)
    assert np.mean(missed) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("exact_comparisons", [10**10, 0])
def test_thousands_of_nearly_equal_hashes_stay_linked_in_bounded_space(monkeypatch, exact_comparisons):
    monkeypatch.setattr(neighbours, "MAX_EXACT_COMPARISONS", exact_comparisons)
    monkeypatch.setattr(hash_tables, "TABLES", 40)
    frames = np.zeros((3000, 32), np.uint8)
    frames[:, :2] = np.arange(3000, dtype=np.uint16)[:, None].view(np.uint8)
    near = find_neighbours(frames[None], MAX_HASH_DISTANCE_BITS)
    assert len(near.images) <= 3000 * hash_tables.MAX_NEIGHBOURS * (1 if exact_comparisons else 40)
    linked = {0}
    for one, other in sorted(zip(near.images.tolist(), near.viewed.tolist(), strict=True), key=lambda pair: pair[1]):
        if one in linked:
            linked.add(other)
    assert len(linked) == 3000


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_has_no_neighbours(count):
    near = find_neighbours(np.zeros((7, count, 32), np.uint8), MAX_HASH_DISTANCE_BITS)
    assert [len(column) for column in near[:4]] == [0] * 4
