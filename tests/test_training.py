"""Batches, the reference network, augmentation, training and what comes out of it."""

import json

import keras
import numpy as np
import pandas as pd
import pytest

from deepfake_core import batches, plots, training
from deepfake_core.batches import Batches, Images, load_images
from deepfake_core.config import AugmentationParameters, TrainingParameters
from deepfake_core.detector import Detector, decode_image, resize_image
from deepfake_core.metrics import Confusion
from deepfake_core.models import Augmentation, build_cnn
from tests.conftest import draw_image, encode, faces, write_zip
from tests.test_manifest import prepare

SIZE = 32
STILL = AugmentationParameters(rotation=0, width_shift=0, height_shift=0, zoom=0, horizontal_flip=False)


def stripes(count: int, seed: int) -> Images:
    """Make images that differ by class: fakes have a bright left half."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    pixels = random.integers(0, 120, (count, SIZE, SIZE, 3), dtype=np.uint8)
    pixels[labels == 1, :, : SIZE // 2] += 100
    return Images(pixels, labels.astype(np.int8), pd.DataFrame({"source": ["drawn"] * count}))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    return prepare(folder / "data", write_zip(folder / "a.zip", faces(20)))


@pytest.fixture(scope="module")
def candidate(tmp_path_factory):
    parameters = TrainingParameters(image_size=SIZE, epochs=4, batch_size=16, augmentation=STILL, seed=1)
    folder = tmp_path_factory.mktemp("candidate")
    return training.train_candidate("cnn", stripes(96, 0), stripes(32, 1), parameters, folder)


def test_cached_images_are_what_serving_would_see(dataset):
    images = load_images(dataset, "train", SIZE)
    assert len(images) == len(dataset.split("train"))
    for position, row in enumerate(images.rows.itertuples()):
        served = resize_image(decode_image((dataset.path / row.path).read_bytes()), SIZE)
        assert np.array_equal(images.pixels[position], served)
        assert images.labels[position] == (1 if row.path.startswith("train/fake/") else 0)


def test_images_are_decoded_once_per_size(dataset, monkeypatch):
    load_images(dataset, "val", SIZE)
    monkeypatch.setattr(batches, "decode_image", None)  # any decoding would fail
    load_images(dataset, "val", SIZE)
    with pytest.raises(TypeError):
        load_images(dataset, "val", SIZE + 1)
    assert not list((dataset.path.parent.parent / "batches").rglob(".*"))


def test_an_epoch_shows_each_image_once_and_the_next_in_another_order():
    images = stripes(50, 0)
    shuffled = Batches(images, 16, shuffle_seed=3)

    def epoch() -> list[bytes]:
        return [image.tobytes() for i in range(len(shuffled)) for image in shuffled[i][0]]

    first = epoch()
    shuffled.on_epoch_end()
    second = epoch()
    assert len(shuffled) == 4
    assert sorted(first) == sorted(second) == sorted(image.tobytes() for image in images.pixels)
    assert first != second


def test_pixels_and_labels_stay_together():
    pixels, labels = Batches(stripes(40, 0), 40, shuffle_seed=0)[0]
    bright = pixels[:, :, : SIZE // 2].mean(axis=(1, 2, 3)) > 100
    assert np.array_equal(bright, labels == 1)


def test_reference_cnn_is_the_published_one():
    model = build_cnn(150)
    assert model.input_shape == (None, 150, 150, 3)
    assert [(layer.filters, layer.kernel_size) for layer in model.layers if isinstance(layer, keras.layers.Conv2D)] == [
        (32, (3, 3)),
        (64, (3, 3)),
        (128, (3, 3)),
    ]
    convolutions = (27 + 1) * 32 + (9 * 32 + 1) * 64 + (9 * 64 + 1) * 128
    dense = (17 * 17 * 128 + 1) * 256 + 257
    assert model.count_params() == convolutions + dense


def test_augmentation_without_change_is_the_identity():
    images = stripes(4, 0).pixels.astype(np.float32)
    out = keras.ops.convert_to_numpy(Augmentation(STILL, seed=0)(images, training=True))
    assert np.allclose(out, images, atol=1e-3)


def test_augmentation_is_for_training_only():
    images = stripes(4, 0).pixels.astype(np.float32)
    layer = Augmentation(AugmentationParameters(), seed=0)
    assert np.array_equal(keras.ops.convert_to_numpy(layer(images, training=False)), images)
    assert not np.allclose(keras.ops.convert_to_numpy(layer(images, training=True)), images)


def test_flip_mirrors_about_half_of_the_images():
    images = stripes(200, 0).pixels.astype(np.float32)
    layer = Augmentation(STILL.model_copy(update={"horizontal_flip": True}), seed=0)
    out = keras.ops.convert_to_numpy(layer(images, training=True))
    flipped = [np.allclose(after, before[:, ::-1], atol=1e-2) for before, after in zip(images, out, strict=True)]
    kept = [np.allclose(after, before, atol=1e-2) for before, after in zip(images, out, strict=True)]
    assert sum(flipped) + sum(kept) == 200
    assert 70 < sum(flipped) < 130


@pytest.mark.parametrize(
    ("parameters", "axis", "reach"),
    [({"width_shift": 0.25}, 1, 8), ({"height_shift": 0.25}, 0, 8), ({"zoom": 0.5}, 1, 8), ({"rotation": 90.0}, 1, 16)],
)
def test_each_kind_of_augmentation_moves_a_dot_as_far_as_it_may(parameters, axis, reach):
    images = np.zeros((300, 33, 33, 3), np.float32)
    images[:, 16, 16] = 255.0  # the centre, which only shifts move
    images[:, 16, 32 if axis else 16] = 255.0
    layer = Augmentation(STILL.model_copy(update=parameters), seed=0)
    out = keras.ops.convert_to_numpy(layer(images, training=True))
    moved = np.abs(out - images).max(axis=(1, 2, 3)) > 50
    assert moved.mean() > 0.8
    if "shift" in next(iter(parameters)):
        centre = np.argmax(out[:, :, :, 0].max(axis=2 - axis), axis=1)
        assert np.abs(centre - 16).max() <= reach + 1 or axis


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


def test_the_served_model_scores_as_the_trained_one(candidate):
    images = stripes(100, 2)
    checkpoint = keras.saving.load_model(candidate.folder / "checkpoint.keras")
    difference = Detector(candidate.folder).score(images.pixels) - checkpoint.predict(images.pixels, verbose=0)[:, 0]
    assert np.abs(difference).max() < 1e-5


def test_detector_json_gives_the_scores_their_meaning(candidate):
    description = json.loads((candidate.folder / "detector.json").read_text())
    assert description == {
        "architecture": "cnn",
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


def test_training_stops_early_and_repeats_with_its_seed(tmp_path):
    parameters = TrainingParameters(image_size=SIZE, epochs=30, patience=1, learning_rate=0.03, batch_size=8)
    noise = stripes(32, 0)
    noise = Images(noise.pixels, np.random.default_rng(0).integers(0, 2, 32).astype(np.int8), noise.rows)
    histories = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        reported = []
        candidate = training.train_candidate(
            "cnn", noise, noise, parameters, tmp_path / name, lambda epoch, _, seen=reported: seen.append(epoch)
        )
        assert reported == candidate.history["epoch"].tolist()
        histories.append(candidate.history)
    assert len(histories[0]) < 30
    assert np.allclose(histories[0], histories[1], rtol=1e-4)


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
    scores = np.where(images.labels == 1, 0.9, 0.1)
    scores[[4, 7]] = 0.95, 0.02
    mistakes = plots.plot_worst_mistakes(images, scores, 0.5)
    titles = [axes.get_title() for axes in mistakes.axes if axes.get_title()]
    assert titles == ["fake, P(fake) = 0.02", "real, P(fake) = 0.95"]

    curves = plots.plot_curves(images.labels, scores, 0.5)
    assert [axes.get_title() for axes in curves.axes] == ["ROC", "Precision and recall"]

    batch = plots.plot_training_batch(images, TrainingParameters())
    assert len(batch.axes) == 16
    assert {axes.get_title() for axes in batch.axes} == {"real", "fake"}
