"""A training that was killed after its version was registered: found, and read back from MLflow, to be finished."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from deepfake_core.config import EvaluationParameters, TrainingParameters
from deepfake_core.data.dataset import Dataset
from deepfake_core.evaluation.evaluation import Evaluation
from deepfake_core.registry import names
from deepfake_core.registry.candidates import TrainedCandidate
from deepfake_core.registry.detectors import pull_detector
from deepfake_core.registry.fingerprint import find_newest
from deepfake_core.registry.runs import hold_run, search_runs
from deepfake_core.registry.versions import ModelVersion, find_run, tag_version
from deepfake_core.storage.files import write_beside
from deepfake_core.training.checkpoints import EPOCH_METRICS, HISTORY, SPEED_METRICS
from deepfake_core.training.fit import Candidate, Training

log = logging.getLogger(__name__)


def find_unfinished(model_name: str, fingerprint: str) -> ModelVersion | None:
    """Return the newest version with this fingerprint if its decision or report is missing and can be made; or None."""
    newest = find_newest(model_name, fingerprint)
    if newest is None or newest.is_finished or names.FILES_REMOVED in newest.tags or not _find_parent(newest):
        return None
    missing = "report" if newest.decision else "decision"
    log.info("%s: version %s is registered without a %s: it is continued", model_name, newest.version, missing)
    return newest


@contextmanager
def reopen_retrain(version: ModelVersion, flow_run_id: str) -> Iterator[str]:
    """Open the run of the retrain that registered a version again; from now on, the version is this flow run's."""
    tag_version(version.name, version.version, {names.FLOW_RUN_ID: flow_run_id})
    parent = _find_parent(version).info.run_id
    mlflow.MlflowClient().update_run(parent, "RUNNING")
    with hold_run(parent):
        yield parent


def recall_candidates(
    version: ModelVersion, dataset: Dataset, training: TrainingParameters, evaluation: EvaluationParameters
) -> list[TrainedCandidate]:
    """Read back the candidates of the retrain that registered a version, and put the version's detector in its folder.

    The folder may be gone, or hold what another retrain made of it: what was registered is what is decided on.

    Args:
        dataset, training, evaluation: as in that retrain.
    """
    parent = _find_parent(version).info.run_id
    below = search_runs(f"tags.`{names.PARENT}` = '{parent}' and attributes.status = 'FINISHED'")
    runs = {run.info.run_name: run for run in below}
    trained = []
    for architecture in training.candidates:
        if run := runs.get(architecture):
            folder = Training.plan(architecture, training, evaluation.holdout_sources).folder(dataset)
            history = _read_history(run)
            if run.info.run_id == version.run_id:
                _restore_training(version, folder, history)
            candidate = Candidate(architecture, folder / names.DETECTOR, history)
            trained.append(TrainedCandidate(candidate, run.info.run_id, Evaluation.unflatten("val", run.data.metrics)))
    return trained


def _find_parent(version: ModelVersion) -> Any:
    """Return the run of the retrain that registered a version; None if it, or the candidate's, is gone."""
    run = find_run(version.run_id)
    return run and find_run(run.data.tags.get(names.PARENT, ""))


def _read_history(run: Any) -> pd.DataFrame:
    """Return the rows of `history.csv` that a training logged as metrics, one a step."""
    client = mlflow.MlflowClient()
    columns = {
        name: {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
        for name in (*EPOCH_METRICS, *SPEED_METRICS)
    }
    columns = {name: values for name, values in columns.items() if values}  # on a CPU there is no waiting share
    return pd.DataFrame(columns).rename_axis("epoch").sort_index().reset_index()


def _restore_training(version: ModelVersion, folder: Path, history: pd.DataFrame) -> None:
    detector, beside = folder / names.DETECTOR, folder / f".{names.DETECTOR}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    pull_detector(f"models:/{version.name}/{version.version}", beside)
    with write_beside(folder / HISTORY) as file:
        history.to_csv(file, index=False)
    shutil.rmtree(detector, ignore_errors=True)
    beside.replace(detector)
