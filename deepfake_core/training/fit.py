"""Batches and an architecture become the checkpoint with the lowest validation loss."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import pandas as pd

from deepfake_core.config import Architecture, Precision, Recipe, TrainingParameters
from deepfake_core.data.dataset import Dataset
from deepfake_core.data.images import Decode, Images, load_seen
from deepfake_core.detector import DESCRIPTION
from deepfake_core.errors import ConfigurationError
from deepfake_core.models import CANDIDATES
from deepfake_core.models.heads import join_heads, split_head
from deepfake_core.storage.locks import lock_folder
from deepfake_core.storage.progress import Progress
from deepfake_core.training import accelerator
from deepfake_core.training.accelerator import Feeding, choose_feeding
from deepfake_core.training.batches import Batches
from deepfake_core.training.checkpoints import CHECKPOINT, HISTORY, Backup, EpochRecorder, EpochReport, Reseed
from deepfake_core.training.devices import choose_precision, compute_in, sees_only_cpus, spread_over
from deepfake_core.training.export import export_detector, load_network
from deepfake_core.training.jax_layers import replace_layers
from deepfake_core.training.kinds import choose_kinds, compile_kinds, number_kinds
from deepfake_core.training.optimizer import FusedAdam

log = logging.getLogger(__name__)

HEAD_LEARNING_RATE = 0.001
"""While a pretrained backbone is left as it is."""

STATE_FORMAT = 2
"""Of a training's folder. Raised when what is random, or how weights are kept, changes: no other format is resumed."""


@dataclass(frozen=True)
class Candidate:
    """A trained architecture.

    Attributes:
        folder: holds `checkpoint.keras`, `model.onnx` and `detector.json`.
        history: one row per epoch: `epoch`, `EPOCH_METRICS` and `SPEED_METRICS`.
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


@dataclass(frozen=True)
class Training:
    """What a training follows from, beside its images.

    Attributes:
        seed: of first weights, orders and augmentation.
        devices: how many of the backend's devices share each batch.
        holdout: sources that are not trained on.
    """

    architecture: Architecture
    recipe: Recipe
    seed: int = 0
    devices: int = 1
    holdout: tuple[str, ...] = ()

    @classmethod
    def plan(cls, architecture: Architecture, parameters: TrainingParameters, holdout: tuple[str, ...]) -> "Training":
        """Adjust the architecture's own recipe to the parameters."""
        recipe = parameters.adjust(CANDIDATES[architecture].RECIPE)
        return cls(architecture, recipe, parameters.seed, parameters.devices, holdout)

    def folder(self, dataset: Dataset) -> Path:
        """Return where it keeps its state: a folder that two trainings share only if they would be the same."""
        network = Path(str(CANDIDATES[self.architecture].__file__)).read_text()
        same = [STATE_FORMAT, dataset.version, network, self.recipe.model_dump(mode="json"), self.seed, self.devices]
        same += sorted(self.holdout)
        name = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]
        return dataset.store.training(dataset.version, f"{self.architecture}-{name}")


def load_splits(training: Training, dataset: Dataset, on_progress: Progress | None = None) -> tuple[Images, Images]:
    """Return what is trained on, and the validation split. An accelerator reads all before it begins, CPUs do not."""
    decode: Decode = "once" if sees_only_cpus() else "now"
    size = training.recipe.image_size
    train, val = (load_seen(dataset, split, size, training.holdout, on_progress, decode) for split in ("train", "val"))
    return train, val


def train_candidate(
    training: Training,
    train: Images,
    val: Images,
    folder: Path,
    *,
    on_epoch: EpochReport | None = None,
    on_progress: Progress | None = None,
    feeding: Feeding | None = None,
) -> Candidate:
    """Train one architecture and keep its best checkpoint, in float32 whatever it was trained in.

    Adam on binary cross-entropy; stops after `recipe.patience` epochs without a lower validation loss. A pretrained
    backbone is left as it is for `recipe.head_epochs`. What is random in an epoch follows from the seed and the
    epoch's number alone, so a training that was killed continues after its last finished epoch as if it had not been.

    Args:
        folder: of this training alone. Give it again, with all else equal, to continue, or to get what was finished.
        on_progress: called after some batches with the batches done and those of all epochs.
        feeding: where images are changed; None lets the hardware decide.

    Raises:
        LockedError: if another process is at this training.
        ConfigurationError: if there are fewer devices, or if crops are to train a network that takes one size.
        DeviceError: if an accelerator fails, or has too little memory.
        ModelError: if pretrained weights are missing, or the loss is not finite.
    """
    architecture, recipe, detector = training.architecture, training.recipe, folder / "detector"
    remedy = "change a parameter of the training, such as its seed"
    with lock_folder(folder, f"a training of {architecture}", remedy):
        detector.mkdir(exist_ok=True)
        record = EpochRecorder(
            architecture, recipe, folder, detector, on_epoch=on_epoch, on_progress=on_progress, images=len(train)
        )
        if not (detector / DESCRIPTION).exists():
            precision = train_checkpoint(training, train, val, folder, record, feeding)
            description = {"architecture": architecture, "trained_in": precision, "image_size": recipe.image_size}
            export_detector(detector / CHECKPOINT, detector, description)
        record.report_new()
    candidate = Candidate(architecture, detector, pd.read_csv(folder / HISTORY))
    log.info("%s: kept the checkpoint of epoch %d of %d", architecture, candidate.best_epoch, len(candidate.history))
    return candidate


