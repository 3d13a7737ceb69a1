"""Versions of the registry, loaded to serve: the one in use, and the challenger beside it."""

import logging
import tempfile
import time
from pathlib import Path

from deepfake_core.detector import Detector
from deepfake_core.registry.aliases import find_challenger
from deepfake_core.registry.detectors import pull_detector
from deepfake_core.serving.predictor import load_detector
from deepfake_core.serving.shadow import Shadow

log = logging.getLogger(__name__)


def load_version(name: str, version: str) -> Detector:
    """Load a version from the registry.

    Raises:
        ModelError: if it is not there, or can't be loaded.
        ServiceError: if MLflow can't be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        return load_detector(pull_detector(f"models:/{name}/{version}", Path(folder)))


def find_shadow(name: str, current: Shadow | None = None) -> Shadow | None:
    """Return the version with the alias `challenger`; None if there is none. What fails here stops no verdict.

    Args:
        current: returned again if it has the alias still; one that could not be loaded, for a minute.
    """
    try:
        version = find_challenger(name)
    except Exception:
        log.exception("the alias challenger can't be looked up: verdicts go on")
        return current
    if version is None or (
        current and current.version == f"{name}/{version}" and time.monotonic() < current.loads_again
    ):
        return current if version else None
    try:
        shadow = Shadow(f"{name}/{version}", load_version(name, version))
        log.info("%s runs beside the version in use, and is only observed", shadow.version)
    except Exception:
        log.exception("version %s of %s can't run beside the one in use: verdicts go on", version, name)
        shadow = Shadow(f"{name}/{version}", None)
    return shadow
