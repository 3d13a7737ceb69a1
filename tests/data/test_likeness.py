import numpy as np
import pytest
from PIL import Image

from deepfake_core.data.hashes import shrink_images
from deepfake_core.data.likeness import measure_difference, measure_likeness, measure_pairs
from deepfake_core.data.links import MAX_COPY_DIFFERENCE, MIN_LIKENESS
from tests.builders import CHANGES, draw_image


def look(image: Image.Image) -> np.ndarray:
    return shrink_images(np.asarray(image.convert("L"))[None]).astype(np.float32)


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_the_same_picture(change):
    for seed in range(5):
        image = draw_image(seed, 256, 24)
        one, other = look(image), look(CHANGES[change](image))
        assert measure_likeness(one, other) > 0.9
        assert measure_difference(one, other) <= MAX_COPY_DIFFERENCE


@pytest.mark.parametrize("box", [(8, 8, 248, 248), (12, 0, 256, 250), (0, 14, 246, 256)])
def test_crops_are_alike_but_not_the_same_picture(box):
    for seed in range(5):
        image = draw_image(seed, 256, 24)
        one, other = look(image), look(image.crop(box))
        assert measure_likeness(one, other) > MIN_LIKENESS
        assert measure_difference(one, other) > MAX_COPY_DIFFERENCE


def test_an_edit_is_alike_but_not_the_same_picture():
    for seed in range(5):
        image = draw_image(seed, 256, 24)
        edited = image.copy()
        edited.paste(draw_image(seed + 100, 64), (96, 160))
        one, other = look(image), look(edited)
        assert measure_likeness(one, other) > MIN_LIKENESS
        assert measure_difference(one, other) > MAX_COPY_DIFFERENCE


def test_other_pictures_are_not_alike():
    pictures = np.concatenate([look(draw_image(seed, 256, 24)) for seed in range(20)])
    first, second = np.triu_indices(20, 1)
    assert measure_likeness(pictures[first], pictures[second]).max() < 0.2


def test_pairs_are_measured_one_by_one_whatever_stands_beside_them():
    pictures = [draw_image(seed, 256, 24) for seed in range(40)]
    pictures += [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in pictures]
    thumbnails = np.concatenate([look(image) for image in pictures]).astype(np.uint8)
    first = np.tile(np.arange(40), 20)
    second, mirrored = first + 40, np.arange(800) % 2 == 1
    likeness, difference = measure_pairs(thumbnails, first, second, mirrored)
    assert (likeness[mirrored] == 1).all()
    assert (difference[mirrored] == 0).all()
    assert (likeness[~mirrored] < MIN_LIKENESS).all()
    alone = measure_pairs(thumbnails, first[5:6], second[5:6], mirrored[5:6])
    assert alone[:, 0].tolist() == [likeness[5], difference[5]]


def test_no_pairs_have_no_measures():
    none = np.empty(0, int)
    assert measure_pairs(np.empty((0, 32, 32), np.uint8), none, none, none.astype(bool)).shape == (2, 0)
