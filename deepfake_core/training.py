"""Batches and an architecture become the checkpoint with the lowest validation loss."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import pandas as pd

from deepfake_core.batches import Batches, Images
from deepfake_core.config import CLASS_NAMES, Architecture, TrainingParameters
from deepfake_core.models import BUILDERS, Augmentation

log = logging.getLogger(__name__)

DECISION_THRESHOLD = 0.5

EpochReport = Callable[[int, dict[str, float]], None]
"""Called after each epoch with its number (from 1) and loss, accuracy, val_loss and val_accuracy."""


@dataclass(frozen=True)
class Candidate:
    """A trained architecture.

    Attributes:
        folder: holds `checkpoint.keras`, `model.onnx` and `detector.json`.
        history: one row per epoch: `epoch, loss, accuracy, val_loss, val_accuracy`.
        summary: Keras' description of the layers.
    """

    architecture: Architecture
    folder: Path
    history: pd.DataFrame
    summary: str

    @property
    def best_epoch(self) -> int:
        return int(self.history["epoch"].iloc[self.history["val_loss"].argmin()])


class _Checkpoint(keras.callbacks.ModelCheckpoint):
    """Keep the model with the lowest validation loss, without the augmentation in front of it."""

    def __init__(self, path: Path, model: keras.Model) -> None:
        super().__init__(str(path), monitor="val_loss", mode="min", save_best_only=True)
        self._kept = model

    def set_model(self, model: keras.Model) -> None:  # noqa: ARG002 - Keras passes the augmented model
        super().set_model(self._kept)


def train_candidate(
    architecture: Architecture,
    train: Images,
    val: Images,
    parameters: TrainingParameters,
    folder: Path,
    on_epoch: EpochReport | None = None,
) -> Candidate:
    """Train one architecture and keep its best checkpoint.

    Adam on binary cross-entropy; stops after `patience` epochs without a lower validation loss.

    Args:
        folder: empty folder for the checkpoint and its export.
    """
    keras.utils.set_random_seed(parameters.seed)
    model = BUILDERS[architecture](parameters.image_size)
    augmented = keras.Sequential(
        [
            keras.Input(model.input_shape[1:]),
            Augmentation(parameters.augmentation, seed=parameters.seed),
            model,
        ]
    )
    augmented.compile(
        optimizer=keras.optimizers.Adam(parameters.learning_rate),
        loss="binary_crossentropy",
        metrics=["accuracy"],
    )
    epochs: list[dict[str, float]] = []

    def report(epoch: int, logs: dict[str, float]) -> None:
        row = {name: float(logs[name]) for name in ("loss", "accuracy", "val_loss", "val_accuracy")}
        epochs.append({"epoch": epoch + 1, **row})
        log.info(
            "%s epoch %d/%d: loss %.4f, accuracy %.3f, val_loss %.4f, val_accuracy %.3f",
            architecture,
            epoch + 1,
            parameters.epochs,
            *row.values(),
        )
        if on_epoch:
            on_epoch(epoch + 1, row)

    checkpoint = folder / "checkpoint.keras"
    augmented.fit(
        Batches(train, parameters.batch_size, shuffle_seed=parameters.seed),
        validation_data=Batches(val, parameters.batch_size),
        epochs=parameters.epochs,
        callbacks=[
            keras.callbacks.LambdaCallback(on_epoch_end=report),
            keras.callbacks.EarlyStopping(monitor="val_loss", mode="min", patience=parameters.patience),
            _Checkpoint(checkpoint, model),
        ],
        verbose=0,
    )
    lines: list[str] = []
    model.summary(print_fn=lambda line, **_: lines.append(line))
    candidate = Candidate(architecture, folder, pd.DataFrame(epochs), "\n".join(lines))
    export_detector(checkpoint, folder, {"architecture": architecture})
    log.info("%s: kept the checkpoint of epoch %d of %d", architecture, candidate.best_epoch, len(epochs))
    return candidate


def export_detector(checkpoint: Path, folder: Path, description: dict[str, str]) -> None:
    """Write `model.onnx` and `detector.json`, which `deepfake_core.detector` reads."""
    model = keras.saving.load_model(checkpoint, compile=False, safe_mode=True)
    _, size, _, channels = model.input_shape
    model(keras.ops.zeros((1, size, size, channels)))  # Keras exports only models that were called once
    model.export(folder / "model.onnx", format="onnx", verbose=False)
    meaning = {"image_size": size, "threshold": DECISION_THRESHOLD, "class_names": CLASS_NAMES}
    (folder / "detector.json").write_text(json.dumps({**description, **meaning}, indent=2) + "\n")
