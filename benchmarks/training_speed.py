"""Images per second in training: the reference pipeline, ours, and bare steps, side by side in one run.

    python benchmarks/training_speed.py ARCHIVES [--rounds 3]

ARCHIVES holds the three zips, of which the 256 x 256 images of 140k-real-and-fake-faces.zip are used. The reference
pipeline decodes, resizes and augments each image in each epoch (ImageDataGenerator, flow_from_directory) and computes
in float32. Both train the reference CNN at 150 x 150 in batches of 32 with the same kinds of augmentation. A bare step
trains on one resident batch, with our optimizer, without input or augmentation: the floor that no pipeline gets below.
The sides take turns, an epoch each, after one epoch that is not counted; the results are medians. An epoch ends with
its last step: the up to 5 s that tf.data may then take to end its threads are counted for no side (ours avoids them).
They go into benchmarks/results/training_speed.json and training_speed.png.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from deepfake_core.config import DataParameters, Precision
from deepfake_core.data.dataset import open_dataset
from deepfake_core.data.images import Images, load_images
from deepfake_core.models import CANDIDATES
from deepfake_core.storage.files import write_json
from deepfake_core.training.batches import Batches
from deepfake_core.training.devices import choose_precision, compute_in
from deepfake_core.training.optimizer import FusedAdam
from flows.prepare import prepare

RESULTS = Path(__file__).parent / "results"
RECIPE = CANDIDATES["cnn"].RECIPE
NAMES = {
    "reference": "reference pipeline, float32",
    "ours_float32": "ours, float32",
    "bare_float32": "bare steps, float32",
    "ours_bfloat16": "ours, bfloat16",
    "bare_bfloat16": "bare steps, bfloat16",
}


def compile_model(model: keras.Model, optimizer: type[keras.optimizers.Adam] = FusedAdam) -> keras.Model:
    model.compile(optimizer(RECIPE.learning_rate), "binary_crossentropy", metrics=["accuracy"])
    return model


def build_model(precision: Precision) -> keras.Model:
    with compute_in(precision):
        return compile_model(CANDIDATES["cnn"].build(RECIPE))


class Clock(keras.callbacks.Callback):
    """Take the seconds from an epoch's begin to its end."""

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        self._started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        self.seconds = time.perf_counter() - self._started


def train_epoch(model: keras.Model, batches: Any, images: int) -> float:
    """Return images per second."""
    clock = Clock()
    model.fit(batches, epochs=1, shuffle=False, callbacks=[clock], verbose=0)
    return images / clock.seconds


def make_reference(folder: Path) -> Callable[[], float]:
    """Return a function that trains one epoch as the reference pipeline does."""
    change = RECIPE.augmentation
    generator = tf.keras.preprocessing.image.ImageDataGenerator(
        rotation_range=change.rotation,
        width_shift_range=change.width_shift,
        height_shift_range=change.height_shift,
        zoom_range=change.zoom,
        horizontal_flip=change.horizontal_flip,
        fill_mode="nearest",
    )
    side = RECIPE.image_size
    batches = generator.flow_from_directory(
        folder, target_size=(side, side), batch_size=RECIPE.batch_size, class_mode="binary", classes=["real", "fake"]
    )
    model = compile_model(CANDIDATES["cnn"].build(RECIPE), keras.optimizers.Adam)
    return lambda: train_epoch(model, batches, batches.samples)


def make_ours(images: Images, precision: Precision) -> Callable[[], float]:
    batches, model = Batches(images, RECIPE.batch_size, RECIPE.augmentation, seed=0), build_model(precision)
    pipeline = batches.for_fit()

    def train() -> float:
        batches.start_epoch(0)  # which fit's callbacks do in the product
        return train_epoch(model, pipeline, len(images))

    return train


def make_bare(images: Images, precision: Precision) -> Callable[[], float]:
    pixels, labels = Batches(images, RECIPE.batch_size, seed=0)[0]
    steps = len(images) // RECIPE.batch_size
    resident = tf.data.Dataset.from_tensors((tf.constant(pixels), tf.constant(labels))).cache().repeat(steps)
    model = build_model(precision)
    return lambda: train_epoch(model, resident, steps * RECIPE.batch_size)


def measure_candidate(name: str, precision: Precision) -> float:
    """Return the images per second of a candidate's bare steps at its own input size."""
    recipe = CANDIDATES[name].RECIPE.model_copy(update={"weights": "none"})
    with compute_in(precision):
        model = compile_model(CANDIDATES[name].build(recipe))
    random = np.random.default_rng(0)
    shape = (recipe.batch_size, recipe.image_size, recipe.image_size, 3)
    pixels, labels = tf.constant(random.integers(0, 256, shape, np.uint8)), tf.constant(random.integers(0, 2, shape[0]))
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        model.train_on_batch(pixels, labels)
        seconds.append(time.perf_counter() - start)
    return recipe.batch_size / statistics.median(seconds[2:])


def compare(one: list[float], other: list[float]) -> float:
    """Return the median of the rounds' ratios: what is measured side by side shares the machine's noise."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def plot_rates(rates: dict[str, float]) -> Figure:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    colours = {"reference": "#d95f0e", "ours": "#2c7fb8", "bare": "#969696"}
    bars = axes.barh(
        [NAMES[name] for name in rates], list(rates.values()), color=[colours[name.split("_")[0]] for name in rates]
    )
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="images/s", title="Training the reference CNN at 150 x 150")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    (source,) = (one for one in DataParameters().sources if "140k" in one.name)
    with tempfile.TemporaryDirectory() as folder:
        local = source.model_copy(update={"name": f"{options.archives.absolute()}/{source.short_name}.zip"})
        dataset = open_dataset(prepare(DataParameters(sources=(local,), data_dir=folder)))
        images = load_images(dataset, "train", RECIPE.image_size)
        sides = {
            "reference": make_reference(dataset.path / "train"),
            "ours_float32": make_ours(images, "float32"),
            "bare_float32": make_bare(images, "float32"),
            "ours_bfloat16": make_ours(images, "bfloat16"),
            "bare_bfloat16": make_bare(images, "bfloat16"),
        }
        measured: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(options.rounds + 1):
            for name, measure in sides.items():
                rate = measure()
                if number:  # the first epoch traces, compiles and fills the caches
                    measured[name].append(rate)
                    print(f"{NAMES[name]}: {measured[name][-1]:.0f} images/s", flush=True)
        chosen = choose_precision("auto", CANDIDATES["cnn"].build(RECIPE))
    rates = {name: statistics.median(values) for name, values in measured.items()}
    candidates = {
        name: {precision: measure_candidate(name, precision) for precision in ("float32", "bfloat16")}
        for name in CANDIDATES
    }
    write_json(
        RESULTS / "training_speed.json",
        {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
            "images": len(images),
            "rounds": options.rounds,
            "precision_chosen": chosen,
            "images_per_second": rates,
            "all_rounds": measured,
            "times_reference": {
                precision: compare(measured[f"ours_{precision}"], measured["reference"])
                for precision in ("float32", "bfloat16")
            },
            "of_bare_steps": {
                precision: compare(measured[f"ours_{precision}"], measured[f"bare_{precision}"])
                for precision in ("float32", "bfloat16")
            },
            "candidates_bare_images_per_second": candidates,
        },
    )
    plot_rates(rates).savefig(RESULTS / "training_speed.png", dpi=110)
    print(f"written: {RESULTS}/training_speed.json and training_speed.png")


if __name__ == "__main__":
    main()
