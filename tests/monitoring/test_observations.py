"""Observations of verdicts: what is kept and what is not, and that whatever fails there stops no verdict."""

import logging
import os
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from pyarrow import parquet

from deepfake_core.cli import main
from deepfake_core.detector import Detector
from deepfake_core.errors import ConfigurationError, DownloadError
from deepfake_core.housekeeping import clean
from deepfake_core.monitoring import observations, observer
from deepfake_core.monitoring.observations import OBSERVATION_SCHEMA, read_window
from deepfake_core.monitoring.observer import Observer, append_rows, open_observer
from deepfake_core.monitoring.reference import observe_images
from deepfake_core.registry import connection, runs
from deepfake_core.registry.detectors import register_detector
from deepfake_core.serving.predictor import Predictor
from deepfake_core.serving.shadow import Shadow
from deepfake_core.storage.store import open_store
from tests.builders import NAME, copy_former, draw_image, draw_portrait, draw_scene, encode, free_port, jpeg, wait_until

NOW = datetime(2030, 1, 1, 23, 59, tzinfo=UTC)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return Detector(copy_former(tmp_path_factory.mktemp("former") / "model"))


@pytest.fixture
def predictor(detector):
    return Predictor(detector, detect=False, version="m/1")


def judge(predictor, *images: bytes):
    return list(predictor.judge([(f"secret {number}", data) for number, data in enumerate(images)]))


def make_row(when: datetime = NOW, **values: object) -> dict[str, object]:
    return {**dict.fromkeys(OBSERVATION_SCHEMA.names), "time": when, "version": "m/1", **values}


def read_all(address: object) -> pd.DataFrame:
    now = datetime.now(UTC)
    return read_window(str(address), now - timedelta(days=1), now + timedelta(days=1))


def list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_predict_observes_faces_and_keeps_no_name_and_no_pixel(tmp_path, monkeypatch, capsys):
    copy_former(tmp_path / "model")
    scene = draw_scene({(40, 60): draw_portrait(1, 200), (300, 250): draw_portrait(2, 150)})
    (tmp_path / "secret.jpg").write_bytes(encode(scene, quality=73))
    (tmp_path / "none.png").write_bytes(encode(draw_image(1), "PNG"))
    monkeypatch.chdir(tmp_path)
    command = ["predict", "secret.jpg", "none.png", "--model", "model", "--csv"]
    assert main(command) == 0
    plain = capsys.readouterr().out
    assert main([*command, "--observe", "seen"]) == 0
    assert capsys.readouterr().out == plain
    (file,) = list_files(tmp_path / "seen")
    assert file.parent.name == str(datetime.now(UTC).date())
    assert b"secret" not in file.read_bytes()
    assert parquet.read_schema(file).equals(OBSERVATION_SCHEMA)
    rows = read_all("seen")
    assert rows["face"].tolist() == [1, 2]
    assert (rows["width"].unique(), rows["height"].unique()) == ([640], [480])
    assert rows["jpeg_quality"].round().unique() == [73]
    assert rows["side"].is_monotonic_decreasing
    assert rows["probability"].between(0, 1).all()
    measures = rows[["probability", "sharpness", "jpeg_quality", "side"]]
    assert measures.equals(measures.round(3))  # all digits would tell which picture it is
    assert rows["version"].unique() == [""]  # what serves a pulled folder is not known


def test_rows_of_a_day_are_one_file_and_midnight_begins_another(tmp_path):
    writer = Observer(str(tmp_path))
    rows = [make_row(NOW + timedelta(seconds=20 * step), probability=step / 10) for step in range(6)]
    for some in (rows[:2], rows[2:5], rows[5:]):
        writer.write_rows(some)
    writer.close()
    files = list_files(tmp_path)
    assert [file.parent.name for file in files] == ["2030-01-01", "2030-01-02"]
    assert [parquet.read_metadata(file).num_rows for file in files] == [3, 3]
    found = read_window(str(tmp_path), NOW, NOW + timedelta(seconds=100))
    assert found["probability"].tolist() == [0, 0.1, 0.2, 0.3, 0.4]  # up to the end, without it


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_a_file_that_is_written_anew_has_all_rows_once_in_order(tmp_path, monkeypatch, counts):
    monkeypatch.setattr(observer, "MAX_ROWS_AT_ONCE", 7)
    path = tmp_path / "file.parquet"
    path.unlink(missing_ok=True)
    rows = [make_row(probability=float(number)) for number in range(sum(counts))]
    done = 0
    for count in counts:
        append_rows(path, rows[done : done + count])
        done += count
    assert parquet.read_table(path)["probability"].to_pylist() == [row["probability"] for row in rows]


