"""Runs of the experiment: what a training, a retrain and a scoring log, and what is read of it again."""

import getpass
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from deepfake_core.config import EvaluationParameters, PromotionParameters, TrainingParameters
from deepfake_core.errors import DeepfakeError, ServiceError
from deepfake_core.registry import names
from deepfake_core.registry.connection import connect, list_all, set_environment
from deepfake_core.registry.fingerprint import read_git_commit
from deepfake_core.registry.versions import ModelVersion, find_run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from deepfake_core.data.dataset import Dataset
    from deepfake_core.storage.store import Store
    from deepfake_core.training.fit import Training

log = logging.getLogger(__name__)

MAX_METRICS_PER_REQUEST = 1000
"""What MLflow takes in one request."""


@contextmanager
def open_run(name: str, parent: str = "", tags: Mapping[str, str] | None = None) -> Iterator[str]:
    """Open a run in the experiment and yield its id; it ends as FINISHED, or FAILED if the body raises.

    Raises:
        ServiceError: if MLflow can't be reached, now or when the body raises; the run is then left as RUNNING.
    """
    client = connect()
    found = client.get_experiment_by_name(names.EXPERIMENT)
    experiment_id = found.experiment_id if found else client.create_experiment(names.EXPERIMENT)
    all_tags = {
        "mlflow.runName": name,
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": "deepfake-retraining",
        "mlflow.source.git.commit": read_git_commit(),
        **(tags or {}),
    }
    if parent:
        all_tags[names.PARENT] = parent
    with hold_run(client.create_run(experiment_id, tags=all_tags).info.run_id) as run_id:
        yield run_id


@contextmanager
def hold_run(run_id: str) -> Iterator[str]:
    """Yield the id of a run; it ends as FINISHED, or FAILED if the body raises."""
    client = mlflow.MlflowClient()
    try:
        yield run_id
    except BaseException as exc:
        try:
            connect().set_terminated(run_id, "FAILED")
        except ServiceError as gone:
            if isinstance(exc, Exception) and not isinstance(exc, DeepfakeError):
                raise gone from exc
        raise
    client.set_terminated(run_id, "FINISHED")


def open_retrain(name: str, flow_run_id: str, hardware: str, dataset: "Dataset") -> AbstractContextManager[str]:
    """Open the run of a retrain, below which its candidates have theirs."""
    tags = {
        names.PREFECT_FLOW_RUN_ID: flow_run_id,
        names.DRAWN_IMAGES: str(dataset.is_drawn).lower(),
        names.DATA_FOLDER: dataset.store.identify(),
        names.HARDWARE: hardware,
    }
    return open_run(name, tags=tags)


def end_killed_runs(store: "Store") -> None:
    """End the runs of a data folder that a kill left running, and those below them. The caller holds the folder."""
    running = search_runs("attributes.status = 'RUNNING'")
    own = {run.info.run_id for run in running if run.data.tags.get(names.DATA_FOLDER) == store.identify()}
    killed = [run.info.run_id for run in running if run.data.tags.get(names.PARENT) in own]
    for run_id in [*killed, *own]:  # a parent last: whoever is killed here finds the others by it
        mlflow.MlflowClient().set_terminated(run_id, "KILLED")
        log.info("run %s was killed: it is ended", run_id)


def search_runs(filter_string: str = "") -> list[Any]:
    """Return the runs of the experiment, without those that were removed."""
    client = mlflow.MlflowClient()
    found = client.get_experiment_by_name(names.EXPERIMENT)
    experiments = [found.experiment_id] if found else []
    return list_all(client.search_runs, experiment_ids=experiments, filter_string=filter_string)


@contextmanager
def monitor_system(run_id: str) -> Iterator[None]:
    """Log what the machine does meanwhile, as the run's `system/...` metrics, every ten seconds and at the end.

    GPUs too. `MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL` sets another interval.
    """
    from mlflow.system_metrics import system_metrics_monitor  # needs psutil, no part of the base install

    logging.getLogger(system_metrics_monitor.__name__).setLevel(logging.WARNING)  # it logs each start and stop
    monitor = system_metrics_monitor.SystemMetricsMonitor(run_id)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
        monitor.collect_metrics()  # it drops what it has not logged, which is all of a run shorter than its interval
        monitor.publish_metrics(monitor.aggregate_metrics())
        monitor.mlflow_logger.flush()


def log_parameters(run_id: str, parameters: Mapping[str, Any]) -> None:
    """Log nested parameters under dotted names, such as `training.epochs`."""
    params = [Param(name, str(value)) for name, value in _flatten(parameters)]
    mlflow.MlflowClient().log_batch(run_id, params=params)


