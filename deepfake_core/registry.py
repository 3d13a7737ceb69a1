"""Runs, metrics and model versions in MLflow; with `pyfunc_model`, the only code that imports mlflow.

MLflow is where `MLFLOW_TRACKING_URI` says, else `sqlite:///mlflow.db` in the current folder.
"""

import logging
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

from deepfake_core.errors import ModelError, ServiceError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from deepfake_core.manifest import Dataset

log = logging.getLogger(__name__)

EXPERIMENT = "deepfake-detection"
DEFAULT_MODEL = "deepfake-detector"
PRODUCTION = "production"
DETECTOR = "detector"
DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"


@dataclass(frozen=True)
class ModelVersion:
    """A registered version, as plain values."""

    name: str
    version: str
    run_id: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    created: str


def connect() -> mlflow.MlflowClient:
    """Return a client of the tracking server, which is asked once whether it is there.

    Raises:
        ServiceError: if it can't be reached; within seconds, not after MLflow's minutes of retries.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_TRACKING_URI
    mlflow.set_tracking_uri(uri)
    with _environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT="10"):
        try:
            client = mlflow.MlflowClient()
            client.search_experiments(max_results=1)
        except (ModuleNotFoundError, UnsupportedModelRegistryStoreURIException) as exc:
            raise ServiceError(
                f"A database as tracking store needs the whole of MLflow. Received: {uri}. Set MLFLOW_TRACKING_URI "
                "to a tracking server's http address, or install deepfake-retraining[train]."
            ) from exc
        except Exception as exc:
            raise ServiceError(
                f"MLflow must answer at the tracking URI. Received: {uri}, which failed "
                f"({type(exc).__name__}: {str(exc).splitlines()[0][:300]}). Start the server, or correct "
                "MLFLOW_TRACKING_URI."
            ) from exc
    return client


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def open_run(name: str, parent: str = "", tags: Mapping[str, str] | None = None) -> Iterator[str]:
    """Open a run in the experiment and yield its id; it ends as FINISHED, or FAILED if the body raises."""
    client = connect()
    found = client.get_experiment_by_name(EXPERIMENT)
    experiment_id = found.experiment_id if found else client.create_experiment(EXPERIMENT)
    all_tags = {
        "mlflow.runName": name,
        "mlflow.user": os.environ.get("USER", "unknown"),
        "mlflow.source.name": "deepfake-retraining",
        "mlflow.source.git.commit": read_git_commit(),
        **(tags or {}),
    }
    if parent:
        all_tags["mlflow.parentRunId"] = parent
    run_id = client.create_run(experiment_id, tags=all_tags).info.run_id
    try:
        yield run_id
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")


def read_git_commit() -> str:
    """Return the checkout's commit, with `-dirty` if files differ from it; `unknown` outside one."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


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


def log_dataset(run_id: str, dataset: "Dataset") -> None:
    """Log the manifest as the run's dataset input, and it, dataset.json and the report as artifacts."""
    from mlflow.data.pandas_dataset import from_pandas  # pandas is no part of the base install

    client = mlflow.MlflowClient()
    with warnings.catch_warnings():  # advice on schemas of training tables, which a manifest is not
        warnings.simplefilter("ignore", UserWarning)
        manifest = from_pandas(
            dataset.manifest, source=str(dataset.path / "manifest.parquet"), name="manifest", digest=dataset.version
        )
        tags = [mlflow.entities.InputTag("mlflow.data.context", "training")]
        dataset_input = mlflow.entities.DatasetInput(manifest._to_mlflow_entity(), tags)
    client.log_inputs(run_id, datasets=[dataset_input])
    for file in ("manifest.parquet", "dataset.json", "report.html"):
        client.log_artifact(run_id, str(dataset.path / file), "dataset")
    client.set_tag(run_id, "dataset_version", dataset.version)


