"""Runs, metrics and model versions in MLflow; with `pyfunc_model`, the only code that imports mlflow.

MLflow is where `MLFLOW_TRACKING_URI` says, else `sqlite:///mlflow.db` in the current folder.
"""

import getpass
import hashlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.entities import PagedList
from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

from deepfake_core.errors import ModelError, ProductionMovedError, ServiceError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from deepfake_core.manifest import Dataset

log = logging.getLogger(__name__)

EXPERIMENT = "deepfake-detection"
DEFAULT_MODEL = "deepfake-detector"
PRODUCTION = "production"
PREVIOUS = "previous"
DETECTOR = "detector"
CHECKPOINT_FOLDER = "checkpoint"
FILES_REMOVED = "files_removed"
"""Tag of versions, and of runs, whose model files were removed: when."""

NO_VERSION = "none"
UNKNOWN_COMMIT = "unknown"
SCORES = "evaluation/scores.csv"
MOST_METRICS = 1000
"""What MLflow takes in one request."""

MOST_DESCRIPTION = 5000

LOCK_SECONDS = 60
"""After which a lock on the aliases was left by a process that died; moving them takes a second."""

IN_PROGRESS_DAYS = 14
"""How long a run may take; one that has been running for longer was killed."""

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


@dataclass(frozen=True)
class ModelFiles:
    """The model files that MLflow stores of one run: the checkpoint, and what versions of it serve.

    Attributes:
        versions: those that were registered from the run, in ascending order; none for a candidate that did not win.
        folders: pairs of an artifact store's URI and a path in it.
    """

    run_id: str
    run_name: str
    versions: tuple[str, ...]
    folders: tuple[tuple[str, str], ...]
    bytes: int


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
        "mlflow.user": getpass.getuser(),
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


@contextmanager
def monitor_system(run_id: str) -> Iterator[None]:
    """Log what the machine does meanwhile, as the run's `system/...` metrics, every ten seconds and at the end.

    GPUs too. `MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL` sets another interval.
    """
    from mlflow.system_metrics import system_metrics_monitor  # needs psutil, no part of the base install

    logging.getLogger(system_metrics_monitor.__name__).setLevel(logging.WARNING)  # it tells of each start and stop
    monitor = system_metrics_monitor.SystemMetricsMonitor(run_id)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
        monitor.collect_metrics()  # it drops what it has not logged, which is all of a run shorter than its interval
        monitor.publish_metrics(monitor.aggregate_metrics())
        monitor.mlflow_logger.flush()


def read_git_commit() -> str:
    """Return the checkout's commit, with `-dirty` if files differ from it; outside one GIT_COMMIT, else `unknown`.

    An image has no checkout: building it sets GIT_COMMIT.
    """
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
        return os.environ.get("GIT_COMMIT") or UNKNOWN_COMMIT


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
            dataset.manifest, source=f"{dataset.address}/manifest.parquet", name="manifest", digest=dataset.version
        )
        tags = [mlflow.entities.InputTag("mlflow.data.context", "training")]
        dataset_input = mlflow.entities.DatasetInput(manifest._to_mlflow_entity(), tags)
    client.log_inputs(run_id, datasets=[dataset_input])
    for file in ("manifest.parquet", "dataset.json", "report.html"):
        client.log_artifact(run_id, str(dataset.path / file), "dataset")
    client.set_tag(run_id, "dataset_version", dataset.version)


def log_scoring(run_id: str, version: ModelVersion, images: str, digest: str, count: int) -> None:
    """Log which version scored which images: the run's input model, and its dataset input."""
    client = mlflow.MlflowClient()
    source = str(client.get_model_version(version.name, version.version).source)  # such as models:/m-215ea95a
    dataset = mlflow.entities.Dataset(
        name="scored images",
        digest=digest,
        source_type="local",
        source=json.dumps({"uri": images}),
        profile=json.dumps({"num_rows": count}),
    )
    tags = [mlflow.entities.InputTag("mlflow.data.context", "scoring")]
    client.log_inputs(
        run_id,
        datasets=[mlflow.entities.DatasetInput(dataset, tags)],
        models=[mlflow.entities.LoggedModelInput(source.removeprefix("models:/"))],
    )
    client.set_tag(run_id, "model_version", f"{version.name}/{version.version}")


