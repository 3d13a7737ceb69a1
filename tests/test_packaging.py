"""The wheel holds the core alone, and its base install pulls and predicts without TensorFlow or Prefect."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import mlflow
import pytest
import requests

from deepfake_core.detector import Detector
from deepfake_core.registry import detectors, model_files, names, production, runs
from tests.builders import draw_portrait, free_port, jpeg, wait_until

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
ABSENT = ("tensorflow", "keras", "prefect", "kaggle", "pandas", "sklearn", "matplotlib", "tasks", "flows")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [BIN / "uv", "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.mark.process
def test_only_the_core_goes_into_the_wheel(wheel):
    folders = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert folders == {"deepfake_core", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}


@pytest.mark.process
def test_the_command_line_never_imports_tensorflow():
    code = (
        "import sys, deepfake_core.cli, deepfake_core.detector\n"
        f"print([name for name in {ABSENT} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.sweep
def test_base_install_pulls_and_predicts(wheel, candidate, tmp_path, monkeypatch):
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
        wait_until(lambda: "startup complete" in (tmp_path / "server.log").read_text())
        with runs.open_run("cnn") as run_id:
            runs.log_metrics(run_id, {"test/auc": 0.9})
        version = detectors.register_detector(run_id, candidate.folder, "deepfake-detector", jpeg(1), {})

        def deepfake(*arguments: str) -> str:
            return subprocess.run(
                [python.parent / "deepfake", *arguments], check=True, capture_output=True, text=True
            ).stdout

        draw_portrait(1).save(tmp_path / "face.jpg")
        deepfake("promote", version, "--reason", "the first one", "--force", "--yes")
        assert "production" in deepfake("versions")
        from_registry = json.loads(deepfake("predict", "face.jpg", "--json"))
        deepfake("pull", "pulled")
        assert json.loads(deepfake("predict", "face.jpg", "--json", "--model", "pulled")) == from_registry
        assert from_registry["label"] in ("real", "fake")
        deepfake("predict", "face.jpg", "--model", "pulled", "--explain", "explained")
        assert Path("explained/face.explained.png").is_file()
        Path("clip.mp4").write_bytes(b"a clip")
        for command, extra in (
            (("predict", "clip.mp4", "--json", "--model", "pulled"), "video"),
            (("predict", "face.jpg", "--model", "pulled", "--observe", "seen"), "observe"),
            (("serve", "--model", "pulled"), "serve"),
            (("gc",), "train"),
        ):
            lacking = subprocess.run([python.parent / "deepfake", *command], capture_output=True, text=True)
            assert lacking.returncode == 2
            assert f"Install deepfake-retraining[{extra}]" in lacking.stderr

        for _ in range(2):
            with runs.open_run("cnn") as run_id:
                runs.log_file(run_id, candidate.folder / "checkpoint.keras", names.CHECKPOINT_FOLDER)
            detectors.register_detector(run_id, candidate.folder, "deepfake-detector", jpeg(1), {})
        (unneeded,) = model_files.find_unneeded_files("deepfake-detector", keep=1)
        assert unneeded.versions == ("2",)  # 1 is in production
        stored = measure(tmp_path)
        assert model_files.remove_model_files("deepfake-detector", unneeded)
        assert stored - measure(tmp_path) == unneeded.bytes > 0
        model = ("--model", "models:/deepfake-detector/2")
        removed = subprocess.run([python.parent / "deepfake", "pull", "second", *model], capture_output=True, text=True)
        assert "version 2 of deepfake-detector, whose files were removed" in removed.stderr
        deepfake("pull", "first")
    finally:
        server.terminate()
        server.wait()
    del os.environ["MLFLOW_TRACKING_URI"]
    refused = subprocess.run([python.parent / "deepfake", "versions"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "needs the package mlflow" in refused.stderr


def measure(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / "mlartifacts").rglob("*") if file.is_file())


LOAD = """
import importlib.util, json, sys
import mlflow, pandas
model = mlflow.pyfunc.load_model("models:/deepfake-detector@production")
images = [open(name, "rb").read() for name in sys.argv[1:]]
out = model.predict(pandas.DataFrame({"image": images}))
absent = ("deepfake_core", "tensorflow", "keras", "prefect", "tasks", "flows")
rows = json.loads(out.to_json(orient="records"))
print(json.dumps([[name for name in absent if importlib.util.find_spec(name)], rows]))
"""


@pytest.mark.sweep
@pytest.mark.process
@pytest.mark.slow
def test_the_registered_model_stands_alone_and_is_served(candidate, tmp_path, monkeypatch):
    """With mlflow and the model's own requirements, and the project absent: load it, and POST to it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with runs.open_run("cnn") as run_id:
        pass
    version = detectors.register_detector(run_id, candidate.folder, "deepfake-detector", jpeg(1), {})
    production.move_production("deepfake-detector", version, None, "test")
    images = [jpeg(1), b"no image", jpeg(2)]
    for number, data in enumerate(images):
        Path(f"{number}.jpg").write_bytes(data)
    expected = Detector(candidate.folder).predict(images)

    requirements = mlflow.pyfunc.get_model_dependencies(f"models:/deepfake-detector/{version}")
    python = make_environment(tmp_path / "alone", "--requirement", requirements)
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    command = [python, "-I", "-c", LOAD, "0.jpg", "1.jpg", "2.jpg"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    installed, rows = json.loads(ran.stdout.splitlines()[-1])
    assert installed == []
    assert rows[1]["error"] == "must be a JPEG, PNG or WebP image"
    check_rows(rows, expected)

    port = free_port()
    serve = [python, "-m", "mlflow", "models", "serve", "-m", "models:/deepfake-detector@production"]
    serve += ["--env-manager", "local", "--port", str(port)]
    with (tmp_path / "serve.log").open("w") as log:
        server = subprocess.Popen(serve, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_until(lambda: "startup complete" in (tmp_path / "serve.log").read_text())
        table = {"columns": ["image"], "data": [[base64.b64encode(data).decode()] for data in images]}
        answer = requests.post(f"http://127.0.0.1:{port}/invocations", json={"dataframe_split": table})
        assert answer.status_code == 200, answer.text
        assert "NaN" not in answer.text
        check_rows(answer.json()["predictions"], expected)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def check_rows(rows, expected):
    assert [row["label"] for row in rows] == [prediction.label for prediction in expected]
    for row, prediction in zip(rows, expected, strict=True):
        assert row["threshold"] == prediction.threshold
        if prediction.label:
            assert row["fake_probability"] == pytest.approx(prediction.fake_probability, abs=1e-6)


def install_base(wheel: Path, folder: Path) -> Path:
    return make_environment(folder, "--constraint", ROOT / "requirements.lock", wheel)


def make_environment(folder: Path, *wanted: str | Path) -> Path:
    """Make a virtual environment that holds what is wanted alone; return its Python."""
    subprocess.run([BIN / "uv", "venv", "--quiet", "--python", sys.executable, folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([BIN / "uv", "pip", "install", "--quiet", "--python", python, *wanted], check=True)
    return python


def test_lock_names_no_index_and_hashes_every_version():
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    assert "--index-url" not in lock
    for requirement in re.split(r"\n(?=\S)", re.sub(r"(?m)^\s*#.*\n", "", lock)):
        assert "--hash=sha256:" in requirement, requirement
