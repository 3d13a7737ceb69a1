"""Whether a training has been done, or begun, before: the same data, parameters and code."""

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

UNCOMMITTED = "-uncommitted"
"""How the fingerprint of a training by code that is not committed ends: the next one's code may differ."""


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
    """Return a hash of what a training follows from: data, parameters and commit; it says if code is uncommitted."""
    commit = read_git_commit()
    parameters = {
        "training": training.model_dump(mode="json"),
        "evaluation": evaluation.model_dump(mode="json"),
        "promotion": promotion.model_dump(mode="json"),
    }
    same = json.dumps([dataset_version, commit, parameters], sort_keys=True)
    uncommitted = commit == UNKNOWN_COMMIT or commit.endswith("-dirty")
    return hashlib.sha256(same.encode()).hexdigest()[:16] + (UNCOMMITTED if uncommitted else "")


def find_same_training(model_name: str, fingerprint: str) -> ModelVersion | None:
    """Return the version of a training that was done before and finished: decided and reported. None if there is none.

    Nothing is the same as a training by code that was not committed.
    """
    newest = find_newest(model_name, fingerprint)
    return newest if newest and newest.is_finished and not fingerprint.endswith(UNCOMMITTED) else None


def find_newest(model_name: str, fingerprint: str) -> ModelVersion | None:
    """Return the newest version that a training with this fingerprint registered, or None."""
    found = mlflow.MlflowClient().search_model_versions(
        f"name = '{model_name}' and tags.{names.FINGERPRINT} = '{fingerprint}'"
    )
    newest = max((int(version.version) for version in found), default=None)
    return None if newest is None else read_version(model_name, str(newest))
