"""What is served is what was registered: stored files of a version change, go, or are added, on a real MLflow."""

import json
import os
import shutil
import sys
from pathlib import Path

import mlflow
import pytest

from deepfake_core.cli import main
from deepfake_core.detector import Detector
from deepfake_core.errors import ModelError
from deepfake_core.registry import connection, detectors, names, probe, production, runs
from deepfake_core.registry.seals import hash_files
from deepfake_core.registry.versions import read_version
from tests.builders import FORMER, NAME, copy_former, forbid, jpeg

pytestmark = [pytest.mark.slow, pytest.mark.sweep]

STORED = (
    "MLmodel",
    "artifacts/detector/checkpoint.keras",
    "artifacts/detector/detector.json",
    "artifacts/detector/model.onnx",
    "code/decoding.py",
    "code/description.py",
    "code/image_header.py",
    "code/detector.py",
    "code/input_gate.py",
    "conda.yaml",
    "input_example.json",
    "pyfunc_model.py",
    "python_env.yaml",
    "requirements.txt",
    "serving_input_example.json",
)
ADDED = ("artifacts/detector/model.onnx.data", "code/numpy.py")
CASES = [(how, file) for file in STORED for how in ("has changed", "is missing")]
CASES += [("was added", file) for file in ADDED]  # 32: each of the 15 stored files twice, and two more
FEW = [CASES[4], CASES[9], CASES[-1]]  # detector.json has changed, the code is missing, a module was added


@pytest.fixture(scope="module")
def registered_once(put_mlflow, tmp_path_factory):
    """Register a version with probe images, and put it into production; return its folder in the artifact store."""
    folder = tmp_path_factory.mktemp("seals")
    copy_former(folder / "detector")
    with pytest.MonkeyPatch.context() as patch:
        put_mlflow(patch, folder)
        images = [jpeg(number) for number in range(4)]
        with runs.open_run("cnn") as run_id:
            runs.log_parameters(run_id, {"threshold": 0.5})
            scores = [one.fake_probability for one in Detector(folder / "detector").predict(images)]
            probe.log_probe(run_id, images, scores)
        version = detectors.register_detector(run_id, folder / "detector", NAME, jpeg(1), {})
        production.move_production(NAME, version, None, "first")
        return folder, Path(mlflow.MlflowClient().get_model_version_download_uri(NAME, version))


@pytest.fixture
def stored(registered_once, tmp_path, monkeypatch):
    """Give the stored files of the version in production, and put them back at the end."""
    folder, stored = registered_once
    shutil.copytree(stored, tmp_path / "before")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    connection.connect()
    for label in ("real", "fake"):
        (tmp_path / "split" / label).mkdir(parents=True)
        (tmp_path / "split" / label / "0.jpg").write_bytes(jpeg(len(label)))
    yield stored
    shutil.rmtree(stored)
    shutil.copytree(tmp_path / "before", stored)


def damage(file: Path, how: str) -> None:
    if how == "is missing":
        file.unlink()
    elif how == "was added":
        file.write_bytes(b"")
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


def test_every_stored_file_is_part_of_the_seal(stored):
    sealed = json.loads(read_version(NAME, "1").tags[names.SEAL])
    detectors.remove_bytecode(stored)  # which loading it in place has left
    assert sealed == hash_files(stored)
    assert set(sealed) == set(STORED)
    assert sealed["artifacts/detector/model.onnx"] == hash_files(FORMER)["model.onnx"]
    assert len(read_version(NAME, "1").tags[names.SEAL]) < 5000  # what MLflow's databases have held ever since
    assert len(CASES) == 32


