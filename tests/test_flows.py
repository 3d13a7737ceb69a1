"""Whole flows, with a real temporary Prefect server and a real MLflow."""

import logging
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.sorting import LogSort
from prefect.deployments.runner import RunnerDeployment
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_DATABASE_CONNECTION_URL

from deepfake_core.config import DataParameters, PromotionParameters, Source, TrainingParameters
from deepfake_core.data.dataset import open_dataset
from deepfake_core.errors import ArchiveError, ConfigurationError, DatasetError, LockedError, ServiceError, SourceError
from deepfake_core.feedback.records import GivenVerdict
from deepfake_core.feedback.reports import open_feedback
from deepfake_core.registry import fingerprint, names, production, runs, versions
from deepfake_core.registry.windows import read_reference
from deepfake_core.storage.store import open_store
from deepfake_core.training.devices import describe_hardware, sees_only_cpus
from deployments.deploy import apply_limit
from flows.check_sources import check_sources
from flows.command_line import read_settings
from flows.leave_one_out import leave_one_out
from flows.prepare import prepare
from flows.retrain import retrain
from flows.train import train
from tasks.data import download
from tasks.model import GPU_POOL
from tasks.remote import GPU_LIMIT, hold_gpu
from tests.builders import (
    FACES,
    NAME,
    ROOT,
    faces,
    forbid,
    free_port,
    hold_data,
    jpeg,
    needs_faces,
    recode,
    wait_until,
    write_zip,
)

NO_FLOORS = PromotionParameters(min_precision=0, min_recall=0, max_false_alarm_rate=1)
TINY = TrainingParameters(candidates=("cnn",), image_size=32, epochs=1)

pytestmark = pytest.mark.usefixtures("prefect_api")


