"""Years of retrains, then housekeeping: real data sets, archives and caches, and a real MLflow on SQLite."""

import json
import logging
import os
import shutil
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from prefect.client.orchestration import get_client

from deepfake_core import housekeeping
from deepfake_core.cli import build_parser, main
from deepfake_core.config import DEFAULT_KEEP, DataParameters, Source
from deepfake_core.data.dataset import Dataset, open_dataset
from deepfake_core.data.duplicates import mark_duplicates
from deepfake_core.data.images import load_images
from deepfake_core.data.index import build_index
from deepfake_core.data.kaggle import fetch_archive
from deepfake_core.data.links import find_links
from deepfake_core.data.publishing import publish_dataset
from deepfake_core.data.split_memory import read_memory
from deepfake_core.data.splits import assign_splits
from deepfake_core.errors import ConfigurationError, LockedError, ModelError, ServiceError
from deepfake_core.feedback.records import Decision, GivenVerdict, name_record
from deepfake_core.feedback.reports import Feedback, open_feedback
from deepfake_core.housekeeping import clean
from deepfake_core.registry import connection, detectors, model_files, names, production, runs
from deepfake_core.registry.versions import read_version, tag_version
from deepfake_core.storage.files import hash_file
from deepfake_core.storage.store import open_store
from deepfake_core.training.checkpoints import CHECKPOINT
from deepfake_core.training.fit import Training
from tests.builders import NAME, RECIPE, draw_portrait, faces, hold_data, jpeg, write_zip

pytestmark = pytest.mark.slow

SOURCE = "owner/faces"
DAY = 24 * 3600


def prepare(data_dir: Path, version: int) -> Dataset:
    """Publish a data set of a Kaggle version that was downloaded before; each holds more images than the last."""
    zipped = write_zip(data_dir / "archives" / SOURCE / f"{version}.zip", faces(18 + 2 * version))
    provenance = {"sha256": hash_file(zipped), "bytes": zipped.stat().st_size, "version": version}
    zipped.with_suffix(".json").write_text(json.dumps(provenance))
    store, data = open_store(data_dir), DataParameters(sources=(Source(name=SOURCE, version=version),))
    archives = [fetch_archive(data.sources[0], store)]
    index = build_index(archives[0], store)
    links = find_links(index)
    rows = assign_splits(mark_duplicates(index, links), links, read_memory(store), 0.25, 0.25)
    return publish_dataset(rows, archives, store, data)


def find_state(dataset: Dataset) -> Path:
    return Training("cnn", RECIPE).folder(dataset)


def retrain(data_dir: Path, number: int, detector: Path) -> Dataset:
    """Leave behind what a retrain does, with a candidate that did not win, but train nothing."""
    dataset = prepare(data_dir, number)
    load_images(dataset, "val", 32)
    find_state(dataset).mkdir(parents=True)
    (find_state(dataset) / "history.csv").write_text("epoch\n")
    with runs.open_run(f"retrain {number}", tags={"dataset_version": dataset.version}) as parent:
        for name in ("cnn", "loser"):
            with runs.open_run(name, parent) as run_id:
                runs.log_file(run_id, detector / CHECKPOINT, names.CHECKPOINT_FOLDER)
                runs.log_metrics(run_id, {"test/auc": 0.9})
            if name == "cnn":
                tags = {"decision": "promoted", "dataset_version": dataset.version}
                detectors.register_detector(run_id, detector, NAME, jpeg(1), tags)
    return dataset


def copy_folder(folder: Path, copy: Path) -> None:
    """Copy a folder; files that are one in it are one in the copy."""
    copies: dict[int, str] = {}

    def copy_file(source: str, target: str) -> None:
        inode = Path(source).stat().st_ino
        if inode in copies:
            os.link(copies[inode], target)
        else:
            copies[inode] = shutil.copy2(source, target)

    shutil.copytree(folder, copy, copy_function=copy_file)


