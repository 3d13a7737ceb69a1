"""Many images scored by a registered version, as a flow."""

import hashlib
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import mlflow
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepfake_core.detector import Detector
from deepfake_core.errors import ConfigurationError
from deepfake_core.monitoring.observations import read_window
from deepfake_core.registry import detectors, names, production
from deepfake_core.serving import batch_scoring
from deepfake_core.serving.batch_scoring import score_images
from deepfake_core.serving.predictor import Predictor
from tests.builders import NAME, copy_former, draw_portrait, encode, jpeg

IMAGES = {"a.jpg": jpeg(1), "below/b.png": encode(draw_portrait(2), "PNG"), "c.webp": b"words"}


@pytest.fixture
def predictor(candidate):
    return Predictor(Detector(candidate.folder), detect=False)


@pytest.fixture
def folder(tmp_path):
    for name, data in IMAGES.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    return tmp_path / "in"


def write_table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_a_folder_and_a_table_of_the_same_images_give_the_same_scores(predictor, folder, tmp_path):
    table = write_table(tmp_path / "in.parquet", image=list(IMAGES.values()), name=list(IMAGES))
    by_folder = score_images(predictor, folder, tmp_path / "one.parquet")
    assert score_images(predictor, table, tmp_path / "two.parquet") == by_folder
    assert by_folder.images == 3
    assert by_folder.outcomes["unreadable"] == 1
    rows = [
        pd.read_parquet(tmp_path / name).sort_values("image", ignore_index=True)
        for name in ("one.parquet", "two.parquet")
    ]
    pd.testing.assert_frame_equal(*rows)
    assert rows[0]["image"].tolist() == ["a.jpg", "below/b.png", "c.webp"]
    assert rows[0]["sha256"].tolist() == [hashlib.sha256(data).hexdigest() for data in IMAGES.values()]
    expected = predictor.detector.predict(list(IMAGES.values()))
    assert rows[0]["fake_probability"].dropna().tolist() == pytest.approx(
        [one.fake_probability for one in expected[:2]]
    )
    assert rows[0]["error"].fillna("").tolist() == ["", "", "must be a JPEG, PNG or WebP image"]


def test_a_name_that_is_no_text_is_a_row(tmp_path):
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/b\xff.jpg")).write_bytes(jpeg(1))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/c\xff.txt")).write_text("words")
    former = Predictor(Detector(copy_former(tmp_path / "model")), detect=False)
    score_images(former, tmp_path / "in", tmp_path / "out.parquet")
    assert pd.read_parquet(tmp_path / "out.parquet")["image"].tolist() == ["b\\xff.jpg"]


def test_images_without_names_are_numbered_and_missing_ones_are_rows(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_scoring, "ROWS_WRITTEN", 2)
    table = write_table(
        tmp_path / "in.parquet", image=pa.array([jpeg(1), None, jpeg(2), jpeg(3), jpeg(4)], pa.large_binary())
    )
    calls = []
    score_images(predictor, table, tmp_path / "out.parquet", lambda *done: calls.append(done))
    rows = pd.read_parquet(tmp_path / "out.parquet")
    assert rows["image"].tolist() == [f"row {number}" for number in range(1, 6)]
    assert rows["label"].isna().tolist() == [False, True, False, False, False]
    assert calls[-1] == (5, 5)


def test_what_holds_no_images_is_said_and_leaves_nothing(predictor, tmp_path):
    paths = write_table(tmp_path / "paths.parquet", image=["/etc/passwd"])
    (tmp_path / "words.parquet").write_text("words")
    for images in (paths, tmp_path / "words.parquet", tmp_path / "missing"):
        with pytest.raises(ConfigurationError, match="a column `image` of bytes"):
            score_images(predictor, images, tmp_path / "out" / "scores.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="which holds none"):
        score_images(predictor, tmp_path / "empty", tmp_path / "out" / "scores.parquet")
    assert not (tmp_path / "out").exists()


def test_a_damaged_table_and_two_columns_of_images_are_said(tmp_path):
    former = Predictor(Detector(copy_former(tmp_path / "model")), detect=False)
    images = [jpeg(number) for number in range(20)]
    damaged = tmp_path / "damaged.parquet"
    pq.write_table(pa.table({"image": images}), damaged, compression="none", data_page_size=1)
    content = damaged.read_bytes()
    place = content.rindex(images[15]) - 30  # the header of a page
    damaged.write_bytes(content[:place] + b"\xff" * 30 + content[place + 30 :])
    two = tmp_path / "two.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(images)] * 2, names=["image", "image"]), two)
    for path, said in ((damaged, "is damaged after row"), (two, "columns .*image: binary.*image: binary")):
        with pytest.raises(ConfigurationError, match=rf"a column `image` of bytes.*{path}.*{said}"):
            score_images(former, path, tmp_path / "out" / "scores.parquet")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_the_flow_logs_which_version_scored_what(registered, folder, tmp_path):
    from flows.score import score  # Prefect takes seconds to import

    *_, version = registered
    production.move_production(NAME, version, production.find_production(NAME), "test")
    mlflow.MlflowClient().set_registered_model_alias(NAME, names.CHALLENGER, version)
    with pytest.raises(ConfigurationError, match="--shadow needs --observe"):
        score(str(folder), str(tmp_path / "scores.parquet"), shadow=True)
    path = score(
        str(folder), str(tmp_path / "scores.parquet"), detect=True, observe=str(tmp_path / "seen"), shadow=True
    )
    now = datetime.now(UTC)
    observed = read_window(str(tmp_path / "seen"), now - timedelta(days=1), now)
    assert observed[["version", "shadow_version", "face"]].to_numpy().tolist() == [[*[f"{NAME}/{version}"] * 2, 1]]
    assert observed["shadow_probability"].tolist() == observed["probability"].tolist()
    rows = pd.read_parquet(path)
    assert rows.set_index("image").loc["below/b.png", "face"] == 1
    assert "no face" in rows.set_index("image").loc["a.jpg", "error"]
    (found,) = mlflow.MlflowClient().search_runs(
        [mlflow.get_experiment_by_name(names.EXPERIMENT).experiment_id], "tags.model_version != ''"
    )
    run = mlflow.get_run(found.info.run_id)
    assert run.data.tags["model_version"] == f"{NAME}/{version}"
    assert run.data.metrics["unreadable"] == 1
    assert mlflow.get_logged_model(run.inputs.model_inputs[0].model_id).source_run_id == registered[1]
    (dataset,) = run.inputs.dataset_inputs
    assert json.loads(dataset.dataset.source) == {"uri": str(folder)}
    detector = Detector(detectors.pull_detector(f"models:/{NAME}/{version}", tmp_path / "pulled"))
    again = score_images(Predictor(detector, detect=False), folder, tmp_path / "again.parquet")
    assert dataset.dataset.digest == again.digest