def parameters(folder: Path, *sources: Source) -> DataParameters:
    return DataParameters(sources=sources, data_dir=str(folder / "data"))


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make decoding, copying and downloading fail."""
    forbid(
        monkeypatch,
        "deepfake_core.data.index.decode",
        "deepfake_core.data.images.open_image",
        "deepfake_core.data.publishing._copy_images",
        "deepfake_core.data.kaggle._log_in",
    )


@pytest.fixture
def two_zips(tracking):
    members = faces(40)
    first = write_zip(tracking / "first (1).zip", members)
    second = write_zip(tracking / "second.zip", {name: recode(data) for name, data in members.items()})
    return Source(name=str(first)), Source(name=str(second))


@pytest.mark.sweep
def test_retrain_twice_does_the_work_once_and_compares_with_production(tracking, two_zips, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    with monkeypatch.context() as committed, caplog.at_level(logging.INFO, "deepfake_core"):
        committed.setattr(fingerprint, "read_git_commit", lambda: "c" * 40)  # as on a worker
        dataset, version = retrain(parameters(tracking, *two_zips), TINY, promotion=NO_FLOORS)
        assert version == "1"
        assert open_dataset(dataset).description["counts"]["reasons"] == {"copy": 80, "kept": 80}
        assert production.find_production(NAME) == "1"
        assert "160 usable images: 80 copy, 80 kept" in caplog.text

        forbid_work(committed)
        same = retrain(parameters(tracking, *two_zips), TINY, promotion=NO_FLOORS, return_state=True)
    assert same.is_completed()
    assert same.message == "Nothing changed since version 1 (promoted); `force` trains anyway."
    assert same.result() == (dataset, "1")
    check_screen(run_command(parameters(tracking, *two_zips), "--force"))
    assert [one.version for one in versions.list_versions(NAME)] == ["2", "1"]
    second = versions.read_version(NAME, "2")
    assert second.tags["compared_with"] == "1"
    ours, theirs = re.search(r"AUC ([\d.]+), production's ([\d.]+) on", second.tags["reasons"]).groups()
    assert float(ours) == pytest.approx(second.metrics["test/auc"], abs=1e-4)
    assert float(theirs) == pytest.approx(versions.read_version(NAME, "1").metrics["test/auc"], abs=1e-4)
    promoted = second.tags["decision"] == "promoted"
    assert second.metrics["test/auc"] > versions.read_version(NAME, "1").metrics["test/auc"] or not promoted
    assert production.find_production(NAME) == ("2" if promoted else "1")

    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(limit=200)
    assert {"progress", "markdown", "table"} <= {artifact.type for artifact in artifacts}
    (decision,) = [artifact for artifact in artifacts if artifact.key == "promotion" and "version 2" in artifact.data]
    assert "Version 1 was in production." in decision.data
    keys = {artifact.key for artifact in artifacts}
    assert {"train-cnn", "merge", "data-report"} <= keys
    # A busy server holds no work up: what it can't show in time is not shown, and the log says so.
    assert "index-first-1" in keys or "can't show how far 'index first _1_' is" in caplog.text
    (report, *_) = [artifact for artifact in artifacts if artifact.key == "data-report"]
    assert (Path(dataset) / "report.html").as_uri() in report.data

    logged = check_run(second.run_id)
    assert logged["params"]["architecture"] == "cnn"
    reference = read_reference(second)
    assert reference["face"].isna().sum() == len(open_dataset(dataset).split("test"))
    assert reference["probability"].notna().all()


@pytest.mark.slow
@pytest.mark.sweep
def test_confirmed_reports_reach_the_training_and_the_regression_set(tracking, two_zips):
    data = parameters(tracking, two_zips[0])
    feedback = open_feedback(Path(data.data_dir) / "feedback")
    verdict = GivenVerdict(label="fake", probability=0.8, sure=True, version="deepfake-detector version 1")
    sent = [feedback.add(jpeg(50_000 + number), verdict, "real").sha256 for number in range(40)]
    for name in sent[:-1]:
        feedback.confirm(name, "real", by="a reviewer")
    address, number = retrain(data, TINY, promotion=NO_FLOORS)
    dataset, version = open_dataset(address), versions.read_version(NAME, number)
    kept = dataset.manifest[dataset.manifest["kept"]].set_index("sha256")
    assert set(kept.index[kept["source"] == "feedback"]) == set(sent[:-1])
    held = dataset.split("regression")
    assert set(held["source"]) == {"feedback"}
    assert "feedback" in set(dataset.split("train")["source"])
    assert version.metrics["regression/images"] == len(held) > 0
    assert version.reasons[-1] == "met: no production model yet"
    table = runs.read_text(version.run_id, "evaluation/regression.csv").splitlines()
    assert len(table) == len(held) + 1
    page = runs.read_text(version.run_id, names.REPORT)
    assert all(f"<code>{name[:12]}</code>" in page for name in held["sha256"])

    feedback.withdraw(sent[0], by="another")
    rows = open_dataset(prepare(data.model_copy(update={"feedback": "none"}))).manifest
    assert "feedback" not in set(rows["source"])
    now = open_dataset(prepare(data)).manifest.query("kept").set_index("sha256")
    assert sent[0] not in now.index
    assert (now["split"] == kept["split"].reindex(now.index)).all()


def run_command(data: DataParameters, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m flows.retrain` as from a shell, on the same Prefect server as the tests."""
    values = {"data": data, "training": TINY, "promotion": NO_FLOORS}
    file = Path("retrain.yaml")
    file.write_text(yaml.safe_dump({name: one.model_dump(mode="json") for name, one in values.items()}))
    hidden = {"TF_CPP_MIN_LOG_LEVEL", "NO_COLOR", "FORCE_COLOR"}
    return subprocess.run(
        [sys.executable, "-m", "flows.retrain", "--config", file.absolute(), *flags],
        env={
            **{name: value for name, value in os.environ.items() if name not in hidden},
            "PREFECT_API_URL": PREFECT_API_URL.value(),
        },
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def check_screen(ended: subprocess.CompletedProcess[str]) -> None:
    """Assert that a retrain printed lines of our own only, each known by how it begins, and no colour."""
    assert ended.returncode == 0, ended.stderr
    assert "\x1b" not in ended.stdout + ended.stderr
    own = re.compile(
        r"\d\d:\d\d:\d\d  ((first _1_|second|data set \w+|cnn( epoch 1/1)?|train|val|test|deepfake-detector): "
        r"|(data set|report of data set) \w+|deepfake-detector version 2: |hardware: |\d+ (pictures|usable images): "
        r"|calibrated on |at most \d+ of the "
        r"|WARNING deepfake_core.training.calibration: The \d+ real validation images )"
    )
    assert [line for line in ended.stderr.splitlines() if not own.match(line)] == []
    assert "cnn epoch 1/1: loss" in ended.stderr
    assert "deepfake-detector version 2: " in ended.stderr
    assert "validation images of second are too few to keep the rate of 0.1" in ended.stderr
    tables, _, steps = ended.stdout.partition("\nTo look further:\n")
    assert "Files found, and what became of them" in tables
    assert all(line.startswith("  ") for line in steps.splitlines())


def check_run(run_id: str) -> dict:
    """Assert that a candidate's run and its parent hold all that a retrain logs; return the run's values."""
    import mlflow

    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    for name in ("accuracy", "precision", "recall", "f1", "auc", "average_precision", "true_positives"):
        assert f"test/{name}" in run.data.metrics
    assert [metric.step for metric in client.get_metric_history(run_id, "val_loss")] == list(
        range(1, len(client.get_metric_history(run_id, "loss")) + 1)
    )
    artifacts = {
        file.path
        for folder in ("", "figures", "checkpoint", "evaluation", "probe")
        for file in client.list_artifacts(run_id, folder)
    }
    assert {"model_summary.txt", "report.html", "checkpoint/checkpoint.keras", "probe/scores.json"} <= artifacts
    figures = {"history", "confusion_matrix", "roc_and_precision_recall", "scores", "reliability", "robustness"}
    assert {f"figures/{name}.png" for name in {*figures, "worst_mistakes", "typical_images"}} <= artifacts
    assert {f"evaluation/{name}.csv" for name in ("metrics", "scores", "robustness", "cross_sources")} <= artifacts
    for name in ("test/auc_low", "test/auc_high", "test/ece", "file_facts/auc", "latency_ms", "size_mb"):
        assert name in run.data.metrics
    assert 0 < run.data.metrics["system/system_memory_usage_percentage"] <= 100
    assert float(run.data.params["temperature"]) > 0
    (version,) = client.search_model_versions(f"run_id='{run_id}'")
    assert "test images**, with 95 % intervals" in version.description

    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    parent_artifacts = {
        file.path for folder in ("figures", "dataset") for file in client.list_artifacts(parent.info.run_id, folder)
    }
    assert parent_artifacts == {
        "dataset/dataset.json",
        "dataset/manifest.parquet",
        "dataset/report.html",
        "figures/classes_test.png",
        "figures/classes_train.png",
        "figures/training_batch.png",
    }
    assert parent.data.tags["hardware"] == describe_hardware()
    assert parent.data.params["training.seed"] == "0"
    assert parent.data.params["data.test_fraction"] == "0.15"
    assert "@" in parent.data.params["data.sources"]
    assert parent.data.tags["mlflow.source.git.commit"] == fingerprint.read_git_commit()
    (dataset,) = parent.inputs.dataset_inputs
    assert dataset.dataset.digest == parent.data.tags["dataset_version"]
    return {"params": run.data.params, "metrics": run.data.metrics}


@pytest.mark.process
@needs_faces
@pytest.mark.slow
@pytest.mark.sweep
def test_retrain_on_real_images(tracking):
    subprocess.run([sys.executable, FACES / "build_archives.py", tracking / "kaggle", "--per-class", "40"], check=True)
    sources = [
        source.model_copy(update={"name": f"{tracking}/kaggle/{source.short_name}.zip"})
        for source in DataParameters().sources
    ]
    short = TrainingParameters(epochs=2, image_size=64)
    dataset, version = retrain(parameters(tracking, *sources), short, promotion=NO_FLOORS)
    counts = open_dataset(dataset).description["counts"]
    assert counts["reasons"] == {"duplicate": 160, "kept": 160, "not_an_image": 3}
    assert counts["sources"]["real-vs-fake-faces"] == {"files": 80, "duplicate": 80}
    assert production.find_production(NAME) == version == "1"
    metrics = check_run(versions.read_version(NAME, version).run_id)["metrics"]
    assert "test/140k-real-and-fake-faces/auc" in metrics
    assert "test/real-and-fake-face-detection/auc" in metrics


@pytest.mark.sweep
def test_a_retrain_that_failed_late_continues_with_what_was_trained(tracking, two_zips, monkeypatch):
    data = parameters(tracking, two_zips[0])
    with monkeypatch.context() as broken:
        forbid(broken, "deepfake_core.registry.challenge.register_detector")
        with pytest.raises(AssertionError, match="register_detector must not be called"):
            retrain(data, TINY, promotion=NO_FLOORS)
    (folder,) = (Path(data.data_dir) / "training").iterdir()
    assert "-cnn-" in folder.name
    with monkeypatch.context() as untrained:
        forbid(untrained, "deepfake_core.training.fit._fit")
        _, version = retrain(data, TINY, promotion=PromotionParameters(min_precision=1, min_recall=1))
    run = check_run(versions.read_version(NAME, version).run_id)
    assert {"val/auc", "val_loss", "seconds"} <= set(run["metrics"])
    assert not folder.exists()
    assert versions.read_version(NAME, version).tags["decision"] == "not promoted"
    assert production.find_production(NAME) is None


@pytest.mark.sweep
@pytest.mark.slow
def test_leave_one_out_tests_on_what_it_never_saw_and_registers_nothing(tracking):
    zips = [write_zip(tracking / f"{name}.zip", faces(40, start)) for name, start in (("one", 0), ("two", 500))]
    sources = [Source(name=str(path)) for path in zips]
    found = leave_one_out(parameters(tracking, *sources), TINY)
    assert set(found) == {"one", "two"}
    for source, (seen, own) in found.items():
        assert set(seen.sources) == {"one", "two"} - {source}
        assert own.confusion.total == 80
    assert versions.list_versions(NAME) == []


def test_bad_sources_stop_the_run_and_leave_nothing_half_written(tracking, two_zips):
    words = tracking / "words.zip"
    words.write_bytes(b"<html>not a zip</html>")
    with pytest.raises(ArchiveError, match=r"whole zip file.*words.zip, which begins with b'<html>no'"):
        retrain(parameters(tracking, Source(name=str(words))), TINY, promotion=NO_FLOORS)
    damaged = tracking / "damaged.zip"
    content = bytearray((tracking / "first (1).zip").read_bytes())
    content[2000] ^= 0xFF
    damaged.write_bytes(content)
    with pytest.raises(ArchiveError, match="must match its checksum"):
        retrain(parameters(tracking, two_zips[1], Source(name=str(damaged))), TINY, promotion=NO_FLOORS)
    one_class = write_zip(tracking / "one.zip", {k: v for k, v in faces(30).items() if k.startswith("real")})
    with pytest.raises(DatasetError, match="no fake image"):
        retrain(parameters(tracking, Source(name=str(one_class))), TINY, promotion=NO_FLOORS)
    assert not (tracking / "data" / "splits").exists()
    assert versions.list_versions(NAME) == []


@pytest.fixture
def kaggle(kaggle, monkeypatch):
    """Let retries of a download follow at once."""
    monkeypatch.setattr("flows.prepare.download", download.with_options(retry_delay_seconds=0))
    return kaggle


def test_prepare_downloads_the_three_data_sets_and_retries_what_can_heal(tracking, kaggle, caplog):
    kaggle.add_the_three(faces(30), faces(30, start=100))
    kaggle.statuses = [503]
    data = DataParameters(data_dir=str(tracking / "data"))
    with caplog.at_level(logging.INFO, "deepfake_core"):
        dataset = open_dataset(prepare(data))
    assert dataset.description["counts"]["reasons"] == {"duplicate": 120, "kept": 120, "not_an_image": 1}
    assert [source["kaggle_version"] for source in dataset.description["sources"]] == [1, 1, 1]
    assert len(kaggle.downloads) == 3
    assert "60 labels agree with the csv files" in caplog.text

    assert prepare(data) == str(dataset.path)
    assert len(kaggle.downloads) == 3


def test_each_shard_of_a_large_archive_is_a_task(tracking, monkeypatch):
    monkeypatch.setattr("deepfake_core.data.index.SHARD_SIZE", 25)
    path, other = (write_zip(tracking / name, faces(count)) for name, count in (("large.zip", 30), ("small.zip", 10)))
    state = prepare(parameters(tracking, Source(name=str(path)), Source(name=str(other))), return_state=True)
    wanted = FlowRunFilter(id={"any_": [state.state_details.flow_run_id]})
    with get_client(sync_client=True) as client:
        named = {run.name for run in client.read_task_runs(flow_run_filter=wanted)}
    assert {name for name in named if name.startswith("index")} == {
        *("index shard large 0-25", "index shard large 25-50", "index shard large 50-60"),
        *("index large", "index small"),
    }


@pytest.mark.slow
def test_no_secret_is_in_what_failed_runs_leave(tracking, kaggle, monkeypatch, capfd):
    """Neither in states, logs, the server's database, files, nor the screen."""
    key = "5ecre7f0a1b2c3d4e5"
    source = Source(name="owner/faces")
    kaggle.add(source.name, write_zip(tracking / "faces.zip", faces(10)).read_bytes())
    data = parameters(tracking, source)
    marked = logging.getLogger("deepfake_core")

    def fail(match: str) -> None:
        state = prepare(data, return_state=True)
        assert re.search(match, state.message), state.message
        marked.warning("seen by the server: %s", f"https://storage.invalid/a?X-Goog-Signature={kaggle.signature}")

    monkeypatch.setattr(kaggle, "storage", "storage.invalid")
    fail(r"DownloadError: The connection to Kaggle failed.*with url: .*\?\[removed\]")
    for token in (f"“{key}”", f"{key}\n{key}", f"{key}\r\n", f'{{"key": "{key}"}}'):
        monkeypatch.setenv("KAGGLE_API_TOKEN", token)
        fail("CredentialsError: Kaggle's credentials must be|CredentialsError: Kaggle needs credentials")
    database = Path(PREFECT_SERVER_DATABASE_CONNECTION_URL.value().partition(":///")[2])
    with get_client(sync_client=True) as client:  # one page of logs, the newest first
        newest = partial(client.read_logs, sort=LogSort.TIMESTAMP_DESC)
        wait_until(lambda: any("number 1 is LEFT DOUBLE" in log.message for log in newest()))
    kept = [path for folder in (database.parent, tracking) for path in folder.rglob("*") if path.is_file()]
    told = [path.read_bytes() for path in kept] + [text.encode() for text in capfd.readouterr()]
    assert any(b"number 1 is LEFT DOUBLE" in text for text in told[: len(kept)])
    assert not [
        secret for secret in (key, kaggle.token, kaggle.signature) if any(secret.encode() in text for text in told)
    ]


def test_news_at_kaggle_start_one_retrain(tracking, kaggle):
    source = Source(name="owner/faces")
    kaggle.add(source.name, write_zip(tracking / "faces.zip", faces(10)).read_bytes())
    data = DataParameters(sources=(source, Source(name=str(tracking / "local.zip"))), data_dir=str(tracking / "data"))
    RunnerDeployment.from_flow(retrain, "manual").apply()

    def check() -> tuple[dict[str, int], str]:
        state = check_sources(data, return_state=True)
        return state.result(), state.message

    found, message = check()
    assert found == {"owner/faces": 1}
    with get_client(sync_client=True) as client:
        (started,) = [run for run in client.read_flow_runs() if run.name in message]
        assert started.state.is_scheduled()
        assert started.parameters["data"]["sources"][0]["name"] == "owner/faces"
        assert check() == (found, message)  # the retrain has not begun yet: no second one
        assert not kaggle.downloads
        download(source, open_store(data.data_dir))
        assert check() == ({}, f"Nothing new: {data.data_dir} has the versions of 2 sources.")
        client.delete_flow_run(started.id)
    with pytest.raises(ConfigurationError, match="train/nowhere"):
        check_sources(data, "train/nowhere")


def test_what_a_person_must_act_on_is_not_retried(tracking, kaggle):
    with pytest.raises(SourceError, match=r"owner/nothing \(404\)|data set owner/nothing"):
        prepare(DataParameters(sources=(Source(name="owner/nothing"),), data_dir=str(tracking / "data")))
    assert len([path for _, path, _ in kaggle.requests if path.endswith("GetDataset")]) == 1


def test_mlflow_and_deployments_are_checked_before_any_work(tracking, two_zips, monkeypatch):
    with pytest.raises(ConfigurationError, match=r"'train/nowhere'.*make deploy"):
        retrain(parameters(tracking, two_zips[0]), TINY, promotion=NO_FLOORS, train_on="train/nowhere")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ServiceError, match="must answer at the tracking URI"):
        retrain(parameters(tracking, two_zips[0]), TINY, promotion=NO_FLOORS)
    assert not (tracking / "data").exists()