@pytest.fixture(scope="module")
def years_once(candidate, put_mlflow, tmp_path_factory):
    """Leave behind five retrains: the second is in production, the first is what a rollback leads to."""
    folder = tmp_path_factory.mktemp("years")
    with pytest.MonkeyPatch.context() as patch:
        put_mlflow(patch, folder)
        versions = [retrain(folder / "data", number, candidate.folder).version for number in range(1, 6)]
        production.move_production(NAME, "1", None, "first")
        production.move_production(NAME, "2", "1", "better")
    copy_folder(folder, folder.with_name("before"))
    return folder, versions


@pytest.fixture
def years(years_once, monkeypatch, tmp_path):
    """Give the data folder and the data sets' versions, oldest first, as they were at the beginning."""
    folder, versions = years_once
    shutil.rmtree(folder)
    copy_folder(folder.with_name("before"), folder)
    shutil.copy(folder / "mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("COLUMNS", "200")
    connection.connect()
    return folder / "data", versions


def list_sizes(folder: Path) -> dict[str, int]:
    files = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    return {str(file): file.stat().st_size for file in files}


def measure_disk(folder: Path) -> int:
    """Return the bytes of a folder's files, of those that are one file once."""
    found = (Path(parent, name).stat() for parent, _, names in os.walk(folder) for name in names)
    return sum({each.st_ino: each.st_size for each in found}.values())


def list_datasets(data_dir: Path) -> set[str]:
    return {path.name for path in (data_dir / "splits").iterdir() if path.is_dir()}


def pull(version: str, folder: Path) -> set[str]:
    return {file.name for file in detectors.pull_detector(f"models:/{NAME}/{version}", folder).iterdir()}


def test_an_image_of_several_data_sets_is_freed_with_the_last(tmp_path):
    for name in ("one", "other", "stays"):
        (tmp_path / name).mkdir()
    for name, also in (("a", ()), ("b", ("other",)), ("c", ("other", "stays"))):
        (tmp_path / "one" / name).write_bytes(b"image")
        for folder in also:
            os.link(tmp_path / "one" / name, tmp_path / folder / name)
    seen = Counter[int]()
    assert [housekeeping._measure(tmp_path / name, seen) for name in ("one", "other")] == [5, 5]


def find_run(version: str) -> mlflow.entities.Run:
    return mlflow.MlflowClient().get_run(read_version(NAME, version).run_id)


@pytest.mark.slow
def test_what_production_and_a_rollback_need_stays_whatever_is_kept(years, tmp_path, capsys):
    data_dir, (first, second, third, fourth, fifth) = years
    memory = (data_dir / "splits" / "memory.parquet").read_bytes()
    for number in (1, 2):
        (data_dir / "indexes" / f"near copies-v{number}-{'0' * 16}.parquet").touch()
    clean(open_store(data_dir), keep=1)
    assert list_datasets(data_dir) == {first, second, fifth}
    assert (data_dir / "splits" / "memory.parquet").read_bytes() == memory
    for version in (first, second, fifth):
        dataset = open_dataset(data_dir / "splits" / version)
        assert all((dataset.path / path).is_file() for path in dataset.manifest["path"] if path)
        assert find_state(dataset).is_dir()
    assert {path.name for path in (data_dir / "batches").iterdir()} == {f"{one}-32px" for one in (first, second, fifth)}
    assert len(list((data_dir / "training").iterdir())) == 3
    archives = {path.name for path in (data_dir / "archives" / SOURCE).iterdir()}
    assert archives == {f"{number}.{suffix}" for number in (1, 2, 5) for suffix in ("zip", "json")}
    indexes = sorted(path.name.partition("-")[0] for path in (data_dir / "indexes").iterdir())
    assert indexes == ["faces", "near copies", "zip", "zip", "zip"]

    files = {"model.onnx", "detector.json", "checkpoint.keras"}
    assert all(pull(version, tmp_path / version) == files for version in "125")
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@production")
    assert model.predict(pd.DataFrame({"image": [jpeg(1)]}))["label"][0] in ("real", "fake")
    draw_portrait(1).save(tmp_path / "face.jpg")
    assert main(["predict", str(tmp_path / "face.jpg")]) == 0
    assert main(["rollback", "--reason", "misjudges night shots", "--yes"]) == 0
    assert "Version 1 is back in production" in capsys.readouterr().out
    assert main(["predict", str(tmp_path / "face.jpg")]) == 0
    assert {third, fourth}.isdisjoint(list_datasets(data_dir))


@pytest.mark.slow
def test_of_a_version_whose_files_went_the_history_stays_and_all_else_says_so(years, tmp_path, capsys):
    data_dir, _ = years
    clean(open_store(data_dir), keep=1)
    client = mlflow.MlflowClient()
    run = find_run("3")
    assert run.data.metrics == {"test/auc": 0.9}
    assert read_version(NAME, "3").tags["decision"] == "promoted"
    assert time.strptime(run.data.tags["files_removed"], "%Y-%m-%d %H:%M:%S %z")
    assert client.list_artifacts(run.info.run_id, "checkpoint") == []
    message = "Received: version 3 of deepfake-detector, whose files were removed 2"
    with pytest.raises(ModelError, match=message):
        pull("3", tmp_path / "pulled")
    with pytest.raises(ModelError, match=message):
        production.promote_by_hand(NAME, "3", "why not")
    assert production.find_production(NAME) == "2"
    (tmp_path / "faces" / "real").mkdir(parents=True)
    (tmp_path / "faces" / "fake").mkdir()
    for label in ("real", "fake"):
        (tmp_path / "faces" / label / "1.jpg").write_bytes(jpeg(1))
    assert main(["compare", "2", "3", "--split", str(tmp_path / "faces")]) == 2
    assert message in capsys.readouterr().err
    assert main(["versions"]) == 0
    assert capsys.readouterr().out.count("model files removed 2") == 2


@pytest.mark.slow
def test_of_candidates_that_did_not_win_no_checkpoint_stays(years):
    data_dir, _ = years
    losers = [
        run
        for run in mlflow.MlflowClient().search_runs([find_run("1").info.experiment_id])
        if run.info.run_name == "loser"
    ]
    assert len(losers) == 5
    gone = clean(open_store(data_dir), keep=9)
    assert [(one.what, one.why) for one in gone] == [
        (f"checkpoint of run loser ({run.info.run_id[:8]})", "a candidate that did not win") for run in losers[::-1]
    ]
    assert all(mlflow.MlflowClient().list_artifacts(run.info.run_id, "checkpoint") == [] for run in losers)
    assert len(list_datasets(data_dir)) == 5


@pytest.mark.slow
def test_a_dry_run_removes_nothing_and_says_what_the_real_one_frees(years, monkeypatch, capsys):
    data_dir, versions = years
    before = list_sizes(data_dir.parent)
    command = ["gc", "--data-dir", str(data_dir), "--keep", "1"]
    assert main([*command, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert list_sizes(data_dir.parent) == before | {str(data_dir / ".lock"): 0}
    assert find_run("3").data.tags.get("files_removed") is None
    for words in (
        f"data set {versions[2]}",
        "archive owner/faces version 3",
        "model files of deepfake-detector version 4",
    ):
        assert words in planned

    monkeypatch.setattr("builtins.input", lambda question: print(question) or "n")
    assert main(command) == 1
    assert list_sizes(data_dir.parent).keys() == before.keys() | {str(data_dir / ".lock")}
    expected = clean(open_store(data_dir), keep=1, dry_run=True)
    total = f"{len(expected)} items, {sum(removal.bytes for removal in expected) / 1e6:,.1f} MB"
    assert f"Remove {total}? [y/N]" in capsys.readouterr().out
    assert f"{total}; none was removed." in planned

    on_disk = measure_disk(data_dir.parent)
    assert on_disk < sum(before.values())  # data sets share images
    assert main([*command, "--yes"]) == 0
    assert f"Removed: {total}." in capsys.readouterr().out
    after = list_sizes(data_dir.parent)
    assert on_disk - measure_disk(data_dir.parent) == sum(removal.bytes for removal in expected)
    assert main([*command, "--yes"]) == 0
    assert capsys.readouterr().out == "Nothing to remove.\n"
    assert list_sizes(data_dir.parent) == after


def test_what_a_killed_call_left_half_done_goes_with_the_next(years, tmp_path):
    data_dir, (_, _, third, fourth, _) = years
    tag_version(NAME, "3", {names.FILES_REMOVED: "2030-01-01 00:00:00 +0000"})
    (data_dir / "splits" / third).rename(data_dir / "splits" / f".{third}.partial")
    shutil.rmtree(data_dir / "splits" / f".{third}.partial" / "train")
    (data_dir / "archives" / SOURCE / "4.zip").unlink()
    shutil.rmtree(data_dir / "splits" / fourth)
    with pytest.raises(ModelError, match="were removed 2030-01-01"):
        pull("3", tmp_path / "pulled")
    clean(open_store(data_dir), keep=1)
    assert len(list_datasets(data_dir)) == len(list((data_dir / "batches").iterdir())) == 3
    assert not (data_dir / "archives" / SOURCE / "4.json").exists()
    assert "files_removed" in find_run("3").data.tags
    assert clean(open_store(data_dir), keep=1) == []


def test_unfinished_files_go_when_nobody_writes_to_them_any_more(years):
    data_dir, versions = years
    archives, kept = data_dir / "archives" / SOURCE, data_dir / "splits" / versions[4]
    abandoned = [archives / ".5.json.77", kept / ".report.html.77", data_dir / "splits" / ".memory.parquet.77"]
    written = [archives / ".6.json.77", data_dir / "batches" / f"{versions[4]}-32px" / ".train.npy.77"]
    for path in (*abandoned, *written, archives / "4.zip.partial", archives / "6.zip.partial"):
        path.write_bytes(b"half")
    shards = data_dir / "indexes" / ".faces-v4-0123456789abcdef.partial"
    shards.mkdir()
    (shards / "0000000000-0000010000.parquet").write_bytes(b"rows")
    for path in abandoned:
        os.utime(path, (time.time() - 2 * DAY,) * 2)
    gone = {path for removal in clean(open_store(data_dir), keep=1) for path in removal.paths}
    assert {*abandoned, shards, archives / "4.zip.partial"} <= gone
    assert all(path.exists() for path in (*written, archives / "6.zip.partial"))
    assert not any(path.exists() for path in gone)


@pytest.mark.usefixtures("years")
def test_shards_that_nodes_left_at_the_url_go_a_day_after_the_last(s3_url, monkeypatch):
    store, index = open_store(s3_url), "faces-v4-0123456789abcdef"
    others = [store.indexes() / "notes.txt", store.indexes() / ".notes" / "notes.txt"]
    for path in (store.shards(index) / "0-1.parquet", store.shards(index) / "1-2.parquet", *others):
        store.write(path, b"rows")
    assert not any(removal.shards for removal in clean(store, keep=1))
    monkeypatch.setattr("deepfake_core.data.shards.MAX_WRITING_SECONDS", -1)
    (planned,) = clean(store, keep=1, dry_run=True)
    assert (planned.what, planned.bytes) == (f"shards of {index} at {s3_url}", 0)
    assert len(store.list_names(store.shards(index))) == 2
    assert clean(store, keep=1, agreed=[planned]) == [planned]
    assert store.list_names(store.indexes()) == [".notes", "notes.txt"]


def test_what_a_run_is_at_stays_until_it_must_have_been_killed(years):
    data_dir, versions = years
    client = mlflow.MlflowClient()
    parent = find_run("3").data.tags["mlflow.parentRunId"]
    client.update_run(parent, "RUNNING")
    clean(open_store(data_dir), keep=1)
    assert list_datasets(data_dir) == {versions[number] for number in (0, 1, 2, 4)}
    assert client.list_artifacts(find_run("3").info.run_id, "checkpoint")
    assert "files_removed" not in read_version(NAME, "3").tags

    experiment = find_run("3").info.experiment_id
    client.update_run(parent, "FAILED")
    tags = {"dataset_version": versions[2]}
    client.create_run(experiment, start_time=int((time.time() - 15 * DAY) * 1000), tags=tags)
    clean(open_store(data_dir), keep=1)
    assert versions[2] not in list_datasets(data_dir)


def test_a_version_that_another_name_or_alias_needs_keeps_its_files(years, tmp_path):
    data_dir, versions = years
    client = mlflow.MlflowClient()
    client.copy_model_version(f"models:/{NAME}/3", "other")
    client.set_registered_model_alias("other", "champion", "1")
    planned = model_files.find_unneeded_files(NAME, keep=1)
    (fourth,) = [files for files in planned if files.versions]
    assert fourth.versions == ("4",)
    client.set_registered_model_alias(NAME, "canary", "4")  # between planning and removing
    assert not model_files.remove_model_files(NAME, fourth)
    clean(open_store(data_dir), keep=1)
    assert pull("3", tmp_path / "3") == pull("4", tmp_path / "4")
    assert list_datasets(data_dir) == set(versions)


def test_the_newest_data_set_is_the_one_last_asked_for(years):
    data_dir, versions = years
    assert prepare(data_dir, 3).version == versions[2]
    clean(open_store(data_dir), keep=1)
    assert list_datasets(data_dir) == {versions[number] for number in (0, 1, 2)}


def test_nothing_goes_where_it_cannot_be_told_what_production_needs(years, caplog):
    data_dir, _ = years
    client = mlflow.MlflowClient()
    client.delete_model_version_tag(NAME, "1", "dataset_version")
    with pytest.raises(ModelError, match="version 1 of deepfake-detector without the tag dataset_version"):
        clean(open_store(data_dir), keep=1)
    client.delete_registered_model(NAME)
    with caplog.at_level(logging.WARNING):
        assert clean(open_store(data_dir), keep=1) == []
    assert "what production needs is unknown: data sets and archives stay" in caplog.text
    assert len(list_datasets(data_dir)) == 5


def reject(feedback: Feedback, image: bytes, days_ago: int) -> str:
    """Report an image, and leave behind a decision of days ago."""
    sha256 = feedback.add(
        image, GivenVerdict(label="real", probability=0.1, sure=True, version="1"), "fake", "x"
    ).sha256
    time = datetime.now(UTC) - timedelta(days=days_ago)
    decision = Decision(decision="rejected", by="someone", why="it is real", time=time)
    (Path(feedback.address) / sha256 / name_record(decision)).write_text(decision.model_dump_json())
    return sha256


@pytest.mark.usefixtures("tracking")
def test_of_a_report_that_was_rejected_long_ago_hash_and_decision_stay(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    feedback = open_feedback(tmp_path / "data" / "feedback")
    old, new = reject(feedback, jpeg(1), 31), reject(feedback, jpeg(2), 29)
    confirmed = reject(feedback, jpeg(3), 31)
    feedback.confirm(confirmed, "fake", by="someone")
    (removed,) = clean(open_store(tmp_path / "data"))
    assert (removed.what, removed.bytes) == (f"report {old[:12]}", len(jpeg(1)))
    assert (feedback.read(old).size, feedback.read(old).count) == (0, 0)
    assert feedback.read(old).decisions[0].why == "it is real"
    assert feedback.read_image(new) == jpeg(2)
    assert feedback.read_image(confirmed) == jpeg(3)
    assert feedback.add(jpeg(1), feedback.read(new).reports[0].verdict, "fake").status == "rejected"
    assert clean(open_store(tmp_path / "data")) == []

    assert main(["gc", "--data-dir", "data", "--keep-rejected-days", "29", "--yes"]) == 0
    assert f"report {new[:12]}" in capsys.readouterr().out
    assert main(["gc", "--data-dir", "data", "--keep-rejected-days", "-1"]) == 2
    assert "keep_rejected_days must be from 0 to 36,500. Received: -1" in capsys.readouterr().err


@pytest.mark.usefixtures("tracking")
def test_rejected_reports_elsewhere_are_removed_too_and_those_of_others_are_refused(tmp_path):
    (tmp_path / "data").mkdir()
    feedback = open_feedback(tmp_path / "reports")
    sha256 = reject(feedback, jpeg(1), 1)
    agreed = clean(open_store(tmp_path / "data"), dry_run=True, feedback="reports", keep_rejected_days=1)
    assert [one.rejected for one in agreed] == [sha256]
    feedback.withdraw(sha256, by="someone")
    assert clean(open_store(tmp_path / "data"), agreed=agreed, feedback="reports", keep_rejected_days=1) == []
    assert not feedback.expire(sha256)
    assert feedback.read_image(sha256) == jpeg(1)
    (tmp_path / "data" / "feedback").mkdir()
    (tmp_path / "data" / "feedback" / "holiday.jpg").touch()
    with pytest.raises(ConfigurationError, match=r"holds holiday\.jpg"):
        clean(open_store(tmp_path / "data"))


@pytest.mark.process
def test_a_folder_that_a_run_holds_is_refused(years):
    data_dir, _ = years
    before = list_sizes(data_dir)
    with (
        hold_data(data_dir, "flow run busy-bee"),
        pytest.raises(LockedError, match=r"busy-bee.*Wait until it ends, or stop that process"),
    ):
        clean(open_store(data_dir), keep=1)
    assert list_sizes(data_dir).items() >= before.items()


def test_wrong_options_are_refused(years, capsys):
    data_dir, _ = years
    with pytest.raises(ConfigurationError, match=r"At least 1 of each must be kept.*Received: 0"):
        clean(open_store(data_dir), keep=0)
    assert main(["gc", "--data-dir", str(data_dir / "typo")]) == 2
    assert "must be the data folder of a retrain" in capsys.readouterr().err
    assert not (data_dir / "typo").exists()
    assert build_parser().parse_args(["gc"]).keep == DEFAULT_KEEP


@pytest.mark.usefixtures("years")
def test_model_files_out_of_reach_are_said():
    stored_by_a_server = "mlflow-artifacts:/1"  # whose database is asked directly
    with (
        pytest.raises(
            ServiceError, match=r"mlflow-artifacts:/1.*Set MLFLOW_TRACKING_URI as on the machine that trains"
        ),
        model_files.open_artifacts(stored_by_a_server),
    ):
        pass


@pytest.mark.usefixtures("prefect_api")
def test_the_same_as_a_flow(years):
    from flows.clean import clean as clean_flow  # Prefect takes seconds to import

    data_dir, versions = years
    planned = housekeeping.clean(open_store(data_dir), dry_run=True)
    done = f"{len(planned)} items, {sum(removal.bytes for removal in planned) / 1e6:,.1f} MB"
    assert clean_flow(data_dir=str(data_dir), dry_run=True) == f"{done}, would be removed"
    assert len(list_datasets(data_dir)) == 5
    assert clean_flow(2, data_dir=str(data_dir)).endswith("removed")
    assert list_datasets(data_dir) == {versions[number] for number in (0, 1, 3, 4)}
    with get_client(sync_client=True) as client:
        artifact = max(
            (one for one in client.read_artifacts(limit=200) if one.key == "clean"), key=lambda one: one.created
        )
    assert any(row["what"] == f"data set {versions[2]}" and row["MB"] >= 0 for row in json.loads(artifact.data))
