"""Probe images: a few validation images with their scores, which the served model must give again."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException

from deepfake_core.errors import ModelError
from deepfake_core.registry import names
from deepfake_core.registry.connection import set_environment
from deepfake_core.registry.production import find_production
from deepfake_core.registry.versions import ModelVersion, read_version

MAX_PROBE_DIFFERENCE = 0.001
"""In P(fake)."""


def log_probe(run_id: str, images: Sequence[bytes], scores: Sequence[float]) -> None:
    """Log encoded images and their scores, which the served model must give again (`check_probe`)."""
    with tempfile.TemporaryDirectory() as folder:
        for position, data in enumerate(images):
            (Path(folder) / f"{position:02}.image").write_bytes(data)
        (Path(folder) / "scores.json").write_text(json.dumps([float(score) for score in scores]))
        mlflow.MlflowClient().log_artifacts(run_id, folder, names.PROBE)


@dataclass(frozen=True)
class ProbeResult:
    """A version's probe images, scored again.

    Attributes:
        differences: of each P(fake) from the one that was recorded.
    """

    version: ModelVersion
    differences: list[float]

    @property
    def agrees(self) -> bool:
        return max(self.differences) <= MAX_PROBE_DIFFERENCE

    @property
    def text(self) -> str:
        return (
            f"Version {self.version.version} of {self.version.name}: the scores of {len(self.differences)} probe "
            f"images differ by {max(self.differences):.2g} at most from those recorded with it "
            f"(allowed: {MAX_PROBE_DIFFERENCE:g})"
        )

    def require_agreement(self) -> None:
        """Raise a ModelError if a score differs too much."""
        if not self.agrees:
            raise ModelError(
                f"{self.text}. What serves it has changed: compare its packages with the version's requirements.txt, "
                "then roll back or retrain."
            )


def check_production(model_name: str) -> ProbeResult:
    """Check the probe of the version in production.

    Raises:
        ModelError: if there is none, or it has no probe images.
    """
    current = find_production(model_name)
    if current is None:
        raise ModelError(f"There must be a production model to check. Received: none of the name {model_name}.")
    return check_probe(read_version(model_name, current))


def check_probe(version: ModelVersion) -> ProbeResult:
    """Load a version as its users do, and score its probe images.

    Raises:
        ModelError: if it has no probe images.
    """
    import pandas as pd

    with tempfile.TemporaryDirectory() as folder, set_environment(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"):
        try:
            probe = Path(mlflow.MlflowClient().download_artifacts(version.run_id, names.PROBE, folder))
        except (MlflowException, OSError) as exc:
            raise ModelError(
                f"A version needs probe images in its run to be checked. Received: version {version.version} of "
                f"{version.name}, run {version.run_id}, which has none. Retrain, or promote a newer version."
            ) from exc
        recorded = json.loads((probe / "scores.json").read_text())
        images = [file.read_bytes() for file in sorted(probe.glob("*.image"))]
        model = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
    scores = model.predict(pd.DataFrame({"image": images}))["fake_probability"]
    return ProbeResult(version, [abs(float(score) - before) for score, before in zip(scores, recorded, strict=True)])