@pytest.mark.skipif(not sees_only_cpus(), reason="a GPU is here")
def test_a_gpu_pool_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=GPU_POOL, type="process"), overwrite=True)
        deployment = RunnerDeployment.from_flow(train, "gpu", work_pool_name=GPU_POOL).apply()
        started = client.create_flow_run_from_deployment(deployment, parameters={"dataset": "nowhere"})
        with pytest.raises(ConfigurationError, match=r"'gpu' must see a GPU\. Received: no GPU"):
            run_flow(train, flow_run=client.read_flow_run(started.id), parameters={"dataset": "nowhere"})


def test_two_trainings_never_share_a_card_and_train_at_once_without_the_limit():
    order: list[str] = []

    def hold(name: str, meanwhile: float) -> None:
        with hold_gpu():
            order.append(f"{name} begins")
            time.sleep(meanwhile)
            order.append(f"{name} ends")

    hold("alone", 0)  # there is no limit yet
    with get_client(sync_client=True) as client, ThreadPoolExecutor() as pool:
        for _ in range(2):
            apply_limit(client, GPU_LIMIT)
        try:
            first = pool.submit(hold, "first", 3)
            wait_until(lambda: "first begins" in order)
            pool.submit(hold, "second", 0).result()
            first.result()
        finally:
            client.delete_global_concurrency_limit_by_name(GPU_LIMIT)
    assert order == [f"{name} {what}" for name in ("alone", "first", "second") for what in ("begins", "ends")]


