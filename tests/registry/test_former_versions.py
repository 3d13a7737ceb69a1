"""Versions that earlier code registered. `former_model` holds one's files as commit ea14cf4 wrote them."""

import json
from importlib.metadata import version as installed_version
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema

import deepfake_core.models  # noqa: F401 - a checkpoint names its classes
from deepfake_core.cli import main
from deepfake_core.detector import Detector
from deepfake_core.errors import ModelError
from deepfake_core.registry import names, probe, production, runs, seals
from deepfake_core.registry.connection import connect
from deepfake_core.registry.detectors import download_version
from deepfake_core.registry.versions import read_version
from deepfake_core.training.export import load_network
from tests.builders import FORMER, NAME, copy_former, draw_scores, jpeg, stripes


def register_as_formerly(run_id: str, folder: Path) -> None:
    """Register a detector with its code as that commit did."""
    optional = {"label": "string", "fake_probability": "double", "error": "string"}
    outputs = [ColSpec(kind, name, required=False) for name, kind in optional.items()]
    with mlflow.start_run(run_id=run_id):
        model = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(FORMER / "pyfunc_model.py"),
            code_paths=[str(FORMER / "detector.py")],
            artifacts={"detector": str(folder)},
            signature=ModelSignature(
                inputs=Schema([ColSpec("binary", "image")]), outputs=Schema([*outputs, ColSpec("double", "threshold")])
            ),
            input_example=pd.DataFrame({"image": [jpeg(1)]}),
            pip_requirements=[f"numpy=={installed_version('numpy')}"],
        )
    tags = {"decision": "promoted", "reasons": "met: a; met: b", "dataset_version": "0123456789abcdef"}
    mlflow.register_model(model.model_uri, NAME, tags=tags | {"drawn_images": "true", "architecture": "cnn"})


@pytest.fixture
def former(tracking):
    """Register two versions; return the folder of the files that they serve."""
    connect()
    folder = tracking / "detector"
    copy_former(folder)
    labels, scores = draw_scores(60)
    rows = [f"{n},{n},drawn,{n}.jpg,{('real', 'fake')[label]},{scores[n]}" for n, label in enumerate(labels)]
    for _ in range(2):
        with runs.open_run("efficientnet_lite0") as run_id:
            runs.log_parameters(run_id, {"threshold": 0.5})
            runs.log_metrics(run_id, {"test/auc": 0.9, "test/auc_low": 0.8, "test/auc_high": 0.95})
            runs.log_text(run_id, "\n".join(["sha256,group,source,member,label,score", *rows]), names.SCORES)
        register_as_formerly(run_id, folder)
    return folder


@pytest.mark.slow
def test_versions_of_former_code_are_read_pulled_compared_promoted_and_rolled_back(former, tmp_path, capsys):
    version = read_version(NAME, "1")
    assert (version.decision, version.reasons, version.is_drawn) == ("promoted", ["met: a", "met: b"], True)
    assert str(version.estimate("auc")) == "0.900 (0.800 to 0.950)"
    assert main(["promote", "1", "--reason", "start", "--yes"]) == 0
    assert main(["promote", "2", "--reason", "next", "--yes"]) == 0
    assert main(["compare", "1", "2"]) == 0
    assert "On 60 images" in capsys.readouterr().out
    assert main(["rollback", "--reason", "back", "--yes"]) == 0
    assert production.find_production(NAME) == "1"

    assert main(["pull", str(tmp_path / "pulled")]) == 0
    assert {file.name for file in (tmp_path / "pulled").iterdir()} == {
        "model.onnx",
        "detector.json",
        "checkpoint.keras",
    }
    image = tmp_path / "face.jpg"
    image.write_bytes(jpeg(3))
    capsys.readouterr()
    assert main(["predict", str(image), "--no-detect", "--json"]) == 0
    probability = json.loads(capsys.readouterr().out)["fake_probability"]
    served = mlflow.pyfunc.load_model(f"models:/{NAME}@production").predict(pd.DataFrame({"image": [jpeg(3)]}))
    assert probability == pytest.approx(served["fake_probability"][0])
    assert probability == pytest.approx(Detector(former).predict([jpeg(3)])[0].fake_probability)


@pytest.mark.slow
def test_a_version_without_a_seal_is_served_with_a_warning_until_it_is_sealed(
    former, tmp_path, capsys, caplog, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    image, version = tmp_path / "face.jpg", ("--model", f"models:/{NAME}/1")
    image.write_bytes(jpeg(3))
    scores = [one.fake_probability for one in Detector(former).predict([jpeg(3)])]
    probe.log_probe(read_version(NAME, "1").run_id, [jpeg(3)], scores)
    assert main(["versions"]) == 0
    assert "not sealed: `deepfake seal 1` shows its files" in capsys.readouterr().out
    assert main(["predict", str(image), "--no-detect", *version]) == 0
    assert f"Version 1 of {NAME} is not sealed" in caplog.text
    with pytest.raises(ModelError, match="must be sealed before its own code is run"):
        probe.check_probe(read_version(NAME, "1"))

    monkeypatch.setattr("builtins.input", lambda question: print(question) or "n")
    assert main(["seal", "1"]) == 1
    shown = capsys.readouterr().out
    for name, digest in seals.hash_files(former).items():
        assert f"{digest}  artifacts/detector/{name}" in shown
    assert '"class_names"' in shown
    assert "Seal version 1 with these 11 files?" in shown
    assert names.SEAL not in read_version(NAME, "1").tags

    caplog.clear()
    assert main(["seal", "1", "--yes"]) == 0
    assert "Version 1 is sealed" in capsys.readouterr().out
    assert main(["versions"]) == 0
    assert "seal 1`" not in (printed := capsys.readouterr().out)
    assert "seal 2`" in printed
    caplog.clear()
    assert probe.check_probe(read_version(NAME, "1")).agrees
    assert "not sealed" not in caplog.text
    stored = Path(mlflow.MlflowClient().get_model_version_download_uri(NAME, "1"))
    (stored / "code" / "detector.py").write_text("raise SystemExit")
    assert main(["predict", str(image), "--no-detect", *version]) == 2
    assert "of which code/detector.py has changed" in capsys.readouterr().err


@pytest.mark.slow
def test_the_health_check_finds_swapped_class_names(former, tmp_path):
    file = former / "detector.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"class_names": ["fake", "real"]}))
    run_id = read_version(NAME, "1").run_id
    probe.log_probe(run_id, [jpeg(3)], [1.0])
    register_as_formerly(run_id, former)
    copied = download_version(f"models:/{NAME}/3", tmp_path / "copied")
    seals.seal_version(NAME, "3", seals.hash_files(copied))
    result = probe.check_probe(read_version(NAME, "3"))
    assert max(result.differences) < 0.001
    assert "1 have another label" in result.text
    with pytest.raises(ModelError, match="What serves it has changed"):
        result.require_agreement()


def test_a_checkpoint_of_former_code_loads_with_the_classes_that_it_names():
    network = load_network(FORMER)
    images = stripes(20, 5)
    scores = network(images.pixels.astype("float32"), training=False)[:, 0]
    assert ((scores >= 0.5) == (images.labels == 1)).numpy().all()
