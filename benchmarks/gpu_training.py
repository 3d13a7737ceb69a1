"""Seconds per epoch of each candidate on an accelerator, from images in its memory.

    PYTHONPATH=. python benchmarks/gpu_training.py [--images 100000] [--image-size 150] [--output FILE]

Needs no data, and of this project only `deepfake_core.models`: Keras, numpy, pydantic, on TensorFlow or JAX, whichever
is installed (KERAS_BACKEND chooses where both are). Images are noise, uint8, resident; each step gathers a shuffled
batch, augments it and trains in mixed bfloat16, all on the accelerator. An epoch is held against two floors:

- arithmetic: multiplications and additions of convolutions and dense layers, forward once and backward twice (for the
  inputs' and the weights' gradients), at the peak of --peak-tflops (H200, dense bfloat16: 989).
- memory traffic: every layer's output in bfloat16 written and read forward, read again and its gradient written and
  read backward (5 passes), at --peak-tbs (H200: 4.8 TB/s). Fusing layers saves some of these passes, so a good compiler
  can get below it; the images themselves (67.5 kB each at 150 x 150, read once) count too.

Without an accelerator it runs all the same, on the CPU: take few images.
"""

import argparse
import json
import os
import statistics
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if "KERAS_BACKEND" not in os.environ and find_spec("tensorflow") is None:
    os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np

from deepfake_core.models import CANDIDATES
from deepfake_core.training.augmentation import Augmentation


class ResidentImages(keras.layers.Layer):
    """Gather images from the accelerator's memory: int32 (n,) to float32 (n, size, size, 3)."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__(trainable=False)
        pixels = np.random.default_rng(0).integers(0, 256, (min(count, 1000), size, size, 3), np.uint8)
        self.pixels = self.add_weight(
            shape=(count, size, size, 3), dtype="uint8", initializer="zeros", trainable=False, autocast=False
        )
        self.pixels.assign(np.resize(pixels, (count, size, size, 3)))

    def call(self, positions: Any) -> Any:
        return keras.ops.cast(keras.ops.take(self.pixels, positions, axis=0), "float32")


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


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    keras.utils.clear_session(free_memory=True)
    recipe = CANDIDATES[name].RECIPE.model_copy(update={"weights": "none", "image_size": options.image_size})
    network = CANDIDATES[name].build(recipe)
    positions = keras.Input((), dtype="int32")
    images = ResidentImages(options.images, options.image_size)(positions)
    model = keras.Model(positions, network(Augmentation(recipe.augmentation, 0)(images)))
    steps = max(1, options.images // options.batch_size)
    model.compile("adam", "binary_crossentropy", steps_per_execution=min(16, steps))
    labels = np.random.default_rng(1).integers(0, 2, options.images).astype(np.float32)
    order = np.arange(options.images, dtype=np.int32)
    seconds = []
    for _ in range(options.epochs + 1):  # the first one compiles
        start = time.perf_counter()
        model.fit(order, labels, batch_size=options.batch_size, epochs=1, shuffle=True, verbose=0)
        seconds.append(time.perf_counter() - start)
    operations, elements = count_work(network)
    result = {
        "seconds_per_epoch": statistics.median(seconds[1:]),
        "first_epoch_seconds": seconds[0],
        "arithmetic_floor_seconds": 3 * operations * options.images / (options.peak_tflops * 1e12),
        "memory_floor_seconds": (5 * 2 * elements + 3 * options.image_size**2)
        * options.images
        / (options.peak_tbs * 1e12),
    }
    result["images_per_second"] = options.images / result["seconds_per_epoch"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--image-size", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--peak-tbs", type=float, default=4.8)
    parser.add_argument("--output", type=Path, help="file for the results, as JSON")
    options = parser.parse_args()
    keras.config.set_dtype_policy("mixed_bfloat16")
    devices = keras.distribution.list_devices()
    print(f"{keras.backend.backend()} {devices}: {options.images:,} images of {options.image_size} pixels", flush=True)
    results = {}
    for name in options.candidates:
        results[name] = measure(name, options)
        print(name, {key: round(value, 3) for key, value in results[name].items()}, flush=True)
    if options.output:
        settings = {key: value for key, value in vars(options).items() if key != "output"}
        content = {"backend": keras.backend.backend(), "devices": devices, **settings, "candidates": results}
        options.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
