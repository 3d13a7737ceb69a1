"""The model files that MLflow stores, and which of them neither production, a rollback nor a run needs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from deepfake_core.errors import ModelError, ServiceError
from deepfake_core.registry import names
from deepfake_core.registry.connection import list_all
from deepfake_core.registry.production import find_previous, hold_aliases
from deepfake_core.registry.runs import search_runs
from deepfake_core.registry.versions import tag_version

MAX_RUN_DAYS = 14
"""How long a run may take; one that has been running for longer was killed."""


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


def find_needed_datasets(model_name: str) -> set[str]:
    """Return the data sets that versions with an alias, of any name, were trained on, and those that runs use.

    Raises:
        ModelError: if a version of `model_name` that is needed doesn't say what it was trained on.
    """
    client = mlflow.MlflowClient()
    running = [run for run in search_runs("attributes.status = 'RUNNING'") if _is_in_progress(run)]
    needed = {run.data.tags[names.DATASET_VERSION] for run in running if names.DATASET_VERSION in run.data.tags}
    for model in list_all(client.search_registered_models):
        for version in _find_needed_versions(model):
            dataset = client.get_model_version(model.name, version).tags.get(names.DATASET_VERSION)
            if dataset:
                needed.add(dataset)
            elif model.name == model_name:
                raise ModelError(
                    "A version that is needed must say what it was trained on, so that its data set is kept. Received: "
                    f"version {version} of {model_name} without the tag {names.DATASET_VERSION}. Set it in MLflow."
                )
    return needed


def find_unneeded_files(model_name: str, keep: int) -> list[ModelFiles]:
    """Return the model files that neither production, a rollback nor a run in progress needs, oldest first.

    These are the files of versions that have no alias, wait for no approval and are not among the newest, and the
    checkpoints of candidates that did not win. A run that serves a version of another name as well is left as it is.

    Args:
        keep: number of newest versions whose files stay.
    """
    client = mlflow.MlflowClient()
    versions = list_all(client.search_model_versions)
    mine = sorted((version for version in versions if version.name == model_name), key=lambda one: int(one.version))
    waiting = {str(one.version) for one in mine if one.tags.get(names.DECISION) == names.WAITS}
    kept = (
        {str(one.version) for one in mine[-keep:]}
        | waiting
        | _find_needed_versions(client.get_registered_model(model_name))
    )
    needed = {version.run_id for version in versions if version.name != model_name or str(version.version) in kept}
    runs = {run.info.run_id: run for run in search_runs()}
    found = []
    for run_id, run in sorted(runs.items(), key=lambda item: item[1].info.start_time):
        parent = runs.get(run.data.tags.get(names.PARENT, ""))
        served = [str(version.version) for version in mine if version.run_id == run_id]
        if run_id in needed or names.FILES_REMOVED in run.data.tags or not (served or parent):
            continue
        if _is_in_progress(run) or (parent and _is_in_progress(parent)):
            continue
        stores = sorted({client.get_model_version_download_uri(model_name, version) for version in served})
        folders = [
            (run.info.artifact_uri, names.CHECKPOINT_FOLDER),
            *((uri, f"artifacts/{names.DETECTOR}") for uri in stores),
        ]
        size = 0
        for uri, path in folders:
            with open_artifacts(uri) as store:
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
        with hold_aliases(client, model_name):
            if _find_needed_versions(client.get_registered_model(model_name)) & set(files.versions):
                return False
            for version in files.versions:
                tag_version(model_name, version, {names.FILES_REMOVED: now})
    for uri, path in files.folders:
        with open_artifacts(uri) as store:
            store.delete_artifacts(path)
    client.set_tag(files.run_id, names.FILES_REMOVED, now)
    return True


def _find_needed_versions(model: Any) -> set[str]:
    """Return the versions that have an alias, and the one that a rollback leads to."""
    previous = find_previous(model.name)
    return {str(version) for version in model.aliases.values()} | ({previous} if previous else set())


def _is_in_progress(run: Any) -> bool:
    age = time.time() - run.info.start_time / 1000
    return run.info.status == "RUNNING" and age < MAX_RUN_DAYS * 24 * 3600


@contextmanager
def open_artifacts(uri: str) -> Iterator[ArtifactRepository]:
    """Open an artifact store.

    Raises:
        ServiceError: if it can't be reached, or refuses what the body does.
    """
    try:
        yield get_artifact_repository(uri)
    except (MlflowException, OSError) as exc:
        raise ServiceError(
            f"MLflow's artifact store must be reachable, and its files must be removable. Received: {uri}, from "
            f"{mlflow.get_tracking_uri()} ({str(exc).splitlines()[0]}). Set MLFLOW_TRACKING_URI as on the machine that "
            "trains, or let this user delete there."
        ) from exc


def _measure_artifacts(store: ArtifactRepository, path: str) -> int:
    found = store.list_artifacts(path)
    return sum(_measure_artifacts(store, file.path) if file.is_dir else file.file_size or 0 for file in found)
