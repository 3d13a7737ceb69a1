"""Versions of the registry, loaded to serve: the one in use, and the challenger beside it."""

import logging
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from deepfake_core.detector import DESCRIPTION, Detector
from deepfake_core.errors import ModelError
from deepfake_core.registry.aliases import find_challenger
from deepfake_core.registry.detectors import pull_detector
from deepfake_core.serving.predictor import Predictor, load_detector
from deepfake_core.serving.shadow import Shadow
from deepfake_core.storage.files import hash_file, remove_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judge:
    """Versions whose files were pulled, for processes that load them without the registry.

    Attributes:
        model: the folder of the version's files.
        version: its name, as name/number.
        digest: a hash of its files.
        detect: whether faces are looked for.
        shadow: the version that judges too, as name/number; empty if there is none.
        shadow_model: the folder of its files.
        observed: whether verdicts are observed.
    """

    model: Path
    version: str = ""
    digest: str = ""
    detect: bool = True
    shadow: str = ""
    shadow_model: Path | None = None
    observed: bool = False

    def load(self, threads: int = 0) -> Predictor:
        """Load the versions to score in so many threads; 0 for a thread per core."""
        detector, beside = load_detector(self.model, threads), None
        if self.shadow_model:
            try:
                beside = Shadow(self.shadow, load_detector(self.shadow_model, threads))
            except ModelError:
                log.exception("%s can't run beside the version in use: verdicts go on", self.shadow)
        return Predictor(detector, self.detect, self.version, beside)


def pull_judge(folder: Path, name: str, version: str, detect: bool, *, shadow: bool, observed: bool) -> Judge:
    """Pull a version's files into a folder, and those of the challenger if it is to judge too.

    Raises:
        ModelError: if the version is not there.
        ServiceError: if MLflow can't be reached.
    """
    model, shadow_model = folder / "model", folder / "shadow"
    for each in (model, shadow_model):
        remove_folder(each)
    pull_detector(f"models:/{name}/{version}", model)
    digest = " ".join(hash_file(model / file) for file in ("model.onnx", DESCRIPTION))
    judge = Judge(model, f"{name}/{version}", digest, detect, observed=observed)
    if not shadow:
        return judge
    try:
        challenger = find_challenger(name)
        if challenger is not None:
            pull_detector(f"models:/{name}/{challenger}", shadow_model)
            return replace(judge, shadow=f"{name}/{challenger}", shadow_model=shadow_model)
    except Exception:
        log.exception("no version of %s can run beside the one in use: verdicts go on", name)
    return judge


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
