"""Degradations and the warp on batches, compiled by both backends, against Pillow, TurboJPEG and OpenCV."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import keras
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFilter

from deepfake_core.config import AugmentationParameters
from deepfake_core.training import degradation
from deepfake_core.training.augmentation import SAME_COLOURS, degrade_image, draw_colours, draw_matrices
from tests.builders import FACES, ROOT, draw_image, draw_portrait, needs_faces, needs_jax

pytestmark = [pytest.mark.slow, pytest.mark.sweep]

COUNT = 16
SIZES = (150, 72, 75)
"""No multiple of 16: blocks are filled up. 75 is odd, and so is half of 150."""
KINDS = ["drawn", pytest.param("faces", marks=needs_faces)]


def load(kind, size):
    """Return uint8 images (COUNT, size, size, 3)."""
    if kind == "drawn":
        noise = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
        drawn = [draw_portrait(seed, size) for seed in range(6)] + [draw_image(seed, size, 24) for seed in range(8)]
        return np.stack([*map(np.asarray, drawn), *noise])
    files = sorted((FACES / "faces").rglob("*.jpg"))
    return np.stack([np.asarray(Image.open(file).convert("RGB").resize((size, size))) for file in files[::150][:COUNT]])


def spread(lowest, highest, neutral, dtype):
    """Return an argument per image, of which every fourth is neutral."""
    arguments = np.linspace(lowest, highest, COUNT).round(3).astype(dtype)
    arguments[::4] = neutral
    return arguments


def give_arguments(size):
    """Return the arguments of each function besides the images, by its name: `move` is the warp by whole pixels."""
    random = np.random.default_rng(1)
    side = size * 3 // 4
    corners = random.integers(0, size - side + 1, (COUNT, 2)).astype(np.int32)
    corners[0], corners[-1] = 0, size - side  # the first and the last pixel of all

    turned = draw_matrices(AugmentationParameters(), COUNT, side, random)
    turned[::5] = 1, 0, 0, 0, 1, 0
    moved = draw_matrices(AugmentationParameters(rotation=0, zoom=0), COUNT, side, random)
    colours = draw_colours(AugmentationParameters(colours=1), COUNT, random)
    colours[::4] = SAME_COLOURS
    return {
        "recolour": (colours,),
        "recompress": (spread(40, 95, 0, np.int32),),
        "rescale": (spread(size // 2, size - 1, size, np.int32),),
        "blur": (spread(0.3, 1.5, 0, np.float32),),
        "warp": (corners, turned),
        "move": (corners, moved),
    }


def compute():
    """Return what each function makes of all images, compiled by the backend in use; by function, kind and size."""
    done, found = {}, ("drawn", "faces") if (FACES / "faces").is_dir() else ("drawn",)
    for size in SIZES:
        functions = {name: getattr(degradation, name) for name in ("recolour", "recompress", "rescale", "blur")}
        functions["warp"] = partial(degradation.warp, side=size * 3 // 4, resampled=True)
        functions["move"] = partial(degradation.warp, side=size * 3 // 4, resampled=False)
        images = {kind: load(kind, size) for kind in found}
        for name, arguments in give_arguments(size).items():
            run, dtype = compiled(functions[name]), np.uint8 if name == "move" else np.float32
            for kind in found:
                done[f"{name} {kind} {size}"] = np.asarray(run(images[kind].astype(dtype), *arguments))
    return done


def compiled(function):
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    import jax

    def loop(*arrays):
        shape = jax.eval_shape(function, *arrays)
        return jax.lax.fori_loop(0, 1, lambda *_: function(*arrays), jax.numpy.zeros(shape.shape, shape.dtype))

    return jax.jit(loop)


CHILD = "import sys, numpy; from tests.training.test_degradation import compute; numpy.savez(sys.argv[1], **compute())"
JAX = pytest.param("jax", marks=[pytest.mark.process, needs_jax])


@pytest.fixture(scope="module", params=["tensorflow", JAX])
def computed(request, tmp_path_factory):
    if request.param == keras.backend.backend():
        return compute()
    file: Path = tmp_path_factory.mktemp("computed") / "computed.npz"
    environment = {**os.environ, "KERAS_BACKEND": request.param}
    command = [sys.executable, "-c", CHILD, str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(file))


def compare(computed, name, kind, size, change):
    """Return the images, the mean squared and the mean absolute error of each that an argument changes.

    Asserts that results are whole, and that images with a neutral argument are as they were.

    Args:
        change: makes of a uint8 image and its argument what the CPU's libraries do.
    """
    images, result = load(kind, size), computed[f"{name} {kind} {size}"]
    (arguments,) = give_arguments(size)[name]
    assert result.dtype == np.float32
    assert np.array_equal(result, result.astype(np.uint8))
    assert np.array_equal(result[::4], images[::4])
    changed = [i for i in range(COUNT) if i % 4]
    expected = np.stack([change(images[i], arguments[i]) for i in changed])
    errors = result[changed] - expected
    untouched = np.abs(images[changed] - expected.astype(float)).mean((1, 2, 3))
    return np.square(errors).mean((1, 2, 3)), np.abs(errors).mean((1, 2, 3)), untouched


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_colours_are_those_of_the_cpu(computed, kind, size):
    def change(image, colours):
        return degrade_image(image, colours, size, 0.0, 0)

    _, errors, untouched = compare(computed, "recolour", kind, size, change)
    print("colours", kind, size, errors.mean(), errors.max(), untouched.mean())
    assert errors.max() < 0.01
    assert untouched.min() > 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_recompression_is_turbojpegs(computed, kind, size):
    def change(image, quality):
        return simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(image, int(quality), colorsubsampling="420"))

    squared, _, _ = compare(computed, "recompress", kind, size, change)
    ratios = 10 * np.log10(255**2 / squared)
    print("PSNR", kind, size, ratios.min(), np.median(ratios))
    assert ratios.min() > 55  # 40 is what is required; with the accurate DCT in place of TurboJPEG's, it is below 45


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_scaling_down_and_up_is_pillows(computed, kind, size):
    def change(image, side):
        small = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
        return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))

    _, errors, untouched = compare(computed, "rescale", kind, size, change)
    print("scaling", kind, size, errors.mean(), errors.max(), untouched.mean())
    assert errors.max() < 0.4  # grey levels; a GPU's TF32 costs 0.2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_blur_is_pillows(computed, kind, size):
    def change(image, radius):
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(float(radius))))

    _, errors, untouched = compare(computed, "blur", kind, size, change)
    print("blur", kind, size, errors.mean(), errors.max(), untouched.mean())
    assert errors.max() < 0.1  # at a radius of 1.5, weights are multiples of an 80th: some sums end in a half


def warp_square(image, corner, matrix, side):
    y, x = corner
    square = np.ascontiguousarray(image[y : y + side, x : x + side])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(square, matrix[:6].reshape(2, 3), (side, side), flags=flags, borderMode=cv2.BORDER_REPLICATE)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "greatest"), [("warp", 1), ("move", 0)])
def test_warp_is_opencvs_and_exact_for_whole_pixels(computed, name, greatest, kind, size):
    (corners, matrices), side = give_arguments(size)[name], size * 3 // 4
    images, result = load(kind, size), computed[f"{name} {kind} {size}"]
    expected = np.stack([warp_square(*one, side) for one in zip(images, corners, matrices, strict=True)])
    errors = np.abs(result - expected).mean((1, 2, 3))
    print(name, kind, size, errors.mean(), errors.max())
    assert errors.max() <= greatest  # grey levels: OpenCV rounds to a 32nd of a pixel, which is most in noise
    assert result.dtype == np.float32
    assert np.array_equal(result, result.astype(np.uint8))
    if name == "warp":
        assert np.array_equal(result[::5], expected[::5])  # by the identity