def find_backbone(network: keras.Model) -> keras.Model | None:
    """Return the pretrained part of a candidate that transfers learning, None of another."""
    return next((layer for layer in network.layers if isinstance(layer, keras.Model)), None)


def train_checkpoint(
    training: Training, train: Images, val: Images, folder: Path, record: EpochRecorder, feeding: Feeding | None = None
) -> Precision:
    """Train one architecture as `train_candidate` does, without a lock and without exporting it.

    Returns:
        What it was computed in.
    """
    architecture, recipe = training.architecture, training.recipe
    record.served = CANDIDATES[architecture].build(recipe)
    kinds = choose_kinds(train) if recipe.head_per_source else ()
    if kinds:
        record.served = join_heads(split_head(record.served, len(kinds)))
        log.info("%s: a head each for the fakes of %s", architecture, ", ".join(kinds))
        train, val = number_kinds(train, kinds), number_kinds(val, ())
    if recipe.augmentation.crop < 1 and not find_backbone(record.served):
        raise ConfigurationError(
            f"`training.augmentation.crop` must be 1 for {architecture}, which takes images of one size. "
            f"Received: {recipe.augmentation.crop}. Set it to 1, or leave out this candidate."
        )
    precision = choose_precision(recipe.precision, record.served)
    with spread_over(training.devices), compute_in(precision):
        _fit(training, train, val, record, folder, feeding, len(kinds))
    return precision


def _fit(
    training: Training,
    train: Images,
    val: Images,
    record: EpochRecorder,
    folder: Path,
    feeding: Feeding | None,
    heads: int,
) -> None:
    architecture, recipe, seed = training.architecture, training.recipe, training.seed
    keras.utils.set_random_seed(seed)
    cropped = recipe.augmentation.crop < 1
    # Without a size, the network takes crops in training and whole images in validation.
    model = CANDIDATES[architecture].build(recipe.model_copy(update={"image_size": None}) if cropped else recipe)
    if heads:
        model = split_head(model, heads)
    measures = compile_kinds() if heads else {"loss": "binary_crossentropy", "metrics": ["accuracy"]}
    batches, validation = Batches(train, recipe.batch_size, recipe.augmentation, seed), Batches(val, recipe.batch_size)
    feeding = feeding or choose_feeding(batches, validation)
    if feeding != "host" and keras.backend.backend() == "jax":
        model = replace_layers(model)
    log.info("%s: %s parameters, computed in %s", architecture, f"{model.count_params():,}", model.compute_dtype)
    backbone = find_backbone(model)
    head_epochs = min(recipe.head_epochs, recipe.epochs) if backbone and recipe.weights != "none" else 0
    for phase, first, end in (("head", 0, head_epochs), ("all", head_epochs, recipe.epochs)):
        if first == end or record.patience_is_over():
            continue
        if backbone:
            backbone.trainable = phase == "all"
        model.compile(
            optimizer=make_optimizer(recipe, phase, steps=len(batches) * (end - first), epoch_steps=len(batches)),
            **measures,
        )
        callbacks = [Reseed(batches, seed), record, Backup(folder / phase, first, len(batches))]
        if feeding != "host" or keras.backend.backend() == "jax":
            accelerator.fit(model, batches, validation, feeding, callbacks, end)
            continue
        model.fit(
            batches.for_fit(),
            validation_data=validation.for_fit(),
            epochs=end,
            shuffle=False,  # `batches` shuffles; Keras would shuffle them again, by a state that a kill loses
            callbacks=callbacks,
            verbose=0,
        )


def make_optimizer(recipe: Recipe, phase: str, steps: int, epoch_steps: int) -> keras.optimizers.Optimizer:
    """Make Adam, or AdamW that spares offsets and normalisation, with the recipe's schedule over one phase."""
    if phase == "head":
        return FusedAdam(HEAD_LEARNING_RATE)
    target = recipe.learning_rate
    warmup = min(round(recipe.warmup_epochs * epoch_steps), steps - 1)
    rate: Any = target
    if recipe.schedule == "cosine" or warmup:
        rate = keras.optimizers.schedules.CosineDecay(
            0.0 if warmup else target,
            steps - warmup,
            alpha=0.0 if recipe.schedule == "cosine" else 1.0,  # the share that is left at the end
            warmup_target=target if warmup else None,
            warmup_steps=warmup,
        )
    optimizer = FusedAdam(rate, weight_decay=recipe.weight_decay or None)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer
