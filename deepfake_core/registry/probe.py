"""Probe images: a few validation images with their scores, which the served model must give again, as must labels."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException

from deepfake_core.config import CLASS_NAMES, FEEDBACK
from deepfake_core.detector import call_fake
from deepfake_core.errors import ModelError
from deepfake_core.registry import names
from deepfake_core.registry.aliases import read_production
from deepfake_core.registry.connection import set_environment
from deepfake_core.registry.detectors import download_version
from deepfake_core.registry.seals import require_seal
from deepfake_core.registry.versions import ModelVersion

PROBE_IMAGES = 16
MAX_PROBE_DIFFERENCE = 0.001
"""In P(fake)."""


def choose_probe(rows: pd.DataFrame) -> np.ndarray:
    """Choose images that may stay in MLflow for good: no confirmed reports, unless there is nothing else.

    Args:
        rows: of the validation split, with `source`.

    Returns:
        The positions of 16 images, or of all if there are fewer.
    """
    lasting = np.flatnonzero(rows["source"] != FEEDBACK)
    found = lasting if len(lasting) else np.arange(len(rows))
    return found[np.linspace(0, len(found) - 1, min(PROBE_IMAGES, len(found))).astype(int)]


def log_probe(run_id: str, images: Sequence[bytes], scores: Sequence[float]) -> None:
    """Log encoded images and their scores, which the served model must give again (`check_probe`)."""
    with tempfile.TemporaryDirectory() as folder:
        for position, data in enumerate(images):
            (Path(folder) / f"{position:02}.image").write_bytes(data)
        (Path(folder) / "scores.json").write_text(json.dumps([float(score) for score in scores]))
        mlflow.MlflowClient().log_artifacts(run_id, folder, names.PROBE)


@dataclass(frozen=True)
class ProbeResult:
    """A version's probe images, judged again.

    Attributes:
        differences: of each P(fake) from the one that was recorded; NaN where the model gave none.
        threshold: the one that was recorded.
        other_labels: number of images whose label is not what the recorded threshold makes of their P(fake).
        other_thresholds: the model's thresholds that are not the recorded one.
    """

    version: ModelVersion
    differences: list[float]
    threshold: float
    other_labels: int
    other_thresholds: list[float]

    @property
    def agrees(self) -> bool:
        close = all(difference <= MAX_PROBE_DIFFERENCE for difference in self.differences)
        return close and not self.other_labels and not self.other_thresholds

    @property
    def text(self) -> str:
        found = ", ".join(map(str, self.other_thresholds)) or "the same"
        return (
            f"Version {self.version.version} of {self.version.name}: the scores of {len(self.differences)} probe "
            f"images differ by {max(self.differences):.2g} at most from those recorded with it "
            f"(allowed: {MAX_PROBE_DIFFERENCE:g}); {self.other_labels} have another label; the threshold recorded is "
            f"{self.threshold}, the model's is {found}"
        )

    def require_agreement(self) -> None:
        """Raise a ModelError if a score differs too much, or a label or the threshold at all."""
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
    return check_probe(read_production(model_name))


def check_probe(version: ModelVersion) -> ProbeResult:
    """Load a version as its users do, once its seal is checked, and judge its probe images.

    Raises:
        ModelError: if it has no probe images, is not sealed, or a file is not the one that was registered.
    """
    client = mlflow.MlflowClient()
    with tempfile.TemporaryDirectory() as folder, set_environment(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"):
        try:
            threshold = float(client.get_run(version.run_id).data.params[names.THRESHOLD])
            probe = Path(client.download_artifacts(version.run_id, names.PROBE, folder))
        except (KeyError, MlflowException, OSError) as exc:
            raise ModelError(
                "A version needs probe images and its threshold in its run to be checked. Received: version "
                f"{version.version} of {version.name}, run {version.run_id}, which lacks them. Retrain, or promote a "
                "newer version."
            ) from exc
        recorded = json.loads((probe / "scores.json").read_text())
        images = [file.read_bytes() for file in sorted(probe.glob("*.image"))]
        require_seal(version)
        stored = download_version(f"models:/{version.name}/{version.version}", Path(folder) / "version")
        model = mlflow.pyfunc.load_model(str(stored))
    answers = model.predict(pd.DataFrame({"image": images}))
    scores = answers["fake_probability"].astype(float)
    labels = [CLASS_NAMES[fake] for fake in call_fake(scores, threshold).astype(int)]
    return ProbeResult(
        version,
        [abs(score - before) for score, before in zip(scores, recorded, strict=True)],
        threshold,
        sum(label != found for label, found in zip(labels, answers["label"], strict=True)),
        sorted(set(answers["threshold"]) - {threshold}),
    )