def test_a_disk_that_fails_stops_no_verdict_warns_once_and_gets_the_rows_later(
    predictor, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(observer, "ROWS_BETWEEN_WRITES", 1)
    place = tmp_path / "seen"
    place.write_text("a file, where the folder should be")
    with caplog.at_level(logging.WARNING), Observer(str(place)) as writer:
        for number in range(3):
            (judged,) = judge(predictor, jpeg(number))
            writer.add(judged)
            assert judged.verdicts[0].label
            wait_until(lambda: "verdicts go on" in caplog.text)
        place.unlink()
    assert caplog.text.count("observations can't be written") == 1
    assert len(read_all(place)) == 3


def test_what_waits_is_bounded_and_the_newest_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(observer, "MAX_WAITING_ROWS", 5)
    (tmp_path / "seen").write_text("")
    writer = Observer(str(tmp_path / "seen"))
    writer._rows = [make_row(probability=float(number)) for number in range(9)]
    writer.close()
    assert [row["probability"] for row in writer._rows] == [4, 5, 6, 7, 8]


def test_a_store_out_of_reach_delays_neither_a_verdict_nor_the_end(predictor, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(observer, "MAX_SECONDS_TO_END", 1.0)
    judged = judge(predictor, jpeg(1))
    start = time.monotonic()
    with Observer("s3://bucket/seen") as writer:
        writer.add(judged[0])
        assert time.monotonic() - start < 1
    assert time.monotonic() - start < 30
    assert caplog.text.count("observations can't be written to s3://bucket/seen") == 1


def test_a_url_holds_what_a_folder_holds_and_nothing_stays_on_this_disk(predictor, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        with Observer("memory://bucket/seen") as writer:
            for judged in judge(predictor, jpeg(1), jpeg(2)):
                writer.add(judged)
    assert len(read_all("memory://bucket/seen")) == 4
    assert list_files(tmp_path) == []
    store = open_store("memory://bucket/seen")
    (day,) = observations.list_old_days(store, -1)
    observations.remove_day(store, day)
    assert len(read_all("memory://bucket/seen")) == 0


def test_an_image_is_observed_once_a_day_by_each_version(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(observer, "MAX_REMEMBERED_IMAGES", 3)
    with Observer(str(tmp_path)) as writer:
        for version in ("m/1", "m/2"):
            for judged in judge(Predictor(detector, detect=False, version=version), *[jpeg(1), jpeg(1)]):
                writer.add(judged)
        assert len(writer._rows) == 2
        writer._day -= timedelta(days=1)  # midnight has passed
        writer.add(judged)
        assert len(writer._rows) == 3
        for judged in judge(Predictor(detector, detect=False), *(jpeg(seed) for seed in range(9))):
            writer.add(judged)
        assert len(writer._seen) <= 3
    assert len(read_all(tmp_path)) == 12


def test_days_at_a_url_have_every_row_and_nothing_of_them_is_ever_on_this_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Observer("memory://days/seen") as writer:
        for step in range(6):  # two writes a day: none holds rows of two days
            writer.write_rows([make_row(NOW + timedelta(hours=12 * step)) for _ in range(5)])
            assert list_files(tmp_path) == []
    found = read_window("memory://days/seen", NOW, NOW + timedelta(days=4))
    assert found.groupby(found["time"].dt.date).size().tolist() == [5, 10, 10, 5]
    assert list_files(tmp_path) == []


@pytest.mark.slow
@pytest.mark.usefixtures("s3_url")
def test_rows_wait_for_a_store_that_went_away_and_nothing_is_on_this_disk_meanwhile(tmp_path, monkeypatch):
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    writer, rows = Observer("s3://observed/seen"), []
    for step in range(2):
        server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
        server.start()
        if step == 0:
            fsspec.filesystem("s3").mkdir("observed")
        rows.append(make_row(NOW, probability=step / 2))
        writer.write_rows(rows)
        assert rows == []
        rows.append(make_row(NOW, probability=step / 2 + 0.25))
        server.stop()
        with pytest.raises(DownloadError, match="must answer"):
            writer.write_rows(rows)
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    writer.write_rows(rows)
    writer.close()
    found = read_window("s3://observed/seen", NOW, NOW + timedelta(days=1))
    server.stop()
    assert found["probability"].tolist() == [0, 0.25, 0.5, 0.75]
    assert list_files(tmp_path) == []


def test_what_is_no_observation_is_left_out_and_never_removed(tmp_path, caplog):
    append_rows(tmp_path / "2020-01-01" / f"{'a' * 16}.parquet", [make_row(datetime(2020, 1, 1, tzinfo=UTC))])
    names = ("2020-01-01/notes.txt", "2020-01-02/b.parquet", "2020-01-02/.b.parquet.7", "letters/c")
    others = [tmp_path / name for name in names]
    broken = tmp_path / "2020-01-01" / f"{'b' * 16}.parquet"
    killed = tmp_path / "2020-01-03" / f".{'b' * 16}.parquet.4242"
    for file in (*others, broken, killed):
        file.parent.mkdir(exist_ok=True)
        file.write_text("words")
    assert len(read_window(str(tmp_path), datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 1, 3, tzinfo=UTC))) == 1
    assert "holds no observations and is left out" in caplog.text
    store = open_store(tmp_path)
    assert observations.list_old_days(store, 90) == ["2020-01-01", "2020-01-03"]  # those that hold files of ours
    for day in observations.list_old_days(store, 90):
        observations.remove_day(store, day)
    assert list_files(tmp_path) == sorted(others)
    assert observations.list_old_days(store, 90) == []
    assert len(read_window(str(tmp_path / "nowhere"), NOW, NOW)) == 0


def test_a_file_with_bits_flipped_is_read_as_it_was_or_left_out(tmp_path):
    rows = [make_row(probability=number / 300, sharpness=number * 1.1) for number in range(300)]
    damaged, whole = (tmp_path / str(NOW.date()) / f"{name * 16}.parquet" for name in "ab")
    append_rows(damaged, rows)
    append_rows(whole, rows[:1])
    written, random = damaged.read_bytes(), np.random.default_rng(0)
    found = []
    for _ in range(300):
        flipped = bytearray(written)
        for place in random.integers(0, len(flipped), 3):
            flipped[place] ^= 1 << random.integers(8)
        damaged.write_bytes(flipped)
        seen = read_window(str(tmp_path), NOW, NOW + timedelta(seconds=1))["probability"].tolist()
        assert seen in ([0], [*(row["probability"] for row in rows), 0])
        found.append(len(seen))
    assert found.count(1) > 200


def test_gc_removes_old_observations_alone(tracking, capsys):
    today = datetime.now(UTC)
    for age in (0, 9, 11):
        when = today - timedelta(days=age)
        append_rows(tracking / "data" / "observations" / str(when.date()) / f"{'a' * 16}.parquet", [make_row(when)])
    flags = ["gc", "--keep-observations-days", "10"]
    assert main([*flags, "--dry-run"]) == 0
    assert "1 items" in capsys.readouterr().out
    assert main([*flags, "--yes"]) == 0
    assert len(list_files(tracking / "data" / "observations")) == 2
    with pytest.raises(ConfigurationError, match="at least 1 day"):
        clean(open_store("data"), observations="data/observations", keep_observations_days=0)


def test_bad_addresses_are_refused_before_any_verdict(tmp_path, capsys):
    copy_former(tmp_path / "model")
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    command = ["predict", str(tmp_path / "a.jpg"), "--model", str(tmp_path / "model"), "--no-detect"]
    assert main([*command, "--observe", "s3://key:word@bucket/x"]) == 2
    refused = capsys.readouterr().err
    assert "An address must be a folder, or a URL" in refused
    assert "key:word" not in refused
    with pytest.raises(ConfigurationError, match="--shadow needs --observe"):
        open_observer("", shadow=True)
    assert main(["serve", "--model", str(tmp_path / "model"), "--shadow"]) == 2
    assert "--shadow needs a --model from the registry" in capsys.readouterr().err


@pytest.mark.slow
def test_verdicts_by_another_threshold_are_none_of_the_versions(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    connection.connect()
    with runs.open_run("cnn") as run_id:
        register_detector(run_id, copy_former(tmp_path / "model"), NAME, jpeg(1), {})
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    command = ["predict", "a.jpg", "--model", f"models:/{NAME}/1", "--no-detect", "--observe", "seen"]
    assert main(command) == main([*command, "--threshold", "0.99"]) == 0
    assert sorted(read_all("seen")["version"]) == ["", f"{NAME}/1"]


def test_a_shadow_is_observed_and_never_shown(detector):
    images = [jpeg(1), encode(draw_image(2), "PNG"), b"no image"]
    alone = judge(Predictor(detector, detect=False, version="m/1"), *images)
    beside = Predictor(detector, detect=False, version="m/1", shadow=Shadow("m/2", detector.at(0.0)))
    both = judge(beside, *images)
    assert [one.verdicts[0].as_row() for one in both] == [one.verdicts[0].as_row() for one in alone]
    rows = [row for one in both for row in observations.list_rows(one)]
    assert [row["shadow_version"] for row in rows] == ["m/2", "m/2"]
    assert [row["shadow_probability"] for row in rows] == [row["probability"] for row in rows]
    assert all(row["shadow_fake"] for row in rows)


def test_a_shadow_that_fails_stops_no_verdict(detector, tmp_path, caplog):
    other = Detector(copy_former(tmp_path / "model"))
    other._input = "an input that the network does not have"
    predictor = Predictor(detector, detect=False, shadow=Shadow("m/2", other))
    labels = [one.verdicts[0].label for _ in range(2) for one in judge(predictor, jpeg(1))]
    assert labels == [judge(Predictor(detector, detect=False), jpeg(1))[0].verdicts[0].label] * 2
    assert caplog.text.count("m/2, beside the version in use, failed and is left out") == 1


def test_the_reference_is_taken_as_users_images_are(detector, tmp_path):
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.jpg")
        files[-1].write_bytes(encode(draw_scene({(200, 100): draw_portrait(number, 250)}), quality=80))
    rows = observe_images(detector, files).to_pandas()
    faces, whole = rows[rows["face"].notna()], rows[rows["face"].isna()]
    assert len(faces) == len(whole) == 3
    assert faces["side"].max() < whole["side"].min()


@pytest.mark.slow
def test_memory_files_and_threads_stay_flat_over_5000_observations(predictor, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(observer, "ROWS_BETWEEN_WRITES", 100)
    (judged,) = judge(predictor, jpeg(1))
    process, looks = psutil.Process(os.getpid()), []
    with Observer(str(tmp_path)) as writer:
        for count in range(1, 5001):
            writer.add(replace(judged, sha256=str(count)))
            if count % 100 == 0:
                wait_until(lambda: not writer._rows)
            if count in (1000, 3000, 5000):
                looks.append((process.memory_info().rss / 1e6, process.num_fds(), process.num_threads()))
    assert len(list_files(tmp_path)) == 1
    assert len(read_all(tmp_path)) == 5000
    with capsys.disabled():
        print(f"\nMB, files, threads after 1,000, 3,000 and 5,000: {looks}")
    assert looks[-1][0] - looks[0][0] < 20
    assert all(now <= before for before, now in zip(looks[0][1:], looks[-1][1:], strict=True))
    shutil.rmtree(tmp_path)
