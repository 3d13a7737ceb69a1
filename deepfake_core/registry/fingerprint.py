"""Whether a training has been done before: the same data, parameters and committed code."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import mlflow

from deepfake_core.config import EvaluationParameters, PromotionParameters, TrainingParameters
from deepfake_core.registry import names
from deepfake_core.registry.versions import ModelVersion, read_version

UNKNOWN_COMMIT = "unknown"


def read_git_commit() -> str:
    """Return the checkout's commit, with `-dirty` if files differ from it; outside one GIT_COMMIT, else `unknown`.

    An image has no checkout: building it sets GIT_COMMIT.
    """
    checkout = str(Path(__file__).parent)
    command = ["git", "-C", checkout, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("GIT_COMMIT") or UNKNOWN_COMMIT


def fingerprint_training(
    dataset_version: str,
    training: TrainingParameters,
    evaluation: EvaluationParameters,
    promotion: PromotionParameters,
) -> str:
    """Return a hash of what a training follows from: data, parameters and code; empty if the code is uncommitted."""
    commit = read_git_commit()
    if commit == UNKNOWN_COMMIT or commit.endswith("-dirty"):
        return ""
    parameters = {
        "training": training.model_dump(mode="json"),
        "evaluation": evaluation.model_dump(mode="json"),
        "promotion": promotion.model_dump(mode="json"),
    }
    same = json.dumps([dataset_version, commit, parameters], sort_keys=True)
    return hashlib.sha256(same.encode()).hexdigest()[:16]


def find_same_training(model_name: str, fingerprint: str) -> ModelVersion | None:
    """Return the newest version that a training with this fingerprint registered, or None."""
    if not fingerprint:
        return None
    found = mlflow.MlflowClient().search_model_versions(
        f"name = '{model_name}' and tags.{names.FINGERPRINT} = '{fingerprint}'"
    )
    newest = max((int(version.version) for version in found), default=None)
    return None if newest is None else read_version(model_name, str(newest))