@pytest.mark.process
def test_two_retrains_do_not_share_a_data_folder(tracking, two_zips):
    with (
        hold_data(tracking / "data", "flow run other") as other,
        pytest.raises(LockedError, match=f"flow run other.*{other.pid}"),
    ):
        retrain(parameters(tracking, two_zips[0]), TINY, promotion=NO_FLOORS)


def test_flags_beat_the_file_and_the_file_beats_defaults(tmp_path):
    file = tmp_path / "retrain.yaml"
    file.write_text("training: {epochs: 7, seed: 3, augmentation: {zoom: 0.3}}\npromotion: {min_recall: 0.5}\n")
    settings = read_settings(["--config", str(file), "--training.epochs", "9", "--training.augmentation.rotation", "5"])
    assert settings.training.epochs == 9
    assert settings.training.seed == 3
    assert settings.training.augmentation.zoom == 0.3
    assert settings.training.augmentation.rotation == 5
    assert settings.training.patience == TrainingParameters().patience
    assert settings.promotion.min_recall == 0.5
    assert settings.data == DataParameters()


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("training: {epoch: 3}", [], "training.epoch: there is no such parameter"),
        ("trainings: {}", [], "Received: ['trainings']"),
        ("training: {epochs: 0}", [], "training.epochs: Input should be greater than or equal to 1. Received: 0"),
        ("- 1", [], "must be a mapping"),
        ("training: [", [], "readable YAML file"),
        ("training: {epochs: 3}", ["--training.epochs", "none"], "training.epochs"),
        ("data: {test_fraction: 0.9}", [], "test_fraction + val_fraction must be less than 1"),
        ("data: {sources: [{name: ciplab}]}", [], "Kaggle slug of the form owner/name"),
        ("data: {sources: [{name: ./x.zip}]}", ["--sample"], "--sample draws its own sources"),
    ],
)
def test_wrong_parameters_are_named(tmp_path, text, flags, message):
    file = tmp_path / "retrain.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        read_settings(["--config", str(file), *flags])
    assert message in str(caught.value)


def test_an_unknown_flag_is_refused_before_anything_runs(capsys):
    with pytest.raises(SystemExit) as caught:
        read_settings(["--training.epoch", "3"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --training.epoch" in capsys.readouterr().err


def test_environment_variables_are_no_parameters(monkeypatch):
    monkeypatch.setenv("TRAIN_ON", "train/gpu")
    monkeypatch.setenv("TRAINING", '{"epochs": 3}')
    settings = read_settings([])
    assert settings.train_on == ""
    assert settings.training == TrainingParameters()


@pytest.mark.process
@pytest.mark.sweep
def test_an_unreachable_prefect_server_is_said_without_a_traceback(tmp_path):
    address = f"http://127.0.0.1:{free_port()}/api"
    environment = {**os.environ, "PREFECT_API_URL": address, "PREFECT_CLIENT_MAX_RETRIES": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "flows.retrain", "--data.data_dir", tmp_path / "data"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ended.returncode == 1
    assert "retrain stopped: Prefect must answer" in ended.stderr
    assert address in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "data").exists()