@pytest.mark.parametrize(("how", "file"), CASES)
def test_nothing_changed_is_ever_loaded(stored, how, file, monkeypatch, tmp_path, capsys):
    damage(stored / file, how)
    forbid(monkeypatch, "onnxruntime.InferenceSession", "mlflow.pyfunc.load_model", "runpy.run_path")
    commands = (
        ("predict", "split/real/0.jpg", "--no-detect"),
        ("pull", "pulled"),
        ("serve", "--no-detect"),
        ("compare", "1", "1", "--split", "split"),
        ("seal", "1", "--yes"),
    )
    for command in commands:
        assert main(command) == 2, command
        assert f"version 1 of {NAME}, of which {file} {how}" in capsys.readouterr().err, command
    with pytest.raises(ModelError, match=f"of which {file} {how}"):
        probe.check_production(NAME)
    assert not (tmp_path / "pulled").exists()


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("tag", ["x", "[]", "null", '{"MLmodel": 1}', "{}"])
def test_a_damaged_seal_loads_nothing(tag, tmp_path):
    client, sealed = mlflow.MlflowClient(), read_version(NAME, "1").tags[names.SEAL]
    client.set_model_version_tag(NAME, "1", names.SEAL, tag)
    try:
        with pytest.raises(ModelError, match="The seal of a version must be"):
            detectors.pull_detector(f"models:/{NAME}/1", tmp_path / "pulled")
    finally:
        client.set_model_version_tag(NAME, "1", names.SEAL, sealed)
    assert not (tmp_path / "pulled").exists()


def test_a_file_in_place_of_a_folder_of_bytecode_is_a_change(stored, tmp_path):
    detectors.remove_bytecode(stored)
    (stored / "code" / "__pycache__").write_text("")
    with pytest.raises(ModelError, match="code/__pycache__ was added"):
        detectors.pull_detector(f"models:/{NAME}/1", tmp_path / "pulled")


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize(("how", "file"), FEW)
def test_flows_load_nothing_changed(stored, how, file, monkeypatch, tmp_path):
    from flows.production import health  # Prefect takes seconds to import
    from flows.score import score

    damage(stored / file, how)
    forbid(monkeypatch, "onnxruntime.InferenceSession", "mlflow.pyfunc.load_model", "runpy.run_path")
    with pytest.raises(ModelError, match=f"of which {file} {how}"):
        health()
    with pytest.raises(ModelError, match=f"of which {file} {how}"):
        score("split", "scores.parquet", detect=False)
    assert not (tmp_path / "scores.parquet").exists()


def test_what_is_as_it_was_registered_is_used(stored, capsys):
    os.utime(stored / "MLmodel", (0, 0))
    mlflow.pyfunc.load_model(f"models:/{NAME}/1")
    assert (stored / "registered_model_meta").exists()  # which MLflow has just written there
    assert main(["seal", "1"]) == 0
    assert "is sealed already, and its files are those that were registered" in capsys.readouterr().out
    assert main(["predict", "split/real/0.jpg", "--no-detect"]) == 0
    assert "not sealed" not in capsys.readouterr().err
    assert main(["versions"]) == 0
    assert "not sealed" not in capsys.readouterr().out
    assert "0 have another label" in probe.check_production(NAME).text


def test_what_python_compiled_in_the_store_is_no_change_and_never_runs(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    users = mlflow.pyfunc.load_model(f"models:/{NAME}@production")
    assert users.predict({"image": [jpeg(1)]})["label"][0] in ("real", "fake")
    compiled = list(stored.rglob("*.pyc"))
    assert compiled
    for file in compiled:
        file.write_bytes(b"anything")
    copied = detectors.download_version(f"models:/{NAME}@production", tmp_path / "copy")
    assert not list(copied.rglob("*.pyc"))
    assert probe.check_production(NAME).agrees


def test_the_health_check_compares_the_threshold(stored, tmp_path):
    del stored
    detector = tmp_path / "detector"
    shutil.copytree(FORMER, detector)
    description = json.loads((detector / "detector.json").read_text())
    (detector / "detector.json").write_text(json.dumps(description | {"threshold": 0.25}))
    with runs.open_run("cnn") as run_id:
        runs.log_parameters(run_id, {"threshold": 0.5})
        probe.log_probe(run_id, [jpeg(1)], [Detector(detector).predict([jpeg(1)])[0].fake_probability])
    version = detectors.register_detector(run_id, detector, "other", jpeg(1), {})
    result = probe.check_probe(read_version("other", version))
    assert "the threshold recorded is 0.5, the model's is 0.25" in result.text
    with pytest.raises(ModelError, match="What serves it has changed"):
        result.require_agreement()
