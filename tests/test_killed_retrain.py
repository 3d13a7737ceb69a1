"""A retrain's process is killed at one point after the other; each time, the next one goes on from there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml
from prefect.settings import PREFECT_API_URL

from deepfake_core.config import DataParameters, PromotionParameters, Source, TrainingParameters
from deepfake_core.registry import names, production
from deepfake_core.registry.connection import connect
from deepfake_core.registry.runs import search_runs
from deepfake_core.registry.versions import list_versions, read_version
from tests.builders import NAME, ROOT, faces, write_zip

pytestmark = [pytest.mark.usefixtures("prefect_api"), pytest.mark.process, pytest.mark.slow]

RETRAIN = """
import os, signal, sys
from importlib import import_module
from deepfake_core.registry import fingerprint
fingerprint.read_git_commit = lambda: "c" * 40  # as on a worker
for target in filter(None, sys.argv.pop(1).split(",")):
    module, _, name = target.rpartition(".")
    setattr(import_module(module), name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
from flows.retrain import main
sys.exit(main())
"""
"""Kills itself when one of the functions that its first argument names is called."""

NEVER_AGAIN = "deepfake_core.training.fit._fit,deepfake_core.registry.challenge.register_detector"


def run(folder: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    command = [sys.executable, "-c", RETRAIN, ",".join(targets), "--config", folder / "retrain.yaml"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def folder(tracking):
    data = DataParameters(
        sources=(Source(name=str(write_zip(tracking / "a.zip", faces(40)))),), data_dir=str(tracking / "data")
    )
    training = TrainingParameters(candidates=("cnn", "hpf_cnn"), image_size=32, epochs=1)
    values = {"data": data, "training": training, "promotion": PromotionParameters(min_precision=0, min_recall=0)}
    text = yaml.safe_dump({name: one.model_dump(mode="json") for name, one in values.items()})
    (tracking / "retrain.yaml").write_text(text)
    connect().create_experiment(names.EXPERIMENT)  # whose artifacts are below the current folder
    return tracking


def list_trainings(folder: Path) -> int:
    return len(list((folder / "data" / "training").glob("[0-9a-f]*")))


def test_a_retrain_that_is_killed_after_its_version_was_registered_is_finished_by_the_next(folder):
    def kill(target: str, *forbidden: str) -> None:
        ended = run(folder, target, *forbidden)
        assert ended.returncode == -signal.SIGKILL, ended.stderr[-3000:]

    kill("deepfake_core.registry.challenge.promote_challenger")
    (version,) = list_versions(NAME)
    assert (version.decision, list_trainings(folder)) == ("", 2)
    assert len(search_runs("attributes.status = 'RUNNING'")) == 1
    for target, decision in (
        ("deepfake_core.registry.challenge.move_production", ""),
        ("deepfake_core.registry.challenge._record_decision", ""),
        ("deepfake_core.registry.versions.describe_version", names.PROMOTED),
        ("tasks.model.remove_folder", names.PROMOTED),
    ):
        kill(target, NEVER_AGAIN)
        (version,) = list_versions(NAME)
        assert (version.decision, list_trainings(folder)) == (decision, 2)
        assert production.find_production(NAME) == (None if target.endswith("move_production") else "1")
    assert version.is_finished
    assert list_trainings(folder) == 2

    ended = run(folder, NEVER_AGAIN, "deepfake_core.registry.challenge.promote_challenger")
    assert ended.returncode == 0, ended.stderr
    assert "Nothing changed since version 1 (promoted)" in ended.stderr + ended.stdout
    check_finished(folder)


def check_finished(folder: Path) -> None:
    """Assert that there is one version, in production, with all that belongs to it, and no leftovers."""
    (version,) = list_versions(NAME)
    assert version.aliases == ("production",)
    assert version.is_finished
    client = mlflow.MlflowClient()
    assert "report.html" in {file.path for file in client.list_artifacts(version.run_id)}
    assert list_trainings(folder) == 0
    assert search_runs("attributes.status = 'RUNNING'") == []
    retrains = [one for one in search_runs() if names.PARENT not in one.data.tags]
    assert len(retrains) == 1
    assert read_version(NAME, "1").tags["production_because"] == "; ".join(version.reasons)
    page = Path(client.download_artifacts(version.run_id, "report.html")).read_text()
    assert all(name in page for name in ("Training of cnn", "Training of hpf_cnn"))
