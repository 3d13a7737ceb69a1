"""A checkpoint becomes what is served: ONNX and `detector.json`, compared with what was trained."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np

from deepfake_core.config import CLASS_NAMES
from deepfake_core.data.images import Images
from deepfake_core.detector import BATCH_SIZE, DESCRIPTION, Detector, apply_temperature, call_fake
from deepfake_core.errors import ModelError
from deepfake_core.storage.files import write_json
from deepfake_core.training.checkpoints import CHECKPOINT
from deepfake_core.training.heat_map import ExplainedNetwork

log = logging.getLogger(__name__)

DECISION_THRESHOLD = 0.5

PARITY_IMAGES = 200
MAX_PARITY_DIFFERENCE = 0.001


def load_network(folder: Path) -> keras.Model:
    """Load a detector's network, which runs no code of its file."""
    return keras.saving.load_model(folder / CHECKPOINT, compile=False, safe_mode=True)


def export_detector(checkpoint: Path, folder: Path, description: dict[str, Any]) -> None:
    """Write `model.onnx`, then `detector.json`, which `deepfake_core.detector` reads."""
    if keras.backend.backend() == "tensorflow":
        export_onnx(checkpoint, folder / "model.onnx")
    else:  # Keras exports from TensorFlow; a checkpoint is the same for every backend
        command = "import sys; from deepfake_core.training.export import export_onnx; export_onnx(*sys.argv[1:])"
        arguments = [sys.executable, "-c", command, str(checkpoint), str(folder / "model.onnx")]
        subprocess.run(arguments, env={**os.environ, "KERAS_BACKEND": "tensorflow"}, check=True)
    write_json(folder / DESCRIPTION, {**description, "threshold": DECISION_THRESHOLD, "class_names": CLASS_NAMES})


def export_onnx(checkpoint: str | Path, file: str | Path) -> None:
    """Write a checkpoint's network as ONNX, in float32, with its heat map as second output."""
    network = keras.saving.load_model(checkpoint, compile=False, safe_mode=True)
    model = ExplainedNetwork(network)
    model(keras.ops.zeros((1, *network.input_shape[1:])))  # Keras exports only models that were called once
    signature = [keras.InputSpec("float32", (None, *network.input_shape[1:]), name="image")]
    model.export(file, format="onnx", verbose=False, input_signature=signature)


def check_parity(folder: Path, images: Images) -> float:
    """Return the greatest difference in P(fake) between what is served (ONNX) and what was trained (Keras).

    Args:
        folder: a detector's.
        images: of its input size; the first 200 are compared.

    Raises:
        ModelError: if it is 0.001 or more, or if a label differs.
    """
    detector, network = Detector(folder), load_network(folder)
    pixels = images.pixels[np.arange(min(PARITY_IMAGES, len(images)))]
    served = detector.score(pixels)
    batches = [pixels[start : start + BATCH_SIZE] for start in range(0, len(pixels), BATCH_SIZE)]
    found = [keras.ops.convert_to_numpy(network(batch.astype(np.float32), training=False))[:, 0] for batch in batches]
    trained = apply_temperature(np.concatenate(found), detector.temperature)
    difference = float(np.abs(served - trained).max())
    changed = int((call_fake(served, detector.threshold) != call_fake(trained, detector.threshold)).sum())
    if not difference < MAX_PARITY_DIFFERENCE or changed:  # also true for NaN
        raise ModelError(
            f"What is served must score like what was trained: less than {MAX_PARITY_DIFFERENCE:g} apart, every label "
            f"the same. Received: {difference:.2g} apart at most on {len(pixels)} images, {changed} labels changed, in "
            f"{folder}. It is not registered. Compare the versions of tensorflow, tf2onnx and onnxruntime with those "
            "of requirements.lock."
        )
    return difference