def read_parameters(run_id: str) -> dict[str, str]:
    """Return a run's parameters, by dotted name."""
    return dict(sorted(mlflow.MlflowClient().get_run(run_id).data.params.items()))


def log_metrics(run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
    """Log figures, as few requests."""
    now = int(time.time() * 1000)
    batch = [Metric(name, value, now, step) for name, value in metrics.items()]
    for start in range(0, len(batch), MOST_METRICS):
        mlflow.MlflowClient().log_batch(run_id, metrics=batch[start : start + MOST_METRICS])


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


def fingerprint_training(dataset_version: str, parameters: Mapping[str, Any]) -> str:
    """Return a hash of what a training follows from: data, parameters, and code; empty if the code is uncommitted."""
    commit = read_git_commit()
    if commit == UNKNOWN_COMMIT or commit.endswith("-dirty"):
        return ""
    same = json.dumps([dataset_version, commit, dict(parameters)], sort_keys=True, default=str)
    return hashlib.sha256(same.encode()).hexdigest()[:16]


def find_same_training(model_name: str, fingerprint: str) -> ModelVersion | None:
    """Return the newest version that a training with this fingerprint registered, or None."""
    if not fingerprint:
        return None
    found = mlflow.MlflowClient().search_model_versions(f"name = '{model_name}' and tags.fingerprint = '{fingerprint}'")
    newest = max((int(version.version) for version in found), default=None)
    return None if newest is None else read_version(model_name, str(newest))


def find_production(model_name: str) -> str | None:
    """Return the version that has the alias `production`, or None if there is none yet."""
    try:
        return str(mlflow.MlflowClient().get_model_version_by_alias(model_name, PRODUCTION).version)
    except MlflowException as exc:
        # An unknown alias is INVALID_PARAMETER_VALUE, an unknown model RESOURCE_DOES_NOT_EXIST.
        if exc.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            return None
        raise


def find_previous(model_name: str) -> str | None:
    """Return the version that a rollback leads to: the one that production replaced."""
    current = find_production(model_name)
    replaced = mlflow.MlflowClient().get_model_version(model_name, current).tags.get("replaced") if current else None
    return replaced if replaced not in (None, NO_VERSION) else None


def move_production(model_name: str, version: str, expected: str | None, reason: str, back: bool = False) -> None:
    """Move the alias `production` to a version, unless it has moved since the caller looked.

    Both versions' tags say who replaced whom, when, by whom and why. The alias `previous` is where a rollback leads:
    the version that the new production replaced.

    Args:
        expected: what the caller found in production, and compared with; None for nothing.
        back: True for a rollback, after which `version` has still replaced what it had replaced before.

    Raises:
        ProductionMovedError: if something else is in production by now.
        ModelError: if the version's model files were removed.
    """
    client = mlflow.MlflowClient()
    with _hold_aliases(client, model_name):
        _require_files(client.get_model_version(model_name, version))
        current = find_production(model_name)
        if current != expected:
            raise ProductionMovedError(
                f"The alias {PRODUCTION} of {model_name} must still be where it was when the models were compared. "
                f"Received: version {current}, no longer {expected}. Compare again."
            )
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        tags = {"production_since": now, "production_by": getpass.getuser(), "production_because": reason}
        if not back:
            tags["replaced"] = current or NO_VERSION
        tag_version(model_name, version, tags)
        if current:
            left = {"production_until": now, "replaced_by": version, "replaced_because": reason}
            tag_version(model_name, current, left)
        client.set_registered_model_alias(model_name, PRODUCTION, version)
        previous = find_previous(model_name)
        if previous:
            client.set_registered_model_alias(model_name, PREVIOUS, previous)
        else:
            client.delete_registered_model_alias(model_name, PREVIOUS)
    log.info("%s: version %s is in production instead of %s: %s", model_name, version, current, reason)


def promote_by_hand(model_name: str, version: str, reason: str, force: bool = False) -> str | None:
    """Put a version into production that a person has chosen; return the version that was there.

    Raises:
        ModelError: if it is there already, or if something speaks against it and `force` is not set.
        ProductionMovedError: if another process moves production meanwhile.
    """
    chosen, current = read_version(model_name, version), find_production(model_name)
    objections = find_objections(chosen, read_version(model_name, current) if current else None)
    if version == current:
        raise ModelError(f"A version must not be in production yet. Received: {version}, which is.")
    if objections and not force:
        raise ModelError(
            f"A version must be suitable, unless it is forced. Received: version {version} of {model_name}: "
            f"{'; '.join(objections)}. Choose another, or force it (--force)."
        )
    forced = f" (forced, though {'; '.join(objections)})" if objections else ""
    move_production(model_name, version, current, f"by hand: {reason}{forced}")
    return current


def roll_back(model_name: str, reason: str) -> tuple[str, str]:
    """Put the version back into production that production replaced; return it and the one it replaces.

    Housekeeping keeps the files of the version that the next rollback leads to. Rollbacks beyond that one reach those
    among the newest versions that it keeps.

    Raises:
        ModelError: if there is none to go back to, or if its model files were removed.
        ProductionMovedError: if another process moves production meanwhile.
    """
    current, previous = find_production(model_name), find_previous(model_name)
    if current is None or previous is None:
        raise ModelError(
            f"A rollback needs a version that production replaced. Received: version {current} of {model_name} in "
            "production, which replaced none. `deepfake promote N` puts any version there."
        )
    read_version(model_name, previous)
    move_production(model_name, previous, current, f"rolled back from version {current}: {reason}", back=True)
    return previous, current


def find_objections(version: ModelVersion, production: ModelVersion | None) -> list[str]:
    """Return what speaks against putting a version into production."""
    objections = []
    if version.tags.get("decision") != "promoted":
        failed = [reason for reason in version.tags.get("reasons", "").split("; ") if reason.startswith("NOT met")]
        objections.append(", ".join(failed) or "it was never compared with production")
    drawn, other = (one.tags.get("drawn_images") == "true" if one else True for one in (version, production))
    if drawn and not other:
        objections.append("it was trained on drawn images, production on photographs")
    return objections


@contextmanager
def _hold_aliases(client: mlflow.MlflowClient, model_name: str) -> Iterator[None]:
    """Let one process at a time move aliases.

    MLflow's registry can't compare and set, but its models' names are unique, whatever stores them: who creates the
    model that serves as lock, has it.
    """
    lock = f"{model_name}-alias-lock"
    while True:
        try:
            client.create_registered_model(lock, description="An alias is being moved. It takes a second.")
            break
        except MlflowException as exc:
            if exc.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        with suppress(MlflowException):  # it may be gone by now
            age = time.time() - client.get_registered_model(lock).creation_timestamp / 1000
            if age > LOCK_SECONDS:
                log.warning("%s was left behind %d s ago by a process that died: it is removed", lock, age)
                client.delete_registered_model(lock)
        time.sleep(0.2)
    try:
        yield
    finally:
        client.delete_registered_model(lock)


def read_manifest(version: ModelVersion) -> "pd.DataFrame | None":
    """Return the manifest of the data set that a version was trained on; None if its run holds none."""
    import pandas as pd

    client = mlflow.MlflowClient()
    parent = client.get_run(version.run_id).data.tags.get("mlflow.parentRunId", version.run_id)
    with tempfile.TemporaryDirectory() as folder, _environment(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"):
        try:
            file = client.download_artifacts(parent, "dataset/manifest.parquet", folder)
        except (MlflowException, OSError):
            return None
        return pd.read_parquet(file)


def read_text(run_id: str, artifact: str) -> str | None:
    """Return a text artifact of a run; None if there is none."""
    with tempfile.TemporaryDirectory() as folder, _environment(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"):
        try:
            return Path(mlflow.MlflowClient().download_artifacts(run_id, artifact, folder)).read_text()
        except (MlflowException, OSError):
            return None


def find_pages(version: ModelVersion) -> dict[str, str]:
    """Return the addresses of MLflow's pages about a version, by what they show; none if no server is tracking."""
    uri = (os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_TRACKING_URI).rstrip("/")
    if not uri.startswith(("http://", "https://")):
        return {}
    experiment = mlflow.MlflowClient().get_run(version.run_id).info.experiment_id
    run = f"{uri}/#/experiments/{experiment}/runs/{version.run_id}"
    return {
        "version": f"{uri}/#/models/{version.name}/versions/{version.version}",
        "figures and curves": run,
        "report": f"{run}/artifacts/report.html",
    }


def find_local_artifact(run_id: str, artifact: str) -> Path | None:
    """Return where an artifact lies on this machine; None if it is elsewhere, or not there."""
    uri = f"{mlflow.MlflowClient().get_run(run_id).info.artifact_uri}/{artifact}"
    path = Path(uri.removeprefix("file://")).absolute()
    return path if path.is_file() else None


def describe_version(model_name: str, version: str, card: str) -> None:
    """Set a version's description: its model card, as Markdown, cut where MLflow's databases end."""
    if len(card) > MOST_DESCRIPTION:
        card = f"{card[: MOST_DESCRIPTION - 40].rsplit(chr(10), 1)[0]}\n\nCut; report.html has all."
    mlflow.MlflowClient().update_model_version(model_name, version, card)


def log_probe(run_id: str, images: Sequence[bytes], scores: Sequence[float]) -> None:
    """Log encoded images and their scores, which the served model must give again (`check_probe`)."""
    with tempfile.TemporaryDirectory() as folder:
        for position, data in enumerate(images):
            (Path(folder) / f"{position:02}.image").write_bytes(data)
        (Path(folder) / "scores.json").write_text(json.dumps([float(score) for score in scores]))
        mlflow.MlflowClient().log_artifacts(run_id, folder, "probe")


def check_probe(version: ModelVersion) -> list[float]:
    """Load a version as its users do, score its probe images, and return the differences from the recorded scores.

    Raises:
        ModelError: if it has no probe images.
    """
    import pandas as pd

    with tempfile.TemporaryDirectory() as folder, _environment(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"):
        try:
            probe = Path(mlflow.MlflowClient().download_artifacts(version.run_id, "probe", folder))
        except (MlflowException, OSError) as exc:
            raise ModelError(
                f"A version needs probe images in its run to be checked. Received: version {version.version} of "
                f"{version.name}, run {version.run_id}, which has none. Retrain, or promote a newer version."
            ) from exc
        recorded = json.loads((probe / "scores.json").read_text())
        images = [file.read_bytes() for file in sorted(probe.glob("*.image"))]
        model = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
    scores = model.predict(pd.DataFrame({"image": images}))["fake_probability"]
    return [abs(float(score) - before) for score, before in zip(scores, recorded, strict=True)]


def tag_version(model_name: str, version: str, tags: Mapping[str, str]) -> None:
    for name, value in tags.items():
        mlflow.MlflowClient().set_model_version_tag(model_name, version, name, value)


def pull_detector(model_uri: str, folder: Path) -> Path:
    """Copy a version's detector (`model.onnx`, `detector.json`, `checkpoint.keras`) into a folder.

    Args:
        model_uri: such as `models:/deepfake-detector@production` or `models:/deepfake-detector/3`.

    Raises:
        ModelError: if MLflow has no such version, or its model files were removed.
    """
    connect()
    _require_files(_look_up(model_uri))
    with tempfile.TemporaryDirectory() as temporary:
        try:
            copied = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{model_uri}/artifacts/{DETECTOR}", dst_path=temporary
            )
        except (MlflowException, OSError) as exc:
            raise ModelError(_explain_uri(model_uri, exc)) from exc
        shutil.copytree(copied, folder, dirs_exist_ok=True)
    return folder


def resolve(model_uri: str) -> tuple[str, str]:
    """Return the model's name and the version that a URI means now.

    Args:
        model_uri: such as `models:/deepfake-detector@production` or `models:/deepfake-detector/3`.

    Raises:
        ModelError: if MLflow has no such version.
    """
    found = _look_up(model_uri)
    return str(found.name), str(found.version)


def _look_up(model_uri: str) -> Any:
    client = mlflow.MlflowClient()
    name, at, alias = model_uri.removeprefix("models:/").partition("@")
    try:
        if at:
            return client.get_model_version_by_alias(name, alias)
        name, _, number = name.partition("/")
        return client.get_model_version(name, number)
    except MlflowException as exc:
        raise ModelError(_explain_uri(model_uri, exc)) from exc


def _require_files(version: Any) -> None:
    removed = version.tags.get(FILES_REMOVED)
    if removed:
        raise ModelError(
            f"A version's model files must still be there. Received: version {version.version} of {version.name}, "
            f"whose files were removed {removed}; figures and report are kept. Choose another version "
            f"(`deepfake versions`), or train it again with `force`: run {version.run_id} says from what."
        )


def _explain_uri(model_uri: str, failure: Exception) -> str:
    return (
        f"A model must be a version in the registry, such as models:/{DEFAULT_MODEL}@{PRODUCTION}. "
        f"Received: {model_uri}, at {mlflow.get_tracking_uri()}: {str(failure).splitlines()[0]} See "
        "`deepfake versions`; `make demo` or `python -m flows.retrain` makes one."
    )


def list_versions(model_name: str) -> list[ModelVersion]:
    """Return every version, newest first."""
    client = connect()
    found = client.search_model_versions(f"name = '{model_name}'")
    return [
        read_version(model_name, str(version.version))
        for version in sorted(found, key=lambda version: int(version.version), reverse=True)
    ]


def read_version(model_name: str, version: str) -> ModelVersion:
    """Return one version with its run's figures.

    Raises:
        ModelError: if there is none of this number.
    """
    client = mlflow.MlflowClient()
    try:
        found = client.get_model_version(model_name, version)
    except MlflowException as exc:
        raise ModelError(
            f"A version must be a number that the registry knows. Received: {version!r} of {model_name}, at "
            f"{mlflow.get_tracking_uri()}. `deepfake versions` lists them."
        ) from exc
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


def has_versions(model_name: str) -> bool:
    return bool(mlflow.MlflowClient().search_model_versions(f"name = '{model_name}'", max_results=1))


def find_needed_datasets(model_name: str) -> set[str]:
    """Return the data sets that versions with an alias, of any name, were trained on, and those that runs are at.

    Raises:
        ModelError: if a version of `model_name` that is needed doesn't say what it was trained on.
    """
    client = mlflow.MlflowClient()
    running = [run for run in _search_runs("attributes.status = 'RUNNING'") if _is_in_progress(run)]
    needed = {run.data.tags["dataset_version"] for run in running if "dataset_version" in run.data.tags}
    for model in _list_all(client.search_registered_models):
        for version in _find_needed_versions(model):
            dataset = client.get_model_version(model.name, version).tags.get("dataset_version")
            if dataset:
                needed.add(dataset)
            elif model.name == model_name:
                raise ModelError(
                    "A version that is needed must say what it was trained on, so that its data set is kept. Received: "
                    f"version {version} of {model_name} without the tag dataset_version. Set that tag in MLflow."
                )
    return needed


def find_unneeded_files(model_name: str, keep: int) -> list[ModelFiles]:
    """Return the model files that neither production, a rollback nor a run in progress needs, oldest first.

    These are the files of versions that have no alias and are not among the newest, and the checkpoints of candidates
    that did not win. A run that serves a version of another name as well is left as it is.

    Args:
        keep: number of newest versions whose files stay.
    """
    client = mlflow.MlflowClient()
    versions = _list_all(client.search_model_versions)
    mine = sorted((version for version in versions if version.name == model_name), key=lambda one: int(one.version))
    kept = {str(one.version) for one in mine[-keep:]} | _find_needed_versions(client.get_registered_model(model_name))
    needed = {version.run_id for version in versions if version.name != model_name or str(version.version) in kept}
    runs = {run.info.run_id: run for run in _search_runs()}
    found = []
    for run_id, run in sorted(runs.items(), key=lambda item: item[1].info.start_time):
        parent = runs.get(run.data.tags.get("mlflow.parentRunId", ""))
        served = [str(version.version) for version in mine if version.run_id == run_id]
        if run_id in needed or FILES_REMOVED in run.data.tags or not (served or parent):
            continue
        if _is_in_progress(run) or (parent and _is_in_progress(parent)):
            continue
        stores = sorted({client.get_model_version_download_uri(model_name, version) for version in served})
        folders = [(run.info.artifact_uri, CHECKPOINT_FOLDER), *((uri, f"artifacts/{DETECTOR}") for uri in stores)]
        size = 0
        for uri, path in folders:
            with _open_artifacts(uri) as store:
                size += _measure_artifacts(store, path)
        if size:
            found.append(ModelFiles(run_id, run.info.run_name, tuple(served), tuple(folders), size))
    return found


def remove_model_files(model_name: str, files: ModelFiles) -> bool:
    """Remove a run's model files; parameters, figures, reports and tags stay.

    Versions are tagged before their files go, while no alias can move: wherever this is killed, no version without
    files looks as if it had some, and the next call removes the rest.

    Returns:
        False, with nothing removed, if a version has got an alias meanwhile.
    """
    client = mlflow.MlflowClient()
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    if files.versions:
        with _hold_aliases(client, model_name):
            if _find_needed_versions(client.get_registered_model(model_name)) & set(files.versions):
                return False
            for version in files.versions:
                tag_version(model_name, version, {FILES_REMOVED: now})
    for uri, path in files.folders:
        with _open_artifacts(uri) as store:
            store.delete_artifacts(path)
    client.set_tag(files.run_id, FILES_REMOVED, now)
    return True


def _find_needed_versions(model: Any) -> set[str]:
    """Return the versions that have an alias, and the one that a rollback leads to."""
    previous = find_previous(model.name)
    return {str(version) for version in model.aliases.values()} | ({previous} if previous else set())


def _search_runs(filter_string: str = "") -> list[Any]:
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    ids = [experiment.experiment_id] if experiment else []
    return _list_all(client.search_runs, experiment_ids=ids, filter_string=filter_string)


def _list_all(search: Callable[..., PagedList], **arguments: Any) -> list[Any]:
    page = search(**arguments)
    found = list(page)
    while page.token:
        page = search(**arguments, page_token=page.token)
        found += page
    return found


def _is_in_progress(run: Any) -> bool:
    age = time.time() - run.info.start_time / 1000
    return run.info.status == "RUNNING" and age < IN_PROGRESS_DAYS * 24 * 3600


@contextmanager
def _open_artifacts(uri: str) -> Iterator[ArtifactRepository]:
    try:
        yield get_artifact_repository(uri)
    except (MlflowException, OSError) as exc:
        raise ServiceError(
            f"Model files must be within reach, and may be removed. Received: {uri}, from {mlflow.get_tracking_uri()} "
            f"({str(exc).splitlines()[0]}). Set MLFLOW_TRACKING_URI as on the machine that trains, or allow removing."
        ) from exc


def _measure_artifacts(store: ArtifactRepository, path: str) -> int:
    found = store.list_artifacts(path)
    return sum(_measure_artifacts(store, file.path) if file.is_dir else file.file_size or 0 for file in found)
