"""Batches and an architecture become the checkpoint with the lowest validation loss."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd

from deepfake_core.archive import Progress
from deepfake_core.augmentation import Augmentation
from deepfake_core.batches import Batches, Images
from deepfake_core.config import CLASS_NAMES, Architecture, Recipe, TrainingParameters
from deepfake_core.detector import BATCH_SIZE, DESCRIPTION, Detector, apply_temperature
from deepfake_core.devices import choose_precision, compute_in, sees_only_cpus, spread_over
from deepfake_core.errors import ConfigurationError, ModelError
from deepfake_core.explanation import ExplainedNetwork
from deepfake_core.files import write_beside, write_json
from deepfake_core.manifest import Dataset, lock_folder
from deepfake_core.models import CANDIDATES
from deepfake_core.optimizer import FusedAdam

log = logging.getLogger(__name__)

DECISION_THRESHOLD = 0.5

HEAD_LEARNING_RATE = 0.001
"""While a pretrained backbone is left as it is."""

METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")

EpochReport = Callable[[int, dict[str, float]], None]
"""Called after each epoch with its number (from 1), `METRICS` and `seconds`."""

PARITY_IMAGES = 200
MOST_DIFFERENCE = 0.001

CHECKPOINT, HISTORY = "checkpoint.keras", "history.csv"


@dataclass(frozen=True)
class Candidate:
    """A trained architecture.

    Attributes:
        folder: holds `checkpoint.keras`, `model.onnx` and `detector.json`.
        history: one row per epoch: `epoch`, `METRICS`, `seconds`.
    """

    architecture: Architecture
    folder: Path
    history: pd.DataFrame

    @property
    def best_epoch(self) -> int:
        return int(self.history["epoch"].iloc[self.history["val_loss"].argmin()])

    def summarise(self) -> str:
        """Return Keras's table of the layers."""
        lines: list[str] = []
        load_network(self.folder).summary(print_fn=lambda line, **_: lines.append(line), expand_nested=True)
        return "\n".join(lines)


def load_network(folder: Path) -> keras.Model:
    """Load a detector's network, which runs no code of its file."""
    return keras.saving.load_model(folder / CHECKPOINT, compile=False, safe_mode=True)


def find_folder(
    dataset: Dataset,
    architecture: Architecture,
    recipe: Recipe,
    parameters: TrainingParameters,
    holdout_sources: Sequence[str] = (),
) -> Path:
    """Return where a training keeps its state: a folder that two trainings share only if they would be the same.

    Its name begins with the data set's version, so that it goes when that goes.
    """
    network = Path(str(CANDIDATES[architecture].__file__)).read_text()
    same = [dataset.version, network, recipe.model_dump(mode="json"), parameters.seed, parameters.devices]
    same += sorted(holdout_sources)
    name = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]
    return dataset.path.parent.parent / "training" / f"{dataset.version}-{architecture}-{name}"


def train_candidate(
    architecture: Architecture,
    train: Images,
    val: Images,
    recipe: Recipe,
    folder: Path,
    seed: int = 0,
    devices: int = 1,
    on_epoch: EpochReport | None = None,
    on_progress: Progress | None = None,
) -> Candidate:
    """Train one architecture and keep its best checkpoint, in float32 whatever it was trained in.

    Adam on binary cross-entropy; stops after `recipe.patience` epochs without a lower validation loss. A pretrained
    backbone is left as it is for `recipe.head_epochs`. What is random in an epoch follows from the seed and the
    epoch's number alone, so a training that was killed goes on from its last finished epoch as if it had not been.

    Args:
        folder: of this training alone. Give it again, with all else equal, to go on or to get what was finished.
        devices: how many of the backend's devices share each batch.
        on_progress: called after each batch with the batches done and those of all epochs.

    Raises:
        LockedError: if another process is at this training.
        ConfigurationError: if there are fewer devices, or if crops are to train a network that takes one size.
        ModelError: if pretrained weights can't be had, or the loss is no number.
    """
    detector = folder / "detector"
    detector.mkdir(parents=True, exist_ok=True)
    way_out = "change a parameter of the training, such as its seed"
    with lock_folder(folder, f"a training of {architecture}", way_out):
        record = _Record(architecture, recipe, folder, detector, on_epoch, on_progress)
        if not (detector / DESCRIPTION).exists():
            record.served = CANDIDATES[architecture].build(recipe)
            if recipe.augmentation.crop < 1 and not find_backbone(record.served):
                raise ConfigurationError(
                    f"`training.augmentation.crop` must be 1 for {architecture}, which takes images of one size. "
                    f"Received: {recipe.augmentation.crop}. Set it to 1, or leave out this candidate."
                )
            precision = choose_precision(recipe.precision, record.served)
            with spread_over(devices), compute_in(precision):
                _fit(architecture, recipe, train, val, seed, record, folder)
            description = {"architecture": architecture, "trained_in": precision, "image_size": recipe.image_size}
            export_detector(detector / CHECKPOINT, detector, description)
        record.report_new()
    candidate = Candidate(architecture, detector, pd.read_csv(folder / HISTORY))
    log.info("%s: kept the checkpoint of epoch %d of %d", architecture, candidate.best_epoch, len(candidate.history))
    return candidate


