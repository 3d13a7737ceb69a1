"""The wheel holds the core alone, and its base install pulls and predicts without TensorFlow or Prefect."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deepfake_core import registry
from tests.conftest import free_port, jpeg, wait_until
from tests.test_training import candidate  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
ABSENT = ("tensorflow", "keras", "prefect", "kaggle", "pandas", "sklearn", "matplotlib", "tasks", "flows")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [BIN / "uv", "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_only_the_core_goes_into_the_wheel(wheel):
    folders = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert folders == {"deepfake_core", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}


def test_the_command_line_never_imports_tensorflow():
    code = (
        "import sys, deepfake_core.cli, deepfake_core.detector\n"
        f"print([name for name in {ABSENT} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.slow
def test_base_install_pulls_and_predicts(wheel, candidate, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    port = free_port()
    backend = ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen([BIN / "mlflow", "server", *backend], stdout=log, stderr=log, env=environment)
    try:
        python = install_base(wheel, tmp_path / "base")
        absent = f"import importlib.util as u; print([name for name in {ABSENT} if u.find_spec(name)])"
        assert subprocess.run([python, "-c", absent], capture_output=True, text=True).stdout.strip() == "[]"

        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        wait_until(lambda: "startup complete" in (tmp_path / "server.log").read_text(), 60)
        with registry.open_run("cnn") as run_id:
            registry.log_metrics(run_id, {"test/auc": 0.9})
        version = registry.register_detector(run_id, candidate.folder, "deepfake-detector", jpeg(1), {})

        def deepfake(*arguments: str) -> str:
            return subprocess.run(
                [python.parent / "deepfake", *arguments], check=True, capture_output=True, text=True
            ).stdout

        (tmp_path / "face.jpg").write_bytes(jpeg(1))
        deepfake("promote", version, "--reason", "the first one", "--force", "--yes")
        assert "production" in deepfake("versions")
        from_registry = json.loads(deepfake("predict", "face.jpg", "--json"))
        deepfake("pull", "pulled")
        assert json.loads(deepfake("predict", "face.jpg", "--json", "--model", "pulled")) == from_registry
        assert from_registry["label"] in ("real", "fake")
    finally:
        server.terminate()
        server.wait(30)
    del os.environ["MLFLOW_TRACKING_URI"]
    refused = subprocess.run([python.parent / "deepfake", "versions"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "needs the whole of MLflow" in refused.stderr


def install_base(wheel: Path, folder: Path) -> Path:
    subprocess.run([BIN / "uv", "venv", "--quiet", "--python", sys.executable, folder], check=True)
    python = folder / "bin" / "python"
    constraints = ["--constraint", ROOT / "requirements.lock"]
    subprocess.run([BIN / "uv", "pip", "install", "--quiet", "--python", python, *constraints, wheel], check=True)
    return python


def test_lock_names_no_index_and_hashes_every_version():
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    assert "--index-url" not in lock
    for requirement in re.split(r"\n(?=\S)", re.sub(r"(?m)^\s*#.*\n", "", lock)):
        assert "--hash=sha256:" in requirement, requirement
