"""What Keras calls while it fits: an epoch's seed, the best weights so far, and a backup to continue from."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd

from deepfake_core.config import Architecture, Recipe
from deepfake_core.errors import ModelError
from deepfake_core.storage.files import write_beside
from deepfake_core.storage.progress import Progress
from deepfake_core.training.batches import Batches

log = logging.getLogger(__name__)

EPOCH_METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")
SPEED_METRICS = ("seconds", "images_per_second", "waiting_share")
"""Of an epoch: its seconds with validation; images trained on in a second, without; and, of an accelerator, the share
of the training time for which it waited for images."""

EpochReport = Callable[[int, dict[str, float]], None]
"""Called after each epoch with its number (from 1), and by name `EPOCH_METRICS` and `SPEED_METRICS`."""

CHECKPOINT, HISTORY = "checkpoint.keras", "history.csv"


class Reseed(keras.callbacks.Callback):
    """Make an epoch's order, augmentation and dropout follow from the seed and the epoch's number alone."""

    def __init__(self, batches: Batches, seed: int) -> None:
        super().__init__()
        self._batches, self._seed = batches, seed

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        self._batches.start_epoch(epoch)
        states = [variable for variable in self.model.variables if variable.name == "seed_generator_state"]
        for position, state in enumerate(states):
            state.assign(np.random.SeedSequence([self._seed, position, epoch]).generate_state(2))


class EpochRecorder(keras.callbacks.Callback):
    """Keep the history and the model with the lowest validation loss; stop when patience is over.

    What a killed run recorded is reported again, so that the curves of the run that continues are whole.

    Args:
        images: that an epoch trains on.

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
        images: int = 0,
    ) -> None:
        super().__init__()
        self.served: Any = None
        self._images = images
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

    def on_test_begin(self, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        self._trained = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        if self._on_progress:
            steps = self.params["steps"]
            self._on_progress(self._epoch * steps + batch + 1, self._recipe.epochs * steps)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        logs = logs or {}
        row = {"epoch": epoch + 1, **{name: float(logs[name]) for name in EPOCH_METRICS}}
        if not np.isfinite(row["loss"]):
            raise ModelError(
                f"The loss must stay finite. Received: {row['loss']} in epoch {epoch + 1} of {self._architecture}, "
                f"at a learning rate of {self._recipe.learning_rate}. Lower training.learning_rate, or set "
                "training.precision to float32."
            )
        row["seconds"] = time.perf_counter() - self._started
        row["images_per_second"] = self._images / (self._trained - self._started)
        if "waiting_share" in logs:
            row["waiting_share"] = logs["waiting_share"]
        if row["val_loss"] < min((earlier["val_loss"] for earlier in self._rows), default=np.inf):
            self.served.set_weights(self.model.get_weights())
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
        metrics = {name: value for name, value in row.items() if name != "epoch"}
        log.info(
            "%s epoch %d/%d: loss %.4f, accuracy %.3f, val_loss %.4f, val_accuracy %.3f, %.1f s, %.0f images/s%s",
            self._architecture,
            row["epoch"],
            self._recipe.epochs,
            *(row[name] for name in (*EPOCH_METRICS, "seconds", "images_per_second")),
            f", waited for images {row['waiting_share']:.0%} of the time" if "waiting_share" in row else "",
        )
        if self._on_epoch:
            self._on_epoch(row["epoch"], metrics)


class Backup(keras.callbacks.BackupAndRestore):
    """Back up each epoch, and continue after the last one whose weights were written.

    Keras writes the epoch's number to a second file, which a kill leaves behind the weights. The optimizer's count
    of steps is stored with the weights and can't disagree with them.
    """

    def __init__(self, folder: Path, first_epoch: int, epoch_steps: int) -> None:
        super().__init__(str(folder), delete_checkpoint=False)
        self._first_epoch, self._epoch_steps = first_epoch, epoch_steps

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        super().on_train_begin(logs)
        steps = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
        self.model._initial_epoch = self._first_epoch + steps // self._epoch_steps