def find_backbone(network: keras.Model) -> keras.Model | None:
    """Return the pretrained part of a candidate that transfers learning, None of another."""
    return next((layer for layer in network.layers if isinstance(layer, keras.Model)), None)


def _fit(
    architecture: Architecture, recipe: Recipe, train: Images, val: Images, seed: int, record: "_Record", folder: Path
) -> None:
    keras.utils.set_random_seed(seed)
    cropped = recipe.augmentation.crop < 1
    # Without a size, the network takes crops in training and whole images in validation.
    model = CANDIDATES[architecture].build(recipe.model_copy(update={"image_size": None}) if cropped else recipe)
    warp = [] if sees_only_cpus() else [Augmentation(recipe.augmentation, seed)]
    augmented = keras.Sequential([keras.Input(model.input_shape[1:]), *warp, model])
    batches = Batches(train, recipe.batch_size, recipe.augmentation, seed, warp=not warp)
    pipeline, validation = batches.for_fit(), Batches(val, recipe.batch_size).for_fit()
    log.info("%s: %s parameters, computed in %s", architecture, f"{model.count_params():,}", model.compute_dtype)
    backbone = find_backbone(model)
    head_epochs = min(recipe.head_epochs, recipe.epochs) if backbone and recipe.weights != "none" else 0
    for phase, first, end in (("head", 0, head_epochs), ("all", head_epochs, recipe.epochs)):
        if first == end or record.patience_is_over():
            continue
        if backbone:
            backbone.trainable = phase == "all"
        augmented.compile(
            optimizer=_make_optimizer(recipe, phase, steps=len(batches) * (end - first), epoch_steps=len(batches)),
            loss="binary_crossentropy",
            metrics=["accuracy"],
        )
        augmented.fit(
            pipeline,
            validation_data=validation,
            epochs=end,
            shuffle=False,  # `batches` shuffles; Keras would shuffle them again, by a state that a kill loses
            callbacks=[_Reseed(batches, seed), record, _Backup(folder / phase, first, len(batches))],
            verbose=0,
        )


def _make_optimizer(recipe: Recipe, phase: str, steps: int, epoch_steps: int) -> keras.optimizers.Optimizer:
    """Make Adam, or AdamW that spares offsets and normalisation, with the recipe's schedule over one phase."""
    if phase == "head":
        return FusedAdam(HEAD_LEARNING_RATE)
    rate: Any = recipe.learning_rate
    if recipe.schedule == "cosine":
        warmup = min(round(recipe.warmup_epochs * epoch_steps), steps - 1)
        target = recipe.learning_rate
        rate = keras.optimizers.schedules.CosineDecay(
            0.0 if warmup else target, steps - warmup, warmup_target=target if warmup else None, warmup_steps=warmup
        )
    optimizer = FusedAdam(rate, weight_decay=recipe.weight_decay or None)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


class _Reseed(keras.callbacks.Callback):
    """Make an epoch's order, augmentation and dropout follow from the seed and the epoch's number alone."""

    def __init__(self, batches: Batches, seed: int) -> None:
        super().__init__()
        self._batches, self._seed = batches, seed

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        self._batches.start_epoch(epoch)
        states = [variable for variable in self.model.variables if variable.name == "seed_generator_state"]
        for position, state in enumerate(states):
            state.assign(np.random.SeedSequence([self._seed, position, epoch]).generate_state(2))


