"""Batches, the reference network, augmentation, training and what comes out of it."""

import ctypes
import gc
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance

from deepfake_core.config import AugmentationParameters
from deepfake_core.data.images import Images, load_images
from deepfake_core.detector import Detector, decode_image, resize_image
from deepfake_core.errors import ConfigurationError, LockedError, ModelError
from deepfake_core.evaluation.confusion import Confusion
from deepfake_core.models import CANDIDATES, efficientnet_lite0
from deepfake_core.reports import plots
from deepfake_core.training import augmentation, checkpoints, degradation, fit
from deepfake_core.training.augmentation import degrade_image
from deepfake_core.training.batches import Batches
from deepfake_core.training.fit import Training, train_candidate
from deepfake_core.training.optimizer import FusedAdam
from tests.builders import (
    RECIPE,
    ROOT,
    SIZE,
    STILL,
    draw_image,
    encode,
    faces,
    forbid,
    hold_data,
    prepare,
    stripes,
    write_zip,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    return prepare(folder / "data", write_zip(folder / "a.zip", faces(20)))


def test_cached_images_are_what_serving_would_see(dataset):
    images = load_images(dataset, "train", SIZE)
    assert len(images) == len(dataset.split("train"))
    for position, row in enumerate(images.rows.itertuples()):
        served = resize_image(decode_image((dataset.path / row.path).read_bytes()), SIZE)
        assert np.array_equal(images.pixels[position], served)
        assert images.labels[position] == (1 if row.path.startswith("train/fake/") else 0)


def test_images_are_decoded_once_per_size(dataset, monkeypatch):
    load_images(dataset, "val", SIZE)
    forbid(monkeypatch, "deepfake_core.data.images.open_image")
    load_images(dataset, "val", SIZE)
    with pytest.raises(AssertionError, match="open_image must not be called"):
        load_images(dataset, "val", SIZE + 1)
    assert not list(dataset.store.batches().rglob(".*"))


def test_a_damaged_cache_is_written_again(dataset, caplog):
    images = load_images(dataset, "val", SIZE)
    expected = np.array(images.pixels)
    file = Path(images.pixels.filename)
    content = bytearray(file.read_bytes())
    content[-1] ^= 0xFF
    file.write_bytes(content)
    assert np.array_equal(load_images(dataset, "val", SIZE).pixels, expected)
    assert "does not have the checksum" in caplog.text


@pytest.fixture(scope="module")
def uncached(dataset, tmp_path_factory):
    """The same data set, of which no decoded pixels are kept."""
    folder = tmp_path_factory.mktemp("uncached")
    return prepare(folder / "data", dataset.store.folder.parent / "a.zip", cache_gb=0)


def test_what_the_cache_may_not_hold_is_decoded_as_it_is_read(dataset, uncached, caplog):
    caplog.set_level("INFO")
    kept, read = (load_images(one, "train", SIZE) for one in (dataset, uncached))
    assert "train: images are decoded as they are read," in caplog.text
    assert not list(uncached.store.batches().rglob("*.npy"))
    assert (kept.rows["sha256"] == read.rows["sha256"]).all()
    assert np.array_equal(kept.pixels, read.pixels[:])
    assert np.array_equal(kept.pixels[3], read.pixels[3])
    some = kept.labels == 1
    assert np.array_equal(kept.select(some).pixels[2:5], read.select(some).pixels[2:5])
    ours, theirs = (Batches(images, 16, AugmentationParameters(), seed=1) for images in (kept, read))
    for number in range(len(ours)):
        assert all(map(np.array_equal, ours[number], theirs[number]))


@pytest.fixture
def fresh(dataset, tmp_path):
    """The same data set, of which nothing was decoded yet."""
    return prepare(tmp_path / "fresh", dataset.store.folder.parent / "a.zip")


def test_what_is_decoded_as_it_is_read_is_kept_once_all_was_read(dataset, fresh, caplog, monkeypatch):
    caplog.set_level("INFO")
    expected = load_images(dataset, "train", SIZE).pixels
    once = load_images(fresh, "train", SIZE, decode="once").pixels
    order = np.random.default_rng(0).permutation(len(once))
    with ThreadPoolExecutor(4) as pool:
        parts = np.array_split(order, 7)
        for part, pixels in zip(parts[1:], pool.map(once.__getitem__, parts[1:]), strict=True):
            assert np.array_equal(pixels, expected[part])
    assert np.array_equal(once[int(order[0])], expected[order[0]])
    assert "images decoded at" not in caplog.text
    assert np.array_equal(once[:], expected)
    assert f"train: {len(once)} images decoded at {SIZE} x {SIZE}" in caplog.text
    forbid(monkeypatch, "deepfake_core.data.images.DecodedOnRead.decode")
    assert np.array_equal(once[::2], expected[::2])
    kept = load_images(fresh, "train", SIZE, decode="once").pixels
    assert isinstance(kept, np.memmap)
    assert np.array_equal(kept, expected)
    assert not list(fresh.store.batches().rglob(".*"))


def test_where_not_all_was_read_nothing_is_left(fresh):
    once = load_images(fresh, "train", SIZE, decode="once").pixels
    assert len(once[:3]) == 3
    del once
    gc.collect()
    assert not [path for path in fresh.store.batches().rglob("*") if path.is_file()]


@pytest.mark.slow
def test_training_that_decodes_as_it_reads_is_the_same_and_leaves_the_files(dataset, fresh, tmp_path):
    histories = []
    for one, decode in ((dataset, "now"), (fresh, "once")):
        train, val = (load_images(one, split, SIZE, decode=decode) for split in ("train", "val"))
        training = Training("cnn", RECIPE.model_copy(update={"epochs": 2}))
        histories.append(train_candidate(training, train, val, tmp_path / decode, feeding="host").history)
    losses = [history[["loss", "accuracy", "val_loss", "val_accuracy"]] for history in histories]
    pd.testing.assert_frame_equal(*losses)
    assert {file.name for file in fresh.store.batches().rglob("*.npy")} == {"train.npy", "val.npy"}


@pytest.mark.slow
@pytest.mark.parametrize("feeding", ["host", pytest.param("streamed", marks=pytest.mark.sweep)])
def test_training_is_the_same_without_a_cache(feeding, dataset, uncached, tmp_path):
    histories = []
    for one in (dataset, uncached):
        train, val = (load_images(one, split, SIZE) for split in ("train", "val"))
        training = Training("cnn", RECIPE.model_copy(update={"epochs": 2}))
        folder = tmp_path / one.store.folder.parent.name
        histories.append(train_candidate(training, train, val, folder, feeding=feeding).history)
    losses = [history[["loss", "accuracy", "val_loss", "val_accuracy"]] for history in histories]
    pd.testing.assert_frame_equal(*losses)


def test_an_epoch_shows_each_image_once_and_the_next_in_another_order():
    images = stripes(50, 0)
    shuffled = Batches(images, 16, STILL, seed=3)

    def epoch(number: int) -> list[bytes]:
        shuffled.start_epoch(number)
        return [image.tobytes() for i in range(len(shuffled)) for image in shuffled[i][0]]

    first, second = epoch(0), epoch(1)
    assert len(shuffled) == 4
    assert sorted(first) == sorted(second) == sorted(image.tobytes() for image in images.pixels)
    assert first != second
    assert epoch(0) == first


def test_fit_gets_the_batches_of_the_epoch_in_their_order():
    shuffled = Batches(stripes(50, 0), 16, STILL.model_copy(update={"crop": 0.75}), seed=3)
    pipeline = shuffled.for_fit()
    for epoch in (0, 1):
        shuffled.start_epoch(epoch)
        seen = list(pipeline)
        assert len(seen) == len(shuffled)
        for position, (pixels, labels) in enumerate(seen):
            assert np.array_equal(pixels, shuffled[position][0])
            assert np.array_equal(labels, shuffled[position][1])
            assert (pixels.dtype, labels.dtype) == ("uint8", "float32")


@pytest.mark.slow
def test_each_epoch_of_fit_fetches_its_own_order():
    asked = []

    class Noted(Batches):
        def start_epoch(self, epoch):
            self.epoch = epoch
            super().start_epoch(epoch)

        def __getitem__(self, index):
            asked.append((self.epoch, int(index)))
            return super().__getitem__(index)

    noted = Noted(stripes(50, 0), 16, STILL, seed=3)
    model = CANDIDATES["cnn"].build(RECIPE)
    model.compile(FusedAdam(0.001), "binary_crossentropy")
    pipeline = noted.for_fit()
    asked.clear()
    model.fit(pipeline, epochs=3, shuffle=False, callbacks=[checkpoints.Reseed(noted, 3)], verbose=0)
    assert sorted(asked) == [(epoch, index) for epoch in range(3) for index in range(len(noted))]


@pytest.mark.parametrize("weight_decay", [None, 0.01])
def test_the_fused_optimizer_is_adam(weight_decay):
    def learn(kind: type[keras.optimizers.Adam]) -> list[np.ndarray]:
        random = np.random.default_rng(0)
        weights = [keras.Variable(random.normal(size=shape), dtype="float32") for shape in ((3, 3, 4, 8), (8,))]
        optimizer = kind(keras.optimizers.schedules.CosineDecay(0.01, 10), weight_decay=weight_decay)
        optimizer.exclude_from_weight_decay(var_list=weights[1:])
        for _ in range(6):
            optimizer.apply([keras.ops.cast(random.normal(size=one.shape), "float32") for one in weights], weights)
        return [keras.ops.convert_to_numpy(one) for one in (*weights, *optimizer.variables)]

    for ours, kerass in zip(learn(FusedAdam), learn(keras.optimizers.Adam), strict=True):
        np.testing.assert_allclose(ours, kerass, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("schedule", "last"), [("constant", 0.01), ("cosine", 0.0)])
def test_the_learning_rate_rises_over_its_warm_up_by_either_schedule(schedule, last):
    recipe = RECIPE.model_copy(update={"learning_rate": 0.01, "warmup_epochs": 2, "schedule": schedule})
    weight = keras.Variable(0.0)
    optimizer = fit.make_optimizer(recipe, "all", steps=40, epoch_steps=10)
    rates = []
    for _ in range(41):
        rates.append(float(optimizer.learning_rate))
        optimizer.apply([keras.ops.zeros(())], [weight])
    assert rates[:21] == pytest.approx([0.01 * step / 20 for step in range(21)], abs=1e-6)
    assert rates[40] == pytest.approx(last, abs=1e-6)


def test_batches_are_freed_when_their_training_ends():
    batches = Batches(stripes(20, 0), 8, STILL, seed=0)
    pipeline = batches.for_fit()
    assert len(list(pipeline)) == 3
    freed = weakref.ref(batches)
    del batches
    gc.collect()
    assert freed() is None


def test_pixels_and_labels_stay_together():
    pixels, labels = Batches(stripes(40, 0), 40, STILL, seed=0)[0]
    bright = pixels[:, :, : SIZE // 2].mean(axis=(1, 2, 3)) > 100
    assert np.array_equal(bright, labels == 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["recompression", "blur", "resize"])
def test_each_degradation_changes_its_share_of_the_images_and_removes_detail(kind):
    images = stripes(200, 0)
    batches = Batches(images, 200, STILL.model_copy(update={kind: 0.5}), seed=0)
    degraded = batches[0][0]
    changed = (degraded != images.pixels).any(axis=(1, 2, 3))
    assert 70 < changed.sum() < 130
    assert np.array_equal(degraded, batches[0][0])
    detail = [np.abs(np.diff(pixels[changed].astype(float), axis=2)).mean() for pixels in (images.pixels, degraded)]
    assert detail[1] < detail[0]
    assert Batches(images, 200, STILL.model_copy(update={kind: 1.0}))[0][0].tolist() == images.pixels.tolist()


@pytest.mark.slow
def test_colours_change_in_their_share_of_the_images_and_not_from_pixel_to_pixel():
    images = stripes(200, 0)
    batches = Batches(images, 200, STILL.model_copy(update={"colours": 0.5}), seed=0)
    pixels = batches[0][0]
    changed = (pixels != images.pixels).any(axis=(1, 2, 3))
    assert 70 < changed.sum() < 130
    assert np.array_equal(pixels, batches[0][0])
    plain = Batches(images, 200, STILL, seed=0).changes
    assert np.array_equal(plain.corners, batches.changes.corners)  # nothing else is drawn in another way
    assert np.array_equal(plain.matrices, batches.changes.matrices)
    grey = np.repeat(images.pixels[:1, :, :, :1], 3, axis=3)[0]
    shades = degrade_image(grey, batches.changes.colours[changed.argmax()], SIZE, 0.0, 0)
    assert np.ptp(shades.astype(int), axis=2).max() <= 1  # grey stays grey


@pytest.mark.parametrize(
    ("factors", "enhance"),
    [
        ((1.4, 1, 1), lambda image: ImageEnhance.Brightness(image).enhance(1.4)),
        ((1, 1, 0.3), lambda image: ImageEnhance.Color(image).enhance(0.3)),
        ((1, 1, 1.5), lambda image: ImageEnhance.Color(image).enhance(1.5)),
        ((1, 0.7, 1), lambda image: Image.blend(Image.new("RGB", image.size, (128, 128, 128)), image, 0.7)),
    ],
)
def test_brightness_contrast_and_saturation_are_pillows(factors, enhance, monkeypatch):
    """But for contrast, which is about a middle grey, not about the image's mean."""
    for name, factor in zip(("BRIGHTNESS", "CONTRAST", "SATURATION"), factors, strict=True):
        monkeypatch.setattr(augmentation, name, (factor, factor))
    colours = augmentation.draw_colours(STILL.model_copy(update={"colours": 1.0}), 1, np.random.default_rng(0))[0]
    image = draw_image(3, size=64, cells=40)
    expected = np.asarray(enhance(image), int)
    assert np.abs(degrade_image(np.asarray(image), colours, 64, 0.0, 0) - expected).max() <= 1  # Pillow rounds down


@pytest.mark.slow
def test_crops_are_parts_of_their_images_at_random_places():
    images = stripes(60, 0)
    crops, labels = Batches(images, 60, STILL.model_copy(update={"crop": 0.75}), seed=0)[0]
    assert crops.shape == (60, 24, 24, 3)
    places = set()
    for crop, label in zip(crops, labels, strict=True):
        offsets = [(y, x) for y in range(9) for x in range(9)]
        found = [
            (at, y, x)
            for at, image in enumerate(images.pixels)
            for y, x in offsets
            if np.array_equal(image[y, x : x + 24], crop[0])
        ]
        ((at, y, x),) = found
        assert np.array_equal(images.pixels[at, y : y + 24, x : x + 24], crop)
        assert images.labels[at] == label
        places.add((y, x))
    assert len(places) > 20
    assert {axis: {place[axis] for place in places} for axis in (0, 1)} == {0: set(range(9)), 1: set(range(9))}
    whole, _ = Batches(images, 60, STILL.model_copy(update={"crop": 0.75}))[0]
    assert np.array_equal(whole, images.pixels)  # validation sees whole images


def test_crops_are_for_networks_that_take_any_size(tmp_path):
    recipe = RECIPE.model_copy(update={"augmentation": STILL.model_copy(update={"crop": 0.75})})
    with pytest.raises(ConfigurationError, match=r"`training.augmentation.crop` must be 1 for cnn.*Received: 0.75"):
        train_candidate(Training("cnn", recipe), stripes(8, 0), stripes(8, 1), tmp_path)


def warp_on_accelerator(pixels, parameters):
    batches = Batches(Images(pixels, np.zeros(len(pixels), np.int8), pd.DataFrame()), len(pixels), parameters, seed=0)
    corners, matrices = batches.changes.corners, batches.changes.matrices
    warped = degradation.warp(pixels, corners, matrices, pixels.shape[1], parameters.resamples)
    return keras.ops.convert_to_numpy(warped)


def warp_on_cpu(pixels, parameters):
    images = Images(pixels, np.zeros(len(pixels), np.int8), pd.DataFrame())
    return Batches(images, len(pixels), parameters, seed=0)[0][0].astype(np.float32)


both_warps = pytest.mark.parametrize("warp", [warp_on_accelerator, warp_on_cpu])


@both_warps
def test_augmentation_without_change_is_the_identity(warp):
    images = stripes(4, 0).pixels
    assert np.allclose(warp(images, STILL), images, atol=1e-3)


@both_warps
def test_pixels_beyond_the_edge_repeat_it(warp):
    images = np.zeros((40, 32, 32, 3), np.uint8)
    images[:] = np.linspace(50, 200, 32).astype(np.uint8)[:, None]
    moved = warp(images, STILL.model_copy(update={"width_shift": 0.5}))
    assert moved.min() >= 50
    assert moved.max() <= 200
    assert (moved[:, 0, 0, 0] == 50).any()
    assert (moved[:, 0, -1, 0] == 200).any()


@both_warps
def test_flip_mirrors_about_half_of_the_images(warp):
    images = stripes(200, 0).pixels
    out = warp(images, STILL.model_copy(update={"horizontal_flip": True}))
    flipped = [np.allclose(after, before[:, ::-1], atol=1e-2) for before, after in zip(images, out, strict=True)]
    kept = [np.allclose(after, before, atol=1e-2) for before, after in zip(images, out, strict=True)]
    assert sum(flipped) + sum(kept) == 200
    assert 70 < sum(flipped) < 130


@both_warps
def test_without_rotation_and_zoom_no_pixel_is_resampled(warp):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    known = {pixel.tobytes() for pixel in image.reshape(-1, 3)}
    out = warp(np.repeat(image[None], 50, 0), STILL.model_copy(update={"width_shift": 0.2, "horizontal_flip": True}))
    assert {pixel.tobytes() for pixel in np.round(out, 2).astype(np.uint8).reshape(-1, 3)} <= known
    assert len({one.tobytes() for one in out}) > 10


@pytest.mark.parametrize(
    ("parameters", "start", "axis", "lowest", "highest"),
    [
        pytest.param({"width_shift": 0.25}, (16, 16), 1, 8, 24, id="width shift"),
        pytest.param({"height_shift": 0.25}, (16, 16), 0, 8, 24, id="height shift"),
        pytest.param({"zoom": 0.5}, (16, 22), 1, 16 + 6 / 1.5, 16 + 6 / 0.5, id="zoom across"),
        pytest.param({"zoom": 0.5}, (22, 16), 0, 16 + 6 / 1.5, 16 + 6 / 0.5, id="zoom down"),
        pytest.param({"rotation": 90.0}, (16, 28), 0, 4, 28, id="a quarter turn either way"),
        pytest.param({"rotation": 30.0}, (16, 28), 0, 10, 22, id="a twelfth of a turn either way"),
    ],
)
@both_warps
def test_each_kind_of_augmentation_moves_a_dot_as_far_as_it_may(warp, parameters, start, axis, lowest, highest):
    images = np.zeros((300, 33, 33, 3), np.uint8)  # the centre is at 16, 16
    y, x = start
    images[:, y - 1 : y + 2, x - 1 : x + 2] = 255
    light = warp(images, STILL.model_copy(update=parameters))[..., 0]
    places = np.arange(33)
    found = np.stack([light.sum(axis=2) @ places, light.sum(axis=1) @ places]) / light.sum(axis=(1, 2))
    reached, other = found[axis], found[1 - axis]
    assert reached.min() == pytest.approx(lowest, abs=0.6)
    assert reached.max() == pytest.approx(highest, abs=0.6)
    if "rotation" in parameters:  # it stays on its circle
        assert np.hypot(*(found - 16)) == pytest.approx(12, abs=0.2)
    else:
        assert other == pytest.approx(16, abs=0.05)


@pytest.mark.slow
def test_training_learns_and_keeps_the_lowest_validation_loss(candidate):
    history = candidate.history
    assert history["epoch"].tolist() == [1, 2, 3, 4]
    val = stripes(32, 1)
    checkpoint = keras.saving.load_model(candidate.folder / "checkpoint.keras")
    scores = checkpoint.predict(val.pixels, verbose=0)[:, 0]
    loss = float(np.mean(keras.ops.binary_crossentropy(val.labels.astype(np.float32), scores)))
    assert loss == pytest.approx(history["val_loss"].min(), rel=1e-3)
    assert history["val_loss"].iloc[candidate.best_epoch - 1] == history["val_loss"].min()
    assert ((scores >= 0.5) == val.labels).mean() > 0.9


def test_checkpoint_holds_no_augmentation(candidate):
    names = [type(layer).__name__ for layer in keras.saving.load_model(candidate.folder / "checkpoint.keras").layers]
    assert names[0] == "Rescaling"
    assert "Augmentation" not in names


@pytest.mark.slow
def test_the_served_model_scores_as_the_trained_one(candidate):
    images = stripes(100, 2)
    checkpoint = keras.saving.load_model(candidate.folder / "checkpoint.keras")
    difference = Detector(candidate.folder).score(images.pixels) - checkpoint.predict(images.pixels, verbose=0)[:, 0]
    assert np.abs(difference).max() < 1e-5


def test_detector_json_gives_the_scores_their_meaning(candidate):
    description = json.loads((candidate.folder / "detector.json").read_text())
    assert description == {
        "architecture": "cnn",
        "trained_in": "float32",
        "image_size": SIZE,
        "threshold": 0.5,
        "class_names": ["real", "fake"],
    }


def test_one_unreadable_image_harms_no_other(candidate):
    good = encode(draw_image(1))
    first, second, third = Detector(candidate.folder).predict([good, b"no image", good])
    assert first == third
    assert first.error is None
    assert second.label is None
    assert second.error == "must be a JPEG, PNG or WebP image"


@pytest.mark.slow
def test_training_stops_early_and_repeats_with_its_seed(tmp_path):
    recipe = RECIPE.model_copy(update={"epochs": 30, "patience": 1, "learning_rate": 0.03, "batch_size": 8})
    noise = stripes(32, 0)
    noise = Images(noise.pixels, np.random.default_rng(0).integers(0, 2, 32).astype(np.int8), noise.rows)
    histories = []
    for name in ("first", "second"):
        reported = []
        candidate = train_candidate(
            Training("cnn", recipe),
            noise,
            noise,
            tmp_path / name,
            on_epoch=lambda epoch, _, seen=reported: seen.append(epoch),
        )
        assert reported == candidate.history["epoch"].tolist()
        histories.append(candidate.history[["epoch", *checkpoints.EPOCH_METRICS]])
    assert len(histories[0]) < 30
    assert np.allclose(histories[0], histories[1], rtol=1e-4)


class Killed(BaseException):
    """Ends a training as a kill would, but for this process."""


def train_transfer(folder, die_in_epoch=None):
    """Train with all that is random (order, augmentation, degradation, dropout), a frozen phase and a schedule."""
    recipe = CANDIDATES["efficientnet_lite0"].RECIPE
    augmentation = recipe.augmentation.model_copy(update={"recompression": 0.5, "crop": 0.75})
    recipe = recipe.model_copy(
        update={"image_size": SIZE, "epochs": 4, "batch_size": 16, "head_epochs": 1, "augmentation": augmentation}
    )
    reported = []

    def on_epoch(epoch, _):
        reported.append(epoch)
        if epoch == die_in_epoch:  # recorded, but not backed up
            raise Killed

    with pytest.MonkeyPatch.context() as patch:  # a backbone of the same layers, but few of them, and untrained
        patch.setattr(efficientnet_lite0, "BLOCKS", efficientnet_lite0.BLOCKS[:2])
        patch.setattr(efficientnet_lite0, "load_imagenet", lambda backbone: None)  # noqa: ARG005
        train_candidate(
            Training("efficientnet_lite0", recipe, seed=1), stripes(48, 0), stripes(16, 1), folder, on_epoch=on_epoch
        )
    return reported


def die_between_weights_and_epoch(epoch):
    """Make Keras die after it wrote an epoch's weights, before it writes that epoch's number."""
    write = keras.callbacks.BackupAndRestore._save_model

    def save(self):
        number = Path(self.backup_dir) / "training_metadata.json"
        before = number.read_text() if number.exists() else None
        write(self)
        if self._current_epoch == epoch:
            number.write_text(before) if before else number.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    keras.callbacks.BackupAndRestore._save_model = save


@pytest.mark.sweep
@pytest.mark.process
@pytest.mark.slow
def test_a_killed_training_goes_on_and_ends_as_an_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train_transfer(whole) == [1, 2, 3, 4]
    code = "import sys; from pathlib import Path; from tests.training.test_fit import *; "
    code += "die_between_weights_and_epoch(2); train_transfer(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(killed)]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL

    with pytest.raises(Killed):
        train_transfer(killed, die_in_epoch=3)
    assert train_transfer(killed) == [1, 2, 3, 4]
    uninterrupted, resumed = (
        pd.read_csv(folder / "history.csv")[list(checkpoints.EPOCH_METRICS)] for folder in (whole, killed)
    )
    assert np.allclose(uninterrupted, resumed, rtol=1e-3, atol=1e-5)
    images = stripes(32, 5).pixels
    scores = [Detector(folder / "detector").score(images) for folder in (whole, killed)]
    assert np.allclose(*scores, rtol=1e-3, atol=1e-4)


def test_a_finished_training_is_not_repeated(candidate, tmp_path):
    shutil.copytree(candidate.folder.parent, tmp_path / "again")
    checkpoint = tmp_path / "again" / "detector" / "checkpoint.keras"
    before = checkpoint.stat().st_mtime_ns
    again = train_candidate(Training("cnn", RECIPE, seed=1), stripes(96, 0), stripes(32, 1), tmp_path / "again")
    assert again.history.equals(candidate.history)
    assert checkpoint.stat().st_mtime_ns == before


def test_a_loss_that_is_no_number_is_said_with_the_way_out(tmp_path):
    record = checkpoints.EpochRecorder("cnn", RECIPE, tmp_path, tmp_path, None, None)
    record.on_epoch_begin(0)
    with pytest.raises(ModelError, match=r"must stay finite. Received: nan in epoch 1 of cnn.*Lower training"):
        record.on_epoch_end(0, dict.fromkeys(checkpoints.EPOCH_METRICS, float("nan")))
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_two_runs_never_train_in_one_folder(tmp_path):
    with hold_data(tmp_path, "a training of cnn"), pytest.raises(LockedError, match=r"a training of cnn.*its seed"):
        train_candidate(Training("cnn", RECIPE), stripes(8, 0), stripes(8, 1), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs Linux's /proc and glibc's malloc_trim")
@pytest.mark.sweep
def test_memory_stays_flat_from_epoch_to_epoch(tmp_path):
    allocator = ctypes.CDLL("libc.so.6")

    def resident_bytes() -> int:
        gc.collect()
        allocator.malloc_trim(0)  # else freed memory that the allocator holds back would count
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    memory = []
    train_candidate(
        Training("cnn", RECIPE.model_copy(update={"epochs": 16, "patience": 16, "batch_size": 256})),
        stripes(4096, 0),
        stripes(32, 1),
        tmp_path,
        on_epoch=lambda *_: memory.append(resident_bytes()),
    )
    growth = min(memory[11:]) - min(memory[3:8])  # what a batch needs for a moment comes and goes by 40 MB
    assert growth < 45_000_000  # keeping each epoch's pixels would take 100 MB in these 8 epochs


@pytest.mark.slow
def test_figures_show_what_was_measured(candidate, dataset):
    history = plots.plot_history(candidate.history, candidate.best_epoch)
    assert [axes.get_title() for axes in history.axes] == ["loss", "accuracy"]
    assert list(history.axes[0].lines[1].get_ydata()) == candidate.history["val_loss"].tolist()

    confusion = plots.plot_confusion(Confusion(4, 3, 2, 1), 0.5)
    assert [text.get_text().split()[0] for text in confusion.axes[0].texts] == ["2", "3", "1", "4"]

    rows = dataset.split("train")
    histogram = plots.plot_class_histogram(rows, "train")
    assert sum(bar.get_height() for bar in histogram.axes[0].patches) == len(rows)

    images = stripes(40, 3)
    scores = np.where(images.labels == 1, 0.88, 0.12)
    scores[[4, 7]] = 0.95, 0.02
    assert plots.choose_worst_mistakes(images.labels, scores, 0.5).tolist() == [7, 4]
    typical = plots.choose_typical(images.labels, scores)
    assert len(set(typical)) == 16
    assert images.labels[typical].tolist() == [1] * 8 + [0] * 8
    explained = plots.plot_explained(images.pixels[typical[:3]], np.zeros((3, 4, 4)), ["a", "b", "c"], "heading")
    assert [axes.get_title(loc="left") for axes in explained.axes if axes.images] == ["a", "", "b", "", "c", ""]

    reliability = plots.plot_reliability(images.labels, scores)
    mean_score, share = (line.tolist() for line in reliability.axes[0].lines[1].get_data())
    assert mean_score == pytest.approx([0.02, 0.12, 0.88, 0.95])
    assert share == pytest.approx([1, 0, 1, 0])

    table = pd.DataFrame({"change": ["blur", "blur", "noise"], "strength": [1, 2, 8], "auc": [0.9, 0.7, 0.8]})
    table = table.assign(false_alarm_rate=[0.1, 0.3, 0.2]).assign(
        auc_lost=0.95 - table["auc"], false_alarms_added=[0.05, 0.25, 0.15]
    )
    robustness = plots.plot_robustness(table)
    assert [axes.get_title() for axes in robustness.axes] == ["blur", "noise"]
    for axes, expected in zip(robustness.axes, ([0.9, 0.7, 0.1, 0.3], [0.8, 0.2]), strict=True):
        dotted, drawn = axes.lines[::2], axes.lines[1::2]
        assert [value for line in drawn for value in line.get_ydata()] == expected
        assert [line.get_ydata()[0] for line in dotted] == pytest.approx([0.95, 0.05])

    sources = np.where(np.arange(40) < 20, "one", "two")
    assert [axes.get_title() for axes in plots.plot_scores(images.labels, scores, sources, 0.5).axes] == ["one", "two"]

    curves = plots.plot_curves(images.labels, scores, 0.5)
    assert [axes.get_title() for axes in curves.axes] == ["ROC", "Precision and recall"]

    batch = plots.plot_training_batch(images, RECIPE, seed=0)
    assert len(batch.axes) == 16
    assert {axes.get_title() for axes in batch.axes} == {"real", "fake"}
