"""Seconds per epoch of each candidate on an accelerator, by the product's own training.

    PYTHONPATH=. python benchmarks/gpu_training.py [--images 100000] [--output FILE]

Drives `train_checkpoint`, by which the flow `train` trains, on images of noise in the product's own cache format:
training and validation, checkpoints and backups, but no export. Images are resident on the accelerator, streamed to it,
or changed by the CPU (host), in one run. The first epoch, which compiles, is told apart; the others' median counts.
Their seconds are of training alone; those with validation are in the results too.

Needs no data and no install of this project, but these packages: keras, numpy, pandas, pyarrow, pillow, h5py, psutil,
pydantic, platformdirs, fsspec, simplejpeg, opencv-python-headless, and TensorFlow, or JAX (which it takes if TensorFlow
is missing, or if KERAS_BACKEND says so).

An epoch is held against two floors:

- arithmetic: multiplications and additions of convolutions and dense layers, forward once and backward twice (for the
  inputs' and the weights' gradients), at the peak of --peak-tflops (H100 and H200, dense bfloat16: 989).
- memory traffic: every layer's output in bfloat16 written and read forward, read again and its gradient written and
  read backward (5 passes), at --peak-tbs (H100: 3.35 TB/s, H200: 4.8). Fusing layers saves some of these passes, so a
  good compiler can get below it; the images themselves (67.5 kB each at 150 x 150, read once) count too.

Without an accelerator it runs all the same, on the CPU: take few images, such as `--images 512 --quick`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if "KERAS_BACKEND" not in os.environ and find_spec("tensorflow") is None:
    os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
import pandas as pd

from deepfake_core.config import Architecture, Recipe, TrainingParameters
from deepfake_core.data.images import Images
from deepfake_core.models import CANDIDATES
from deepfake_core.training.accelerator import Feeding
from deepfake_core.training.augmentation import crop_side
from deepfake_core.training.checkpoints import HISTORY, EpochRecorder
from deepfake_core.training.devices import describe_hardware
from deepfake_core.training.fit import Training, train_checkpoint

VALIDATION_SHARE = 0.1

RUNS: tuple[tuple[Architecture, int, int, tuple[Feeding, ...]], ...] = (
    ("cnn", 150, 512, ("resident", "streamed", "host")),
    ("cnn", 150, 32, ("resident",)),
    ("efficientnet_lite0", 256, 256, ("resident", "streamed", "host")),
    ("hpf_cnn", 150, 512, ("resident",)),
    ("cgface", 150, 512, ("resident",)),
)
"""Candidate, size of its images, images per batch, and where they are changed."""

HOST_IMAGES = 5_000
"""Of the runs in which the CPU changes images, which are slow. Their epoch is scaled up to all images."""


def make_images(folder: Path, count: int, size: int) -> Images:
    """Write noise as the cache of a split, and open it as the product does."""
    file = folder / f"{count}-{size}.npy"
    if not file.exists():
        pixels = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(count, size, size, 3))
        some = np.random.default_rng(0).integers(0, 256, (256, size, size, 3), np.uint8)
        for start in range(0, count, len(some)):
            pixels[start : start + len(some)] = some[: count - start]
    labels = np.random.default_rng(1).integers(0, 2, count).astype(np.int8)
    return Images(np.load(file, mmap_mode="r"), labels, pd.DataFrame({"source": ["noise"] * count}))


def count_work(model: keras.Model) -> tuple[float, float]:
    """Return the multiplications and additions of one forward pass of one image, and the elements of all outputs."""
    operations = elements = 0.0
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            inner = count_work(layer)
            operations, elements = operations + inner[0], elements + inner[1]
            continue
        if isinstance(layer, (keras.layers.InputLayer, keras.layers.ReLU)):  # a ReLU is fused with what is before it
            continue
        outputs = float(np.prod(layer.output.shape[1:]))
        elements += outputs
        if isinstance(layer, keras.layers.DepthwiseConv2D):
            operations += 2 * outputs * np.prod(layer.kernel.shape[:2])
        elif isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
            operations += 2 * outputs * np.prod(layer.kernel.shape[:-1])
    return operations, elements


def count_floors(architecture: Architecture, recipe: Recipe, options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds that an epoch can't be shorter than."""
    side = crop_side(recipe.image_size, recipe.augmentation)
    operations, elements = count_work(CANDIDATES[architecture].build(recipe.model_copy(update={"image_size": side})))
    traffic = 5 * 2 * elements + 3 * recipe.image_size**2
    return {
        "arithmetic_floor_seconds": 3 * operations * options.images / (options.peak_tflops * 1e12),
        "memory_floor_seconds": traffic * options.images / (options.peak_tbs * 1e12),
    }


def measure(
    architecture: Architecture, recipe: Recipe, feeding: Feeding, folder: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Train for some epochs; return what one takes."""
    count = min(HOST_IMAGES, options.images) if feeding == "host" else options.images
    train = make_images(folder, count, recipe.image_size)
    val = make_images(folder, max(1, round(options.images * VALIDATION_SHARE)), recipe.image_size)
    training = Training(architecture, recipe)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as state:
        record = EpochRecorder(architecture, recipe, Path(state), Path(state), None, None, count)
        train_checkpoint(training, train, val, Path(state), record, feeding)
        history = pd.read_csv(Path(state) / HISTORY)
    keras.utils.clear_session(free_memory=True)
    rate = statistics.median(history["images_per_second"][1:])
    result = {
        "images_per_second": rate,
        "seconds_per_epoch": options.images / rate,
        "seconds_with_validation": statistics.median(history["seconds"][1:]),
        "first_epoch_seconds": history["seconds"][0],
        "seconds_in_all": time.perf_counter() - started,
    }
    if "waiting_share" in history:
        result["waiting_share"] = statistics.median(history["waiting_share"][1:])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--quick", action="store_true", help="small images and batches, to try it on a CPU")
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--peak-tbs", type=float, default=3.35)
    parser.add_argument("--output", type=Path, help="file for the results, as JSON")
    options = parser.parse_args()
    print(f"{describe_hardware()}: {options.images:,} images", flush=True)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for architecture, size, batch_size, feedings in RUNS:
            if architecture not in options.candidates:
                continue
            size, batch_size = (64, 32) if options.quick else (size, batch_size)
            parameters = TrainingParameters(
                image_size=size, batch_size=batch_size, epochs=options.epochs, patience=options.epochs, weights="none"
            )
            recipe = parameters.adjust(CANDIDATES[architecture].RECIPE)
            floors = count_floors(architecture, recipe, options)
            for feeding in feedings:
                what = {"candidate": architecture, "image_size": size, "batch_size": batch_size, "feeding": feeding}
                found = measure(architecture, recipe, feeding, Path(name), options)
                results.append({**what, **found, **floors})
                print(*what.values(), {key: float(f"{value:.3g}") for key, value in found.items()}, flush=True)
                if options.output:
                    settings = {"hardware": describe_hardware(), "images": options.images, "epochs": options.epochs}
                    options.output.write_text(json.dumps({**settings, "runs": results}, indent=2) + "\n")
            print(architecture, {key: float(f"{value:.3g}") for key, value in floors.items()}, flush=True)


if __name__ == "__main__":
    main()
