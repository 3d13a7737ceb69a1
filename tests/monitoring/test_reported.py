"""Confirmed reports are judged again by production and the challenger."""

import pytest

from deepfake_core.detector import Detector
from deepfake_core.feedback.records import GivenVerdict
from deepfake_core.feedback.reports import open_feedback
from deepfake_core.monitoring.reported import Reported, judge_reported
from deepfake_core.registry import connection, names, production, runs
from deepfake_core.registry.detectors import register_detector
from deepfake_core.registry.production import name_challenger
from deepfake_core.registry.versions import read_version
from tests.builders import FORMER, NAME, copy_former, jpeg

pytestmark = pytest.mark.slow


@pytest.fixture
def feedback(tmp_path):
    """Report six images, confirm the first four: the first two as the network judges them, the others as the other."""
    feedback, detector = open_feedback(tmp_path / "feedback"), Detector(FORMER)
    verdict = GivenVerdict(label="fake", probability=0.8, sure=None, version="deepfake-detector version 1")
    for number in range(6):
        label = detector.predict([jpeg(number)])[0].label
        other = "real" if label == "fake" else "fake"
        sent = feedback.add(jpeg(number), verdict, other)
        if number < 4:
            feedback.confirm(sent.sha256, label if number < 2 else other, by="a reviewer")
    return feedback


def test_each_version_is_wrong_on_what_it_judges_otherwise_than_confirmed(feedback, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    connection.connect()
    detector = copy_former(tmp_path / "detector")
    for _ in range(2):
        with runs.open_run("cnn") as run_id:
            register_detector(run_id, detector, NAME, jpeg(1), {names.DECISION: names.PROMOTED})
    production.move_production(NAME, "1", None, "first")
    version = read_version(NAME, "1")
    assert judge_reported("", version) == judge_reported(str(tmp_path / "none"), version) == Reported()
    assert judge_reported(feedback.address, version) == Reported(4, {"1": 2})
    name_challenger(NAME, "2")
    found = judge_reported(feedback.address, version)
    assert found == Reported(4, {"1": 2, "2": 2})
    assert found.describe()[0].startswith("of 4 confirmed reports, version 1 is wrong on 2, version 2 is wrong on 2")
    assert found.flatten(NAME) == {
        "reported/images": 4.0,
        f"reported/{NAME}/1/wrong": 2.0,
        f"reported/{NAME}/2/wrong": 2.0,
    }
    changed = tmp_path / "feedback" / feedback.list_confirmed()[0].sha256 / "image"
    changed.write_bytes(changed.read_bytes() + b"x")
    assert judge_reported(feedback.address, version).images == 3
    client = connection.connect()
    client.create_model_version(NAME, "file:///nowhere", run_id, tags={})
    name_challenger(NAME, "3")
    (failed,) = judge_reported(feedback.address, version).describe()  # a challenger without files
    assert failed.startswith("the confirmed reports were not judged: A model")
    assert Reported().describe() == []
    assert Reported().flatten(NAME) == {}
