"""The flow `watch`, with a real Prefect server and MLflow: windows of production against its reference."""

from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import mlflow
import numpy as np
import pyarrow
import pytest
from prefect.client.orchestration import get_client

from deepfake_core.config import WatchParameters
from deepfake_core.errors import ModelError
from deepfake_core.monitoring.observations import OBSERVATION_SCHEMA
from deepfake_core.monitoring.observer import append_rows
from deepfake_core.registry import connection, production, runs, windows
from deepfake_core.registry.versions import read_version
from flows.watch import watch
from tests.builders import NAME, find_events, wait_until

pytestmark = [pytest.mark.usefixtures("prefect_api"), pytest.mark.slow]

OBSERVED = WatchParameters(observations="seen")


def draw_rows(count: int, version: str = f"{NAME}/1", seed: int = 0, quality: float = 90) -> list[dict[str, object]]:
    random = np.random.default_rng(seed)
    return [
        {
            **dict.fromkeys(OBSERVATION_SCHEMA.names),
            "time": datetime.now(UTC) - timedelta(minutes=1),
            "version": version,
            "face": 1,
            "fake": bool(score > 0.5),
            "probability": score,
            "sure": bool(abs(score - 0.5) > 0.2),
            "side": 200 + 20 * random.normal(),
            "sharpness": abs(random.normal()),
            "jpeg_quality": quality,
            "width": 640,
            "height": 480,
            "shadow_version": f"{NAME}/2",
            "shadow_probability": score,
            "shadow_fake": bool(score > 0.7),
        }
        for score in random.uniform(size=count)
    ]


def observe(folder: Path, rows: list[dict[str, object]]) -> None:
    for file in folder.rglob("*.parquet"):
        file.unlink()
    append_rows(folder / str(rows[0]["time"].date()) / f"{'a' * 16}.parquet", rows)


@pytest.fixture
def watched(tracking):
    """Put a version into production whose run holds a reference; return its run and the folder of observations."""
    client = connection.connect()
    client.create_registered_model(NAME)
    with runs.open_run("cnn") as run_id:
        windows.log_reference(run_id, pyarrow.Table.from_pylist(draw_rows(500, seed=1), OBSERVATION_SCHEMA))
    client.create_model_version(NAME, "file:///nowhere", run_id, tags={"decision": "promoted"})
    production.move_production(NAME, "1", None, "test")
    return run_id, tracking / "seen"


def read_artifact() -> str:
    with get_client(sync_client=True) as client:
        found = [one for one in client.read_artifacts(limit=200) if one.key == "watch"]
    return str(max(found, key=lambda one: one.created).data)


def test_a_window_like_the_test_split_is_logged_and_alarms_nobody(watched):
    run_id, folder = watched
    observe(folder, [*draw_rows(300), *draw_rows(300, version=f"{NAME}/7", quality=20)])
    text = watch(OBSERVED)
    assert text.startswith(f"No drift: 300 observations of {NAME} version 1 in 1 day(s) are like its test split.")
    assert "- JPEG quality of faces: no change (mean 90, on the test split 90" in text
    assert f"- {NAME}/2 ran beside it and gave the same label to" in text
    assert "data:image/svg+xml;base64," in read_artifact()
    metrics = mlflow.get_run(run_id).data.metrics
    assert metrics["drift/drifted"] == 0
    assert metrics["drift/face/sharpness"] < 0.1
    assert metrics["drift/observations"] == 300
    assert metrics[f"shadow/{NAME}/2/agreement"] == pytest.approx(0.8, abs=0.07)


def test_a_changed_window_says_which_column_and_is_announced(watched):
    run_id, folder = watched
    start = datetime.now(UTC)
    observe(folder, draw_rows(300, quality=40))
    assert watch(OBSERVED).splitlines()[2].startswith("- JPEG quality of faces: has changed (mean 40, on the test spl")
    event = wait_until(lambda: find_events("deepfake.drift", start))[0]
    assert event["resource"]["deepfake.drift.lasts"] == "false"
    assert event["payload"]["version"] == "1"
    assert "What production sees has changed" in event["payload"]["text"]
    today = (datetime.now(UTC) - datetime(1970, 1, 1, tzinfo=UTC)).days
    assert [one.step for one in mlflow.MlflowClient().get_metric_history(run_id, windows.DRIFTED)] == [today]


def test_reports_that_can_not_be_judged_keep_no_drift_from_being_announced(watched):
    run_id, folder = watched
    start = datetime.now(UTC)
    observe(folder, draw_rows(300, quality=40))
    text = watch(OBSERVED.model_copy(update={"feedback": str(folder)}))
    assert "- JPEG quality of faces: has changed" in text
    assert "- the confirmed reports were not judged: Feedback must be in a new folder, or in one that" in text
    wait_until(lambda: find_events("deepfake.drift", start))
    assert mlflow.get_run(run_id).data.metrics["drift/drifted"] == 1


def test_too_few_and_no_observations_are_said_and_no_verdict(watched):
    run_id, folder = watched
    assert watch(OBSERVED).startswith(f"Too few to compare: 0 observations of {NAME} version 1")
    observe(folder, draw_rows(99, quality=40))
    assert watch(OBSERVED).startswith("Too few to compare: 99 observations")
    assert windows.DRIFTED not in mlflow.get_run(run_id).data.metrics


@pytest.mark.usefixtures("watched")
def test_drift_lasts_where_2_of_the_last_5_windows_drifted_and_the_newest_did():
    version, first = read_version(NAME, "1"), date(2026, 1, 1)
    found = [
        windows.record_window(version, {}, drifted, first + timedelta(days=day))
        for day, drifted in enumerate([True, False, False, True, None, False, False, False, False, True, True, False])
    ]
    assert [day for day, lasts in enumerate(found) if lasts] == [3, 10]
    assert windows.record_window(version, {}, True, first + timedelta(days=11))  # the same day again
    assert not windows.record_window(version, {}, None, first + timedelta(days=12))


@pytest.mark.usefixtures("watched")
def test_one_bad_day_in_windows_that_overlap_is_no_lasting_drift():
    version = read_version(NAME, "1")
    drifted = [8 <= day < 15 or day >= 22 for day in range(26)]  # one bad day in windows of 7 days, and bad days later
    first = date(2026, 1, 1)
    found = [windows.record_window(version, {}, drifted[day], first + timedelta(days=day), days=7) for day in range(26)]
    assert [day for day, lasts in enumerate(found) if lasts] == [22, 23, 24, 25]


@pytest.mark.usefixtures("watched")
def test_what_can_not_be_watched_is_said():
    client = connection.connect()
    with pytest.raises(ModelError, match="There must be a production model"):
        watch(WatchParameters(model_name="other"))
    with runs.open_run("former") as run_id:
        pass
    client.create_model_version(NAME, "file:///nowhere", run_id, tags={})
    production.move_production(NAME, "2", "1", "test")
    with pytest.raises(ModelError, match=r"must hold evaluation/reference\.parquet.*Retrain"):
        watch(OBSERVED)
