"""The model that a command is to use, and the commands that provide it: `pull`, `serve`."""

import argparse
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from deepfake_core.config import PRODUCTION_URI
from deepfake_core.detector import DESCRIPTION, Detector
from deepfake_core.errors import ConfigurationError, ModelError
from deepfake_core.feedback.reports import open_feedback
from deepfake_core.serving.predictor import load_detector

if TYPE_CHECKING:
    from deepfake_core.monitoring.observer import Observer

OBSERVE_HELP = (
    "append to Parquet files in this folder, or at this URL, what was said and measured of each face: no pixels, no "
    "names. `watch` compares it with the test split"
)
MODEL_HELP = (
    f"folder of a pulled model, or a registry URI such as models:/deepfake-detector/3 (default: {PRODUCTION_URI})"
)


def load_model(model: str) -> Detector:
    """Load a pulled model's folder, or a version from the registry.

    Raises:
        ModelError: if there is no such model.
        ServiceError: if MLflow can't be reached.
    """
    check_model(model)
    if not model.startswith("models:/"):
        return load_detector(model)
    from deepfake_core.registry.detectors import pull_detector

    with tempfile.TemporaryDirectory() as folder:
        return load_detector(pull_detector(model, Path(folder)))


def load_named_model(model: str) -> tuple[Detector, str]:
    """Load a model as `load_model` does; return it with its name, such as `deepfake-detector version 3`.

    Of a folder, the last part of its path is the name.
    """
    check_model(model)
    found, version = resolve_version(model)
    return load_model(found), version.replace("/", " version ") or Path(model).resolve().name


def check_model(model: str) -> None:
    """Refuse what is neither a registry URI nor the folder of a pulled model."""
    if not model.startswith("models:/") and not (Path(model) / DESCRIPTION).is_file():
        raise ModelError(f"--model must be a folder written by `deepfake pull`, or a registry URI. Received: {model!r}")


def resolve_version(model: str) -> tuple[str, str]:
    """Return the URI of the version that a registry URI means now, and its name for observations: name/number.

    A pulled model's folder stays what it is, and has no name: what serves it is not known.
    """
    if not model.startswith("models:/"):
        return model, ""
    from deepfake_core.registry import connection, detectors

    connection.connect()
    name, version = detectors.resolve(model)
    return f"models:/{name}/{version}", f"{name}/{version}"


def observe(address: str, shadow: bool = False) -> "AbstractContextManager[Observer | None]":
    """Return what observes verdicts, as `observer.open_observer`; nothing for an empty address.

    Raises:
        ModelError: if what it needs is not installed.
    """
    if not address and not shadow:
        return nullcontext()
    try:
        from deepfake_core.monitoring.observer import open_observer
    except ImportError as exc:
        raise ModelError(
            f"--observe needs a package that is not installed ({exc}). Install deepfake-retraining[observe]."
        ) from exc
    return open_observer(address, shadow)


def pull(options: argparse.Namespace) -> int:
    from deepfake_core.registry.detectors import pull_detector

    if options.folder.exists() and (not options.folder.is_dir() or any(options.folder.iterdir())):
        raise ConfigurationError(f"DIR must be an empty or new folder. Received: {options.folder}, which holds files.")
    pull_detector(options.model, options.folder)
    print(f"{options.model} is in {options.folder}. Try: deepfake predict FACE.jpg --model {options.folder}")
    return 0


def serve(options: argparse.Namespace) -> int:
    from deepfake_core.serving import page

    check_model(options.model)
    if options.shadow and not options.model.startswith("models:/"):
        raise ConfigurationError(f"--shadow needs a --model from the registry. Received: {options.model}.")
    feedback = open_feedback(options.feedback) if options.feedback else None
    if feedback:
        feedback.create()  # so that a folder that can't be written is said now
    with observe(options.observe, options.shadow) as observer:
        page.serve(options.model, not options.no_detect, options.port, feedback, observer, options.shadow)
    return 0
