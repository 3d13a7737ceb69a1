"""Many images scored by a registered version, as a flow."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import mlflow
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepfake_core.detector import Detector
from deepfake_core.errors import ConfigurationError, DatasetError
from deepfake_core.monitoring.observations import read_window
from deepfake_core.monitoring.observer import open_observer
from deepfake_core.registry import detectors, names, production
from deepfake_core.serving import batch_scoring
from deepfake_core.serving.batch_scoring import cut_images, join_shards, place_shards, score_shard
from deepfake_core.serving.load_versions import Judge
from deepfake_core.storage.files import remove_folder
from tests.builders import NAME, ROOT, copy_former, draw_portrait, encode, jpeg, score_images

IMAGES = {"a.jpg": jpeg(1), "below/b.png": encode(draw_portrait(2), "PNG"), "c.webp": b"words"}


@pytest.fixture
def judge(candidate):
    return Judge(candidate.folder, detect=False)


@pytest.fixture
def former(tmp_path):
    return Judge(copy_former(tmp_path / "model"), detect=False)


@pytest.fixture
def folder(tmp_path):
    for name, data in IMAGES.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    return tmp_path / "in"


def write_table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_the_table_says_which_verdicts_are_sure_and_counts_those_that_are_not(candidate, folder, tmp_path):
    model = Path(shutil.copytree(candidate.folder, tmp_path / "bounded"))
    description = json.loads((model / "detector.json").read_text())
    description |= {"bounds": {"lower": 1.0, "upper": 0.0, "max_error": 0.05}, "limits": {"side": 10_000}}
    (model / "detector.json").write_text(json.dumps(description))
    found = score_images(Judge(model, detect=False), folder, tmp_path / "scores.parquet")
    assert found.outcomes["marked as not sure"] == 2
    rows = pd.read_parquet(tmp_path / "scores.parquet")
    assert rows["sure"].tolist() == [False, False, None]
    assert ["shorter side" in reason for reason in rows["reason"].dropna()] == [True, True]


def test_a_folder_and_a_table_of_the_same_images_give_the_same_scores(candidate, judge, folder, tmp_path):
    table = write_table(tmp_path / "in.parquet", image=list(IMAGES.values()), name=list(IMAGES))
    by_folder = score_images(judge, folder, tmp_path / "one.parquet")
    assert score_images(judge, table, tmp_path / "two.parquet") == by_folder
    assert by_folder.images == 3
    assert by_folder.outcomes["unreadable"] == 1
    assert "marked as not sure" not in by_folder.outcomes  # a model without bounds does not say
    rows = [
        pd.read_parquet(tmp_path / name).sort_values("image", ignore_index=True)
        for name in ("one.parquet", "two.parquet")
    ]
    pd.testing.assert_frame_equal(*rows)
    assert rows[0]["image"].tolist() == ["a.jpg", "below/b.png", "c.webp"]
    assert rows[0]["sha256"].tolist() == [hashlib.sha256(data).hexdigest() for data in IMAGES.values()]
    expected = Detector(candidate.folder).predict(list(IMAGES.values()))
    assert rows[0]["fake_probability"].dropna().tolist() == pytest.approx(
        [one.fake_probability for one in expected[:2]]
    )
    assert rows[0]["error"].fillna("").tolist() == ["", "", "must be a JPEG, PNG or WebP image"]


def test_a_name_that_is_no_text_is_a_row(former, tmp_path):
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/b\xff.jpg")).write_bytes(jpeg(1))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/c\xff.txt")).write_text("words")
    score_images(former, tmp_path / "in", tmp_path / "out.parquet")
    assert pd.read_parquet(tmp_path / "out.parquet")["image"].tolist() == ["b\\xff.jpg"]


def test_images_without_names_are_numbered_and_missing_ones_are_rows(judge, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_scoring, "ROWS_WRITTEN", 2)
    table = write_table(
        tmp_path / "in.parquet", image=pa.array([jpeg(1), None, jpeg(2), jpeg(3), jpeg(4)], pa.large_binary())
    )
    score_images(judge, table, tmp_path / "out.parquet")
    rows = pd.read_parquet(tmp_path / "out.parquet")
    assert rows["image"].tolist() == [f"row {number}" for number in range(1, 6)]
    assert rows["label"].isna().tolist() == [False, True, False, False, False]


def test_what_holds_no_images_is_said_and_leaves_nothing(judge, tmp_path):
    paths = write_table(tmp_path / "paths.parquet", image=["/etc/passwd"])
    (tmp_path / "words.parquet").write_text("words")
    for images in (paths, tmp_path / "words.parquet", tmp_path / "missing"):
        with pytest.raises(ConfigurationError, match="a column `image` of bytes"):
            score_images(judge, images, tmp_path / "out" / "scores.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="which holds none"):
        score_images(judge, tmp_path / "empty", tmp_path / "out" / "scores.parquet")
    assert not (tmp_path / "out").exists()


def test_a_damaged_table_and_two_columns_of_images_are_said(former, tmp_path):
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
    assert not list((tmp_path / "out").rglob("*.parquet"))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(batch_scoring, "SHARD_IMAGES", 3)


def list_files(output):
    return {file.name: file.stat().st_mtime_ns for file in place_shards(output).rglob("*.parquet")}


@pytest.mark.parametrize("rows_in_group", [2, 5, 100])
@pytest.mark.usefixtures("small_shards")
def test_shards_give_what_one_piece_gives(former, tmp_path, monkeypatch, rows_in_group):
    images = [jpeg(number) for number in range(10)]
    table, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table({"image": images}), table, row_group_size=rows_in_group)
    assert len(cut_images(table, output, former)) == 4
    in_shards = score_images(former, table, output)
    monkeypatch.setattr(batch_scoring, "SHARD_IMAGES", 100)
    assert score_images(former, table, tmp_path / "whole.parquet") == in_shards
    assert in_shards.images == 10
    pd.testing.assert_frame_equal(pd.read_parquet(output), pd.read_parquet(tmp_path / "whole.parquet"))
    found = pd.read_parquet(output)
    assert found["image"].tolist() == [f"row {number}" for number in range(1, 11)]
    assert found["sha256"].tolist() == [hashlib.sha256(data).hexdigest() for data in images]


@pytest.mark.usefixtures("small_shards")
def test_a_shard_that_is_done_is_not_scored_again(former, tmp_path):
    table = write_table(tmp_path / "in.parquet", image=[jpeg(number) for number in range(8)])
    output = tmp_path / "out.parquet"
    first, *_ = cut_images(table, output, former)
    score_shard(first)
    before = list_files(output)
    assert list(before) == ["0000000000-0000000003.parquet"]
    score_images(former, table, output)
    assert list_files(output).items() >= before.items()
    assert len(pd.read_parquet(output)) == 8
    for other in (replace(former, version="name/2"), replace(former, digest="of other files")):  # judges anew
        assert not any(shard.is_done for shard in cut_images(table, output, other))
    write_table(table, image=[jpeg(number) for number in range(100, 108)])
    shards = cut_images(table, output, former)
    assert not any(shard.is_done for shard in shards)
    write_table(table, image=[jpeg(number) for number in range(200, 207)])
    with pytest.raises(ConfigurationError, match=r"must stay as they are.*in.parquet, where some changed"):
        score_shard(shards[0])


@pytest.mark.usefixtures("small_shards")
def test_an_image_of_a_folder_that_changes_stops_its_shard(former, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(7):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(jpeg(number))
    first, second, third = cut_images(tmp_path / "in", tmp_path / "out.parquet", former)
    score_shard(first)
    (tmp_path / "in" / "4.jpg").write_bytes(jpeg(50))
    (tmp_path / "in" / "later.jpg").write_bytes(jpeg(51))
    with pytest.raises(ConfigurationError, match="where some changed"):
        score_shard(second)
    score_shard(third)
    assert score_images(former, tmp_path / "in", tmp_path / "out.parquet").images == 8


@pytest.mark.usefixtures("small_shards")
def test_a_folder_of_shards_that_a_machine_does_not_see_is_said(former, folder, tmp_path):
    (shard,) = cut_images(folder, tmp_path / "out.parquet", former)
    shard.folder.rmdir()
    with pytest.raises(ConfigurationError, match="folder of `output` at the same path"):
        score_shard(shard)


@pytest.mark.usefixtures("small_shards")
def test_an_image_is_observed_once_though_its_shard_is_joined_twice(former, tmp_path):
    images = [jpeg(number) for number in (0, 1, 2, 3, 4, 0)]
    table = write_table(tmp_path / "in.parquet", image=images)
    seen = replace(former, version=f"{NAME}/1", observed=True)
    shards = cut_images(table, tmp_path / "out.parquet", seen)
    for shard in shards:
        score_shard(shard)
    for _ in range(2):  # as by a run that was killed before it removed the shards
        with open_observer(str(tmp_path / "seen")) as observer:
            join_shards(shards, tmp_path / "out.parquet", observer)
    now = datetime.now(UTC)
    found = read_window(str(tmp_path / "seen"), now - timedelta(days=1), now)
    scores = pd.read_parquet(tmp_path / "out.parquet")["fake_probability"]
    assert found["version"].tolist() == [f"{NAME}/1"] * 5
    assert sorted(found["probability"]) == sorted(round(score, 3) for score in scores[:5])


@pytest.mark.usefixtures("small_shards")
def test_what_observes_may_fail_and_the_scores_are_there(former, tmp_path, caplog):
    (tmp_path / "seen").write_text("a file")
    table = write_table(tmp_path / "in.parquet", image=[jpeg(1)])
    shards = cut_images(table, tmp_path / "out.parquet", replace(former, observed=True))
    score_shard(shards[0])
    with open_observer(str(tmp_path / "seen")) as observer:
        assert join_shards(shards, tmp_path / "out.parquet", observer).images == 1
    assert "can't be written" in caplog.text
    assert shards[0].observed.is_file()


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
    detectors.pull_detector(f"models:/{NAME}/{version}", tmp_path / "pulled")
    again = score_images(Judge(tmp_path / "pulled", detect=False), folder, tmp_path / "again.parquet")
    assert dataset.dataset.digest == again.digest
    assert not place_shards(tmp_path / "scores.parquet").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api", "small_shards")
@pytest.mark.parametrize(("failure", "tries"), [(OSError(5, "Input/output error"), 3), (DatasetError("damaged"), 1)])
def test_a_shard_that_always_fails_is_named_and_the_others_are_kept(former, tmp_path, failure, tries):
    """The last of three fails: what may heal is tried twice more, and what needs a person is not."""
    from prefect import flow, task

    from tasks.options import SHARD
    from tasks.shards import run_shards

    table = write_table(tmp_path / "in.parquet", image=[jpeg(number) for number in range(9)])
    shards = cut_images(table, tmp_path / "out.parquet", former)
    tried = []

    @task(**{**SHARD, "name": "score shard", "retry_delay_seconds": 0})
    def score_or_fail(shard, threads):
        tried.append(shard.start)
        if shard.start == 6:
            raise failure
        score_shard(shard, threads)

    with pytest.raises(type(failure)) as raised:
        flow(lambda: run_shards(score_or_fail, shards, "", at_once=1), name="three shards")()
    assert "score shard in.parquet 6-9" in f"{raised.value} {getattr(raised.value, '__notes__', '')}"
    assert tried == [0, 3, *[6] * tries]
    assert [shard.is_done for shard in shards] == [True, True, False]


DIES = """
import itertools, os, sys
from deepfake_core.serving import batch_scoring
from flows.score import score

