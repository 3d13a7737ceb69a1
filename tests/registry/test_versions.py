"""Against a real MLflow on SQLite."""

import json
import sys
import types
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from deepfake_core.cli import main
from deepfake_core.config import EvaluationParameters, PromotionParameters, TrainingParameters
from deepfake_core.errors import ModelError, ServiceError
from deepfake_core.registry import connection, fingerprint, production, runs, versions
from tests.builders import NAME, draw_image, draw_portrait, encode, free_port, jpeg


@pytest.mark.slow
def test_runs_are_nested_and_carry_the_commit(registered):
    parent, run_id, _ = registered
    run = mlflow.MlflowClient().get_run(run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["mlflow.source.git.commit"] == fingerprint.read_git_commit()
    assert run.data.params == {"training.epochs": "3", "training.augmentation.zoom": "0.1"}
    assert mlflow.get_experiment(run.info.experiment_id).name == "deepfake-detection"
    assert run.info.status == "FINISHED"


@pytest.mark.usefixtures("tracking")
def test_a_run_whose_body_fails_is_failed():
    with pytest.raises(KeyError), runs.open_run("broken") as run_id:
        raise KeyError("x")
    assert mlflow.MlflowClient().get_run(run_id).info.status == "FAILED"


@pytest.mark.usefixtures("tracking")
def test_no_model_and_no_alias_both_mean_no_production_yet():
    connection.connect()
    assert production.find_production(NAME) is None
    mlflow.MlflowClient().create_registered_model(NAME)
    assert production.find_production(NAME) is None


@pytest.mark.slow
def test_pyfunc_model_answers_bytes_alone_and_harms_no_row(registered, tmp_path):
    _, _, version = registered
    model = mlflow.pyfunc.load_model(f"models:/{NAME}/{version}")
    (file := tmp_path / "face.jpg").write_bytes(jpeg(3))
    rows = [jpeg(1), b"no image", encode(draw_image(2), "PNG"), str(file), file.as_uri(), None]
    out = model.predict(pd.DataFrame({"image": rows}))
    assert list(out.columns) == ["label", "fake_probability", "threshold", "sure", "reason", "error"]
    assert out["label"].isna().tolist() == [False, True, False, True, True, True]
    assert out.loc[1, "error"] == "must be a JPEG, PNG or WebP image"
    assert (
        out.loc[3:, "error"].str.startswith("must be an image as bytes, base64 or a base64 data URL, not a path").all()
    )
    assert out["fake_probability"].dropna().between(0, 1).all()


def test_each_version_runs_its_own_code_whatever_else_is_called_detector(registered, tmp_path, monkeypatch):
    _, _, version = registered
    uri = f"models:/{NAME}/{version}"
    copied = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "later")))
    code = copied / "code" / "decoding.py"
    code.write_text(code.read_text().replace("must be a JPEG, PNG or WebP image", "a later version's words"))
    for name in ("detector", "decoding"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    words = [
        mlflow.pyfunc.load_model(place).predict(pd.DataFrame({"image": [b"no image"]})).loc[0, "error"]
        for place in (uri, str(copied), uri)
    ]
    assert words == [
        "must be a JPEG, PNG or WebP image",
        "a later version's words",
        "must be a JPEG, PNG or WebP image",
    ]


def test_pull_and_predict_agree_with_the_registry(registered, tmp_path, capsys):
    _, _, version = registered
    production.move_production(NAME, version, expected=production.find_production(NAME), reason="test")
    face = tmp_path / "face.jpg"
    draw_portrait(1).save(face)

    assert main(["pull", str(tmp_path / "pulled")]) == 0
    assert {file.name for file in (tmp_path / "pulled").iterdir()} == {
        "checkpoint.keras",
        "detector.json",
        "model.onnx",
    }
    capsys.readouterr()
    assert main(["predict", str(face), "--json", "--model", str(tmp_path / "pulled")]) == 0
    pulled = json.loads(capsys.readouterr().out)
    assert main(["predict", str(face), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == pulled
    served = mlflow.pyfunc.load_model(f"models:/{NAME}@production").predict(
        pd.DataFrame({"image": [face.read_bytes()]})
    )
    assert pulled["fake_probability"] == pytest.approx(served["fake_probability"][0])
    assert pulled["label"] == served["label"][0]


@pytest.mark.usefixtures("registered")
def test_unreadable_images_are_named_and_end_with_status_2(tmp_path, capsys):
    (tmp_path / "words.jpg").write_bytes(b"words")
    draw_portrait(1).save(tmp_path / "face.jpg")
    main(["pull", str(tmp_path / "pulled"), "--model", f"models:/{NAME}/1"])
    paths = [str(tmp_path / name) for name in ("words.jpg", "missing.jpg", "face.jpg")]
    assert main(["predict", "--json", "--model", str(tmp_path / "pulled"), *paths]) == 2
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["error"] for row in rows] == [
        "must be a JPEG, PNG or WebP image",
        "can't be read (No such file or directory)",
        None,
    ]


@pytest.mark.usefixtures("registered")
def test_pull_never_writes_into_a_folder_that_holds_files(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["pull", str(tmp_path)]) == 2
    assert "empty or new folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_versions_lists_figures_and_decision(registered, capsys, monkeypatch):
    _, _, version = registered
    monkeypatch.setenv("COLUMNS", "200")
    versions.tag_version(NAME, version, {"decision": "promoted", "reasons": "met: a; met: b"})
    assert main(["versions"]) == 0
    out = capsys.readouterr().out
    for word in ("0.8000", "0.7000", "0.9000", "promoted", "met: a", "met: b", "production"):
        assert word in out


def test_version_is_found_by_its_flow_run(registered):
    _, _, version = registered
    assert versions.find_version(NAME, "f1") == version
    with pytest.raises(ModelError, match="MLFLOW_TRACKING_URI on all workers"):
        versions.find_version(NAME, "f2")


@pytest.mark.usefixtures("registered")
def test_an_unknown_version_is_a_clear_error(capsys):
    assert main(["predict", "x.jpg", "--model", f"models:/{NAME}/99"]) == 2
    assert "See `deepfake versions`" in capsys.readouterr().err
    assert main(["predict", "x.jpg", "--model", "/nowhere"]) == 2
    assert "folder written by `deepfake pull`" in capsys.readouterr().err


def test_an_unreachable_server_is_said_at_once(monkeypatch):
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with pytest.raises(ServiceError, match=rf"127.0.0.1:{port}.*correct\s+MLFLOW_TRACKING_URI"):
        connection.connect()


def test_an_image_knows_its_commit_by_a_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_COMMIT", "c" * 40)
    assert fingerprint.read_git_commit() != "c" * 40  # a checkout is asked itself
    monkeypatch.setenv("PATH", str(tmp_path))  # no git, as in the image
    assert fingerprint.read_git_commit() == "c" * 40
    monkeypatch.setenv("GIT_COMMIT", "")
    assert fingerprint.read_git_commit() == "unknown"


@pytest.mark.usefixtures("tracking")
def test_a_training_is_the_same_if_data_parameters_and_committed_code_are(monkeypatch):
    client = connection.connect()
    monkeypatch.setattr(fingerprint, "read_git_commit", lambda: "c" * 40)

    def find(data, **training):
        parameters = TrainingParameters(**training), EvaluationParameters(), PromotionParameters()
        known = fingerprint.fingerprint_training(data, *parameters)
        return known, fingerprint.find_same_training(NAME, known)

    known, same = find("d1", seed=1)
    assert same is None
    client.create_registered_model(NAME)
    with runs.open_run("cnn") as run_id:
        pass
    for tag in (known, known, ""):
        client.create_model_version(NAME, "file:///nowhere", run_id, tags={"fingerprint": tag})
    assert find("d1", seed=1)[1] is None
    versions.tag_version(NAME, "2", {"decision": "not promoted"})
    assert find("d1", seed=1)[1] is None
    versions.describe_version(NAME, "2", "a model card")
    assert find("d1", seed=1)[1].version == "2"
    assert find("d2", seed=1)[1] is None
    assert find("d1", seed=2)[1] is None
    for commit in ("e" * 40, "c" * 40 + "-dirty", "unknown"):
        monkeypatch.setattr(fingerprint, "read_git_commit", lambda commit=commit: commit)
        assert find("d1", seed=1)[1] is None
