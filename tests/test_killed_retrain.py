"""A retrain's process is killed at one point after the other; each time, the next one goes on from there."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml
from prefect.settings import PREFECT_API_URL

from deepfake_core.config import DataParameters, PromotionParameters, Source, TrainingParameters
from deepfake_core.registry import fingerprint, names
from deepfake_core.registry.connection import connect
from deepfake_core.registry.runs import search_runs
from deepfake_core.registry.versions import list_versions, read_version
from flows.retrain import retrain
from tests.builders import NAME, ROOT, faces, forbid, write_zip

pytestmark = [pytest.mark.usefixtures("prefect_api"), pytest.mark.process, pytest.mark.slow, pytest.mark.sweep]

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

NEVER_AGAIN = ("deepfake_core.training.fit._fit", "deepfake_core.registry.challenge.register_detector")


def run(folder: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    command = [sys.executable, "-c", RETRAIN, ",".join(targets), "--config", folder / "retrain.yaml"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def settings(tracking):
    """Give a retrain's parameters, which a file in the current folder holds too."""
    source = Source(name=str(write_zip(tracking / "a.zip", faces(40))))
    values = {
        "data": DataParameters(sources=(source,), data_dir=str(tracking / "data")),
        "training": TrainingParameters(candidates=("cnn", "hpf_cnn"), image_size=32, epochs=1),
        "promotion": PromotionParameters(min_precision=0, min_recall=0),
    }
    text = yaml.safe_dump({name: one.model_dump(mode="json", exclude_unset=True) for name, one in values.items()})
    (tracking / "retrain.yaml").write_text(text)
    connect().create_experiment(names.EXPERIMENT)  # whose artifacts are below the current folder
    return values


def list_trainings(folder: Path) -> list[Path]:
    return list((folder / "data" / "training").glob("[0-9a-f]*"))


def test_a_retrain_that_is_killed_after_its_version_was_registered_is_finished_by_the_next(
    settings, tracking, monkeypatch
):
    def kill(target: str, *forbidden: str) -> None:
        ended = run(tracking, target, *forbidden)
        assert ended.returncode == -signal.SIGKILL, ended.stderr[-3000:]
        assert len(list_trainings(tracking)) == 2
        assert len(search_runs("attributes.status = 'RUNNING'")) == 1

    kill("deepfake_core.registry.challenge.promote_challenger")
    (version,) = list_versions(NAME)
    assert (version.decision, version.aliases) == ("", ())
    kill("deepfake_core.registry.challenge._record_decision", *NEVER_AGAIN)
    (version,) = list_versions(NAME)
    assert (version.decision, version.aliases) == ("", ("production",))
    kill("deepfake_core.registry.versions.describe_version", *NEVER_AGAIN)
    (version,) = list_versions(NAME)
    assert (version.decision, version.is_finished) == (names.PROMOTED, False)

    monkeypatch.setattr(fingerprint, "read_git_commit", lambda: "c" * 40)
    forbid(monkeypatch, *NEVER_AGAIN)
    shutil.copytree(tracking / "data" / "training", tracking / "left")
    assert retrain(**settings)[1] == "1"
    check_finished(tracking)

    shutil.copytree(tracking / "left", tracking / "data" / "training", dirs_exist_ok=True)  # a kill at the very end
    again = retrain(**settings, return_state=True)
    assert again.message == "Nothing changed since version 1 (promoted); `force` trains anyway."
    check_finished(tracking)


def check_finished(folder: Path) -> None:
    """Assert that there is one version, in production, with all that belongs to it, and no leftovers."""
    (version,) = list_versions(NAME)
    assert version.aliases == ("production",)
    assert version.is_finished
    client = mlflow.MlflowClient()
    assert "report.html" in {file.path for file in client.list_artifacts(version.run_id)}
    assert list_trainings(folder) == []
    assert search_runs("attributes.status = 'RUNNING'") == []
    retrains = [one for one in search_runs() if names.PARENT not in one.data.tags]
    assert len(retrains) == 1
    assert read_version(NAME, "1").tags["production_because"] == "; ".join(version.reasons)
    page = Path(client.download_artifacts(version.run_id, "report.html")).read_text()
    assert all(name in page for name in ("Training of cnn", "Training of hpf_cnn"))