begun, load = itertools.count(1), batch_scoring.load_predictor
batch_scoring.SHARD_IMAGES = 3
batch_scoring.load_predictor = lambda *given: os.kill(os.getpid(), 9) if next(begun) == 3 else load(*given)
score(sys.argv[1], sys.argv[2], detect=False, observe=sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api", "small_shards")
def test_a_flow_that_was_killed_goes_on_from_its_finished_shards(registered, tmp_path, monkeypatch):
    """It is killed at the third of four shards."""
    from prefect.settings import PREFECT_API_URL

    from flows import score as flows_score

    *_, version = registered
    production.move_production(NAME, version, production.find_production(NAME), "test")
    images = [jpeg(number) for number in range(10)]
    table = write_table(tmp_path / "in.parquet", image=images)
    output, seen = tmp_path / "out.parquet", str(tmp_path / "seen")
    environment = {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value()), "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", DIES, str(table), str(output), seen], env=environment)
    assert killed.returncode == -signal.SIGKILL
    before = list_files(output)
    assert sorted(before) == ["0000000000-0000000003.parquet", "0000000003-0000000006.parquet"]
    assert not output.exists()
    used: dict[str, int] = {}

    def remove(folder):
        used.update(list_files(output))
        remove_folder(folder)

    monkeypatch.setattr(flows_score, "remove_folder", remove)
    flows_score.score(str(table), str(output), detect=False, observe=seen)
    assert before.items() <= used.items()
    assert len(used) == 4
    assert pd.read_parquet(output)["sha256"].tolist() == [hashlib.sha256(data).hexdigest() for data in images]
    now = datetime.now(UTC)
    assert len(read_window(seen, now - timedelta(days=1), now)) == len(images)
    assert not place_shards(output).exists()
