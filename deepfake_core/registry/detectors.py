"""Detectors into the registry, and out of it."""

import logging
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.models_artifact_repo import REGISTERED_MODEL_META_FILE_NAME
from mlflow.utils.logging_utils import disable_logging, enable_logging

import deepfake_core.detector
from deepfake_core.config import PRODUCTION_URI
from deepfake_core.errors import ModelError
from deepfake_core.registry import names
from deepfake_core.registry.connection import connect, set_environment
from deepfake_core.registry.seals import check_seal, hash_files, write_seal
from deepfake_core.registry.versions import require_files

log = logging.getLogger(__name__)

OWN_CODE = ("decoding", "description", "image_header", "input_gate")
"""The model's own code besides `detector`, side by side."""


def register_detector(run_id: str, folder: Path, model_name: str, example: bytes, tags: Mapping[str, str]) -> str:
    """Log a detector's folder as a pyfunc model of the run and register it, sealed; return the version.

    Args:
        folder: holds `model.onnx`, `detector.json` and `checkpoint.keras`.
        example: one encoded image.
    """
    import pandas as pd  # neither it nor what signatures need is part of the base install
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    optional = {
        "label": "string",
        "fake_probability": "double",
        "sure": "boolean",
        "reason": "string",
        "error": "string",
    }
    signature = ModelSignature(
        inputs=Schema([ColSpec("string", "image")]),  # base64, or bytes, which MLflow lets through
        outputs=Schema(
            [
                *(ColSpec(kind, name, required=False) for name, kind in optional.items()),
                ColSpec("double", "threshold"),
            ]
        ),
        params=ParamSchema([ParamSpec("threshold", "double", None)]),
    )
    code = Path(deepfake_core.detector.__file__)  # the model's own code is side by side
    with tempfile.TemporaryDirectory() as temporary:
        detector = Path(temporary) / names.DETECTOR
        shutil.copytree(folder, detector, ignore=shutil.ignore_patterns("__pycache__"))
        ours = {f"artifacts/{names.DETECTOR}/{name}": digest for name, digest in hash_files(detector).items()}
        with set_environment(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"), mlflow.start_run(run_id=run_id):
            model = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(code.with_name("pyfunc_model.py")),
                code_paths=[str(code), *(str(code.with_name(f"{name}.py")) for name in OWN_CODE)],
                artifacts={names.DETECTOR: str(detector)},
                signature=signature,
                input_example=pd.DataFrame({"image": [example]}),
                pip_requirements=[
                    f"{package}=={installed_version(package)}"
                    for package in ("mlflow", "numpy", "onnxruntime", "pandas", "pillow")
                ],
            )
            location = mlflow.MlflowClient().get_logged_model(model.model_id).artifact_location
            stored = mlflow.artifacts.download_artifacts(artifact_uri=location, dst_path=f"{temporary}/stored")
        remove_bytecode(Path(stored))
        digests = hash_files(Path(stored)) | ours  # what was damaged on its way is refused later
    disable_logging()  # MLflow prints what it registered, whatever the level of its logger
    try:
        registered = mlflow.register_model(model.model_uri, model_name, tags=dict(tags) | write_seal(digests))
    finally:
        enable_logging()
    log.info("%s: version %s is registered", model_name, registered.version)
    return str(registered.version)


def pull_detector(model_uri: str, folder: Path) -> Path:
    """Copy a version's detector (`model.onnx`, `detector.json`, `checkpoint.keras`) into a folder.

    Args:
        model_uri: such as `models:/deepfake-detector@production` or `models:/deepfake-detector/3`.

    Raises:
        ModelError: as `download_version`.
    """
    connect()
    with tempfile.TemporaryDirectory() as temporary:
        copied = download_version(model_uri, Path(temporary))
        shutil.copytree(copied / "artifacts" / names.DETECTOR, folder, dirs_exist_ok=True)
    return folder


def download_version(model_uri: str, folder: Path) -> Path:
    """Copy all files of a version below a folder and check their seal; return where they are.

    Nothing else in this project reads a version's files, so none is used unchecked.

    Raises:
        ModelError: if MLflow has no such version, its model files were removed, or a file is not the registered one.
    """
    version = _look_up(model_uri)
    require_files(version)
    try:
        stored = mlflow.MlflowClient().get_model_version_download_uri(version.name, version.version)
        copied = Path(mlflow.artifacts.download_artifacts(artifact_uri=stored, dst_path=str(folder)))
        # MLflow and Python write these into a store on the same machine whenever a version is loaded from there.
        (copied / REGISTERED_MODEL_META_FILE_NAME).unlink(missing_ok=True)
        remove_bytecode(copied)
    except (MlflowException, OSError) as exc:
        raise ModelError(_explain_uri(model_uri, exc)) from exc
    check_seal(version, copied)
    return copied


def remove_bytecode(folder: Path) -> None:
    """Remove what Python compiled beside a version's code: it is no part of the version, and must not run unchecked."""
    for cache in sorted(folder.rglob("__pycache__/")):
        shutil.rmtree(cache)


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


def _explain_uri(model_uri: str, failure: Exception) -> str:
    return (
        f"A model must be a version in the registry, such as {PRODUCTION_URI}. "
        f"Received: {model_uri}, at {mlflow.get_tracking_uri()}: {str(failure).splitlines()[0]} See "
        "`deepfake versions`; `make demo` or `python -m flows.retrain` makes one."
    )