def log_metrics(run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
    """Log figures, as one request."""
    now = int(time.time() * 1000)
    batch = [Metric(name, value, now, step) for name, value in metrics.items()]
    mlflow.MlflowClient().log_batch(run_id, metrics=batch)


def log_tags(run_id: str, tags: Mapping[str, str]) -> None:
    mlflow.MlflowClient().log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def log_figures(run_id: str, figures: Mapping[str, "Figure"]) -> None:
    """Log each figure as `figures/<name>.png`."""
    for name, figure in figures.items():
        mlflow.MlflowClient().log_figure(run_id, figure, f"figures/{name}.png")


def log_text(run_id: str, text: str, artifact: str) -> None:
    mlflow.MlflowClient().log_text(run_id, text, artifact)


def log_file(run_id: str, file: Path, folder: str) -> None:
    mlflow.MlflowClient().log_artifact(run_id, str(file), folder)


def register_detector(run_id: str, folder: Path, model_name: str, example: bytes, tags: Mapping[str, str]) -> str:
    """Log a detector's folder as a pyfunc model of the run and register it; return the version.

    Args:
        folder: holds `model.onnx`, `detector.json` and `checkpoint.keras`.
        example: one encoded image.
    """
    import pandas as pd  # neither it nor what signatures need is part of the base install
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    optional = {"label": "string", "fake_probability": "double", "error": "string"}
    signature = ModelSignature(
        inputs=Schema([ColSpec("binary", "image")]),
        outputs=Schema(
            [
                *(ColSpec(kind, name, required=False) for name, kind in optional.items()),
                ColSpec("double", "threshold"),
            ]
        ),
    )
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as temporary:
        detector = Path(temporary) / DETECTOR
        shutil.copytree(folder, detector)
        with _environment(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"), mlflow.start_run(run_id=run_id):
            model = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(here / "pyfunc_model.py"),
                code_paths=[str(here / "detector.py")],
                artifacts={DETECTOR: str(detector)},
                signature=signature,
                input_example=pd.DataFrame({"image": [example]}),
                pip_requirements=[
                    f"{package}=={installed_version(package)}"
                    for package in ("mlflow", "numpy", "onnxruntime", "pandas", "pillow")
                ],
            )
    registered = mlflow.register_model(model.model_uri, model_name, tags=dict(tags))
    return str(registered.version)


def find_production(model_name: str) -> str | None:
    """Return the version that has the alias `production`, or None if there is none yet."""
    try:
        return str(mlflow.MlflowClient().get_model_version_by_alias(model_name, PRODUCTION).version)
    except MlflowException as exc:
        # An unknown alias is INVALID_PARAMETER_VALUE, an unknown model RESOURCE_DOES_NOT_EXIST.
        if exc.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            return None
        raise


def set_production(model_name: str, version: str) -> None:
    """Move the alias `production` to a version."""
    mlflow.MlflowClient().set_registered_model_alias(model_name, PRODUCTION, version)


def tag_version(model_name: str, version: str, tags: Mapping[str, str]) -> None:
    for name, value in tags.items():
        mlflow.MlflowClient().set_model_version_tag(model_name, version, name, value)


def pull_detector(model_uri: str, folder: Path) -> Path:
    """Copy a version's detector (`model.onnx`, `detector.json`, `checkpoint.keras`) into a folder.

    Args:
        model_uri: such as `models:/deepfake-detector@production` or `models:/deepfake-detector/3`.

    Raises:
        ModelError: if MLflow has no such version.
    """
    connect()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            copied = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{model_uri}/artifacts/{DETECTOR}", dst_path=temporary
            )
        except (MlflowException, OSError) as exc:
            raise ModelError(
                f"A model must be a version in the registry, such as models:/{DEFAULT_MODEL}@{PRODUCTION}. "
                f"Received: {model_uri}, at {mlflow.get_tracking_uri()}: {str(exc).splitlines()[0]} See "
                "`deepfake versions`; `make demo` or `python -m flows.retrain` makes one."
            ) from exc
        shutil.copytree(copied, folder, dirs_exist_ok=True)
    return folder


def list_versions(model_name: str) -> list[ModelVersion]:
    """Return every version, newest first."""
    client = connect()
    found = client.search_model_versions(f"name = '{model_name}'")
    return [
        read_version(model_name, str(version.version))
        for version in sorted(found, key=lambda version: int(version.version), reverse=True)
    ]


def read_version(model_name: str, version: str) -> ModelVersion:
    """Return one version with its run's figures."""
    client = mlflow.MlflowClient()
    found = client.get_model_version(model_name, version)
    run_id = str(found.run_id)
    return ModelVersion(
        name=model_name,
        version=version,
        run_id=run_id,
        aliases=tuple(sorted(found.aliases)),
        tags=found.tags,
        metrics=client.get_run(run_id).data.metrics,
        created=time.strftime("%Y-%m-%d %H:%M", time.localtime(found.creation_timestamp / 1000)),
    )


def find_version(model_name: str, flow_run_id: str) -> str:
    """Return the version that a flow run registered.

    Raises:
        ModelError: if it registered none in the MLflow that this process knows.
    """
    found = [version for version in list_versions(model_name) if version.tags.get("flow_run_id") == flow_run_id]
    if not found:
        raise ModelError(
            f"Training must register its model where this process looks. Received: no version of {model_name} by "
            f"flow run {flow_run_id} at {mlflow.get_tracking_uri()}. Set the same MLFLOW_TRACKING_URI on all workers."
        )
    return found[0].version


def is_drawn(model_name: str, version: str) -> bool:
    """Whether a version was trained on drawn images."""
    return mlflow.MlflowClient().get_model_version(model_name, version).tags.get("drawn_images") == "true"
