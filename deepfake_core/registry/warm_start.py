"""A training that begins from the network in production, and all that a version has learned from since its first start.

What such a network has learned, its successors know too. So an image that any of them was trained on is no test for it.
"""

import ast
import json
import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd

from deepfake_core.config import PRODUCTION, SPLITS
from deepfake_core.data.dataset import Dataset
from deepfake_core.evaluation.test_split import find_trained_on
from deepfake_core.models import CANDIDATES
from deepfake_core.registry import names
from deepfake_core.registry.aliases import find_production
from deepfake_core.registry.detectors import pull_detector
from deepfake_core.registry.runs import log_parameters, read_table
from deepfake_core.registry.versions import ModelVersion, find_run, read_version
from deepfake_core.storage.files import write_beside, write_json
from deepfake_core.training.export import load_network
from deepfake_core.training.fit import Training, find_backbone

log = logging.getLogger(__name__)

WEIGHTS, ORIGIN = "production.weights.h5", "first_weights.json"
"""In a training's folder: production's backbone, and a `FirstWeights`."""


@dataclass(frozen=True)
class FirstWeights:
    """Where the first weights of a training's backbone come from.

    Attributes:
        weights: for the recipe: a file, or the candidate's own choice.
        origin: for people, such as `version 3 of deepfake-detector`.
        run_id, dataset: of the version; empty for none.
    """

    weights: str
    origin: str
    run_id: str = ""
    dataset: str = ""


def begin(training: Training, dataset: Dataset, model_name: str, run_id: str) -> Training:
    """Return a training whose recipe names a file or ImageNet instead of `production`, and log to its run which.

    It begins as its candidate does by itself where no version is in production, that is another architecture or one
    without a pretrained part, or it has learned images that this training is tested or validated on. A training that
    was killed goes on with what it had begun with.
    """
    if training.recipe.weights != PRODUCTION:
        return training
    folder = training.folder(dataset)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ORIGIN).exists():
        write_json(folder / ORIGIN, vars(_find_first_weights(training, dataset, model_name, folder / WEIGHTS)))
    found = FirstWeights(**json.loads((folder / ORIGIN).read_text()))
    log.info("%s begins from %s", training.architecture, found.origin)
    log_parameters(run_id, {"begins_from": found.origin})
    if found.run_id:
        mlflow.MlflowClient().set_tag(run_id, names.BEGAN_FROM, f"{found.run_id} {found.dataset}")
    return replace(training, recipe=training.recipe.model_copy(update={"weights": found.weights}))


def _find_first_weights(training: Training, dataset: Dataset, model_name: str, file: Path) -> FirstWeights:
    own = CANDIDATES[training.architecture].RECIPE.weights
    production = find_production(model_name)
    if production is None:
        return FirstWeights(own, f"{own}: no version of {model_name} is in production")
    version, name = read_version(model_name, production), f"version {production} of {model_name}"
    if version.tags.get(names.ARCHITECTURE) != training.architecture:
        return FirstWeights(own, f"{own}: {name} is another architecture")
    if obstacle := _find_obstacle(version, dataset, training.holdout):
        return FirstWeights(own, f"{own}: {name} {obstacle}")
    with tempfile.TemporaryDirectory() as temporary:
        backbone = find_backbone(load_network(pull_detector(f"models:/{model_name}/{production}", Path(temporary))))
    if backbone is None:
        return FirstWeights(own, f"{own}: {name} has no pretrained part")
    with write_beside(file) as beside:
        named = beside.with_name(f"{beside.name}.weights.h5")  # Keras asks for such a name
        backbone.save_weights(named)
        named.replace(beside)
    return FirstWeights(str(file), name, version.run_id, version.dataset_version)


def _find_obstacle(version: ModelVersion, dataset: Dataset, holdout: tuple[str, ...]) -> str:
    """Return why no training may begin from a version; empty if nothing forbids it."""
    learned = list_learned(version)
    if learned is None:
        return "does not say all images that it was trained on"
    trained_on = {source for _, one in learned for source in one.loc[one["split"] == "train", "source"]}
    if held_out := sorted(set(holdout) & trained_on):
        return f"was trained on {', '.join(held_out)}, which is held out now"
    others = [manifest for name, manifest in learned if name != dataset.version]
    val, *asked = (dataset.split(split) for split in SPLITS if split != "train" and split in dataset.splits)
    known = find_learned(val, dataset, [one[one["split"] != "val"] for one in others]).sum()
    known += sum(find_learned(rows, dataset, others).sum() for rows in asked)
    return f"has learned {known} of the images that are not to be trained on now" if known else ""


def list_learned(version: ModelVersion, known: str = "") -> list[tuple[str, pd.DataFrame]] | None:
    """Return what a version has learned from: its own data set, and those of the versions from which its training, and
    theirs, began. Each is its version and its manifest, without the sources that were held out.

    Args:
        known: a data set that is not asked for.

    Returns:
        None if a run is gone, or holds no manifest.
    """
    found: list[tuple[str, pd.DataFrame]] = []
    run_id, dataset = version.run_id, version.dataset_version
    while run_id:
        run = find_run(run_id)
        if not known or dataset != known:
            parent = run and find_run(run.data.tags.get(names.PARENT, run_id))
            manifest = parent and read_table(parent.info.run_id, names.MANIFEST)
            if manifest is None:
                return None
            held_out = ast.literal_eval(parent.data.params.get("evaluation.holdout_sources", "()"))
            found.append((dataset, manifest[~manifest["source"].isin(held_out)]))
        began_from = run.data.tags.get(names.BEGAN_FROM, "") if run else ""
        run_id, _, dataset = began_from.partition(" ")
    return found


def find_learned(rows: pd.DataFrame, dataset: Dataset, manifests: list[pd.DataFrame]) -> np.ndarray:
    """Return which images of a data set are in what was learned, or near copies of such; bool of shape (len(rows),)."""
    learned = np.zeros(len(rows), bool)
    for manifest in manifests:
        learned |= find_trained_on(rows, dataset.manifest, manifest)
    return learned