class _Record(keras.callbacks.Callback):
    """Keep the history and the model with the lowest validation loss; stop when patience is over.

    What a killed run recorded is reported again, so that the curves of the run that goes on are whole.

    Attributes:
        served: the network in float32, which takes the weights that are kept.
    """

    def __init__(
        self,
        architecture: Architecture,
        recipe: Recipe,
        folder: Path,
        detector: Path,
        on_epoch: EpochReport | None,
        on_progress: Progress | None,
    ) -> None:
        super().__init__()
        self.served: Any = None
        self._architecture, self._recipe, self._detector = architecture, recipe, detector
        self._on_epoch, self._on_progress = on_epoch, on_progress
        self._file, self._reported = folder / HISTORY, 0
        self._rows: list[dict[Any, Any]] = pd.read_csv(self._file).to_dict("records") if self._file.exists() else []

    def patience_is_over(self) -> bool:
        losses = [row["val_loss"] for row in self._rows]
        return bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= self._recipe.patience

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        del self._rows[epoch:]  # an epoch that was recorded, but not backed up, is trained again
        self.report_new()
        self._epoch, self._started = epoch, time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        if self._on_progress:
            steps = self.params["steps"]
            self._on_progress(self._epoch * steps + batch + 1, self._recipe.epochs * steps)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        logs = logs or {}
        row = {"epoch": epoch + 1, **{name: float(logs[name]) for name in METRICS}}
        if not np.isfinite(row["loss"]):
            raise ModelError(
                f"The loss must stay finite. Received: {row['loss']} in epoch {epoch + 1} of {self._architecture}, "
                f"at a learning rate of {self._recipe.learning_rate}. Lower training.learning_rate, or set "
                "training.precision to float32."
            )
        row["seconds"] = time.perf_counter() - self._started
        if row["val_loss"] < min((earlier["val_loss"] for earlier in self._rows), default=np.inf):
            self.served.set_weights(self.model.layers[-1].get_weights())
            beside = self._file.with_name("next.keras")  # Keras insists on the suffix
            self.served.save(beside)
            beside.replace(self._detector / CHECKPOINT)
        self._rows.append(row)
        with write_beside(self._file) as beside:
            pd.DataFrame(self._rows).to_csv(beside, index=False)
        self.report_new()
        self.model.stop_training = self.patience_is_over()

    def report_new(self) -> None:
        """Report each epoch once, those of a killed run too."""
        for row in self._rows[self._reported :]:
            self._report(row)
        self._reported = len(self._rows)

    def _report(self, row: dict[Any, Any]) -> None:
        figures = {name: value for name, value in row.items() if name != "epoch"}
        log.info(
            "%s epoch %d/%d: loss %.4f, accuracy %.3f, val_loss %.4f, val_accuracy %.3f, %.1f s",
            self._architecture,
            row["epoch"],
            self._recipe.epochs,
            *figures.values(),
        )
        if self._on_epoch:
            self._on_epoch(row["epoch"], figures)


class _Backup(keras.callbacks.BackupAndRestore):
    """Back up each epoch, and go on after the last one whose weights were written.

    Keras writes the epoch's number to a second file, which a kill leaves behind the weights. The optimizer's count
    of steps lies with the weights and can't disagree with them.
    """

    def __init__(self, folder: Path, first_epoch: int, epoch_steps: int) -> None:
        super().__init__(str(folder), delete_checkpoint=False)
        self._first_epoch, self._epoch_steps = first_epoch, epoch_steps

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        super().on_train_begin(logs)
        steps = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
        self.model._initial_epoch = self._first_epoch + steps // self._epoch_steps


def export_detector(checkpoint: Path, folder: Path, description: dict[str, Any]) -> None:
    """Write `model.onnx`, then `detector.json`, which `deepfake_core.detector` reads."""
    if keras.backend.backend() == "tensorflow":
        export_onnx(checkpoint, folder / "model.onnx")
    else:  # Keras exports from TensorFlow; a checkpoint is the same for every backend
        command = "import sys; from deepfake_core import training; training.export_onnx(*sys.argv[1:])"
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
    changed = int(((served >= detector.threshold) != (trained >= detector.threshold)).sum())
    if not difference < MOST_DIFFERENCE or changed:  # not a number is no less than anything
        raise ModelError(
            f"What is served must score as what was trained: less than {MOST_DIFFERENCE:g} apart, every label the "
            f"same. Received: {difference:.2g} apart at most on {len(pixels)} images, {changed} labels changed, in "
            f"{folder}. It is not registered. Compare the versions of tensorflow, tf2onnx and onnxruntime with those "
            "of requirements.lock."
        )
    return difference