def _flatten(parameters: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def log_inputs(
    run_id: str,
    dataset: "Dataset",
    training: TrainingParameters,
    evaluation: EvaluationParameters,
    promotion: PromotionParameters,
) -> None:
    """Log what a retrain is about to learn from, and with which parameters."""
    log_parameters(
        run_id,
        {
            "training": training.model_dump(),
            "evaluation": evaluation.model_dump(),
            "promotion": promotion.model_dump(),
            "data": {**dataset.description["parameters"], "version": dataset.version, "sources": dataset.source_names},
        },
    )
    log_dataset(run_id, dataset)


def log_dataset(run_id: str, dataset: "Dataset") -> None:
    """Log the manifest as the run's dataset input, and it, dataset.json and the report as artifacts."""
    from mlflow.data.pandas_dataset import from_pandas  # pandas is no part of the base install

    client = mlflow.MlflowClient()
    with warnings.catch_warnings():  # advice on schemas of training tables, which a manifest is not
        warnings.simplefilter("ignore", UserWarning)
        manifest = from_pandas(
            dataset.manifest, source=f"{dataset.address}/manifest.parquet", name="manifest", digest=dataset.version
        )
        tags = [mlflow.entities.InputTag("mlflow.data.context", "training")]
        dataset_input = mlflow.entities.DatasetInput(manifest._to_mlflow_entity(), tags)
    client.log_inputs(run_id, datasets=[dataset_input])
    for file in (dataset.path / "manifest.parquet", dataset.path / "dataset.json", dataset.report):
        client.log_artifact(run_id, str(file), "dataset")
    client.set_tag(run_id, names.DATASET_VERSION, dataset.version)


def log_scoring(run_id: str, version: ModelVersion, images: str, digest: str, count: int) -> None:
    """Log which version scored which images: the run's input model, and its dataset input."""
    client = mlflow.MlflowClient()
    source = str(client.get_model_version(version.name, version.version).source)  # such as models:/m-215ea95a
    place, profile = json.dumps({"uri": images}), json.dumps({"num_rows": count})
    dataset = mlflow.entities.Dataset(
        name="scored images", digest=digest, source_type="local", source=place, profile=profile
    )
    tags = [mlflow.entities.InputTag("mlflow.data.context", "scoring")]
    client.log_inputs(
        run_id,
        datasets=[mlflow.entities.DatasetInput(dataset, tags)],
        models=[mlflow.entities.LoggedModelInput(source.removeprefix("models:/"))],
    )
    client.set_tag(run_id, names.SCORED_BY, f"{version.name}/{version.version}")


def log_training(run_id: str, training: "Training") -> None:
    """Log what one candidate's training follows from."""
    settings = {**training.recipe.model_dump(), "seed": training.seed, "devices": training.devices}
    log_parameters(run_id, {"architecture": training.architecture, "training": settings})


def read_parameters(run_id: str) -> dict[str, str]:
    """Return a run's parameters, by dotted name."""
    return dict(sorted(mlflow.MlflowClient().get_run(run_id).data.params.items()))


def log_metrics(run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
    """Log metrics, in as few requests as MLflow allows."""
    now = int(time.time() * 1000)
    batch = [Metric(name, value, now, step) for name, value in metrics.items()]
    for start in range(0, len(batch), MAX_METRICS_PER_REQUEST):
        mlflow.MlflowClient().log_batch(run_id, metrics=batch[start : start + MAX_METRICS_PER_REQUEST])


def log_figures(run_id: str, figures: Mapping[str, "Figure"]) -> None:
    """Log each figure as `figures/<name>.png`."""
    for name, figure in figures.items():
        mlflow.MlflowClient().log_figure(run_id, figure, f"figures/{name}.png")


def log_text(run_id: str, text: str, artifact: str) -> None:
    mlflow.MlflowClient().log_text(run_id, text, artifact)


def log_file(run_id: str, file: Path, folder: str) -> None:
    mlflow.MlflowClient().log_artifact(run_id, str(file), folder)


def read_table(run_id: str, artifact: str) -> "pd.DataFrame | None":
    """Return a Parquet artifact of a run; None if there is none."""
    import pandas as pd

    with tempfile.TemporaryDirectory() as folder, set_environment(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"):
        try:
            file = mlflow.MlflowClient().download_artifacts(run_id, artifact, folder)
        except (MlflowException, OSError):
            return None
        return pd.read_parquet(file)


def read_text(run_id: str, artifact: str) -> str | None:
    """Return a text artifact of a run; None if there is none."""
    with tempfile.TemporaryDirectory() as folder, set_environment(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"):
        try:
            return Path(mlflow.MlflowClient().download_artifacts(run_id, artifact, folder)).read_text()
        except (MlflowException, OSError):
            return None


def find_local_artifact(run_id: str, artifact: str) -> Path | None:
    """Return an artifact's path on this machine; None if it is elsewhere, or does not exist."""
    run = find_run(run_id)
    path = Path(f"{run.info.artifact_uri}/{artifact}".removeprefix("file://")).absolute() if run else None
    return path if path and path.is_file() else None
