"""The version beside production: what fails there is tried again, and stops no verdict."""

import shutil

import pytest

from deepfake_core.detector import Detector
from deepfake_core.registry import connection, names, runs
from deepfake_core.registry.detectors import register_detector
from deepfake_core.serving import shadow as shadows
from deepfake_core.serving.load_versions import find_shadow
from deepfake_core.serving.shadow import Shadow
from tests.builders import FORMER, NAME, copy_former, draw_image, jpeg


@pytest.mark.slow
def test_a_shadow_that_could_not_be_loaded_is_loaded_later(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    client = connection.connect()
    with runs.open_run("cnn") as run_id:
        register_detector(run_id, copy_former(tmp_path / "detector"), NAME, jpeg(1), {names.DECISION: names.PROMOTED})
    client.set_registered_model_alias(NAME, names.CHALLENGER, "1")
    shutil.rmtree(tmp_path / "detector")
    (network,) = tmp_path.rglob("model.onnx")
    away = network.rename(tmp_path / "away.onnx")
    silent = find_shadow(NAME)
    assert silent.version == f"{NAME}/1"
    assert silent.resize(draw_image(1)) is None
    away.rename(network)
    assert find_shadow(NAME, silent) is silent  # not at once: it would hold verdicts up
    assert caplog.text.count("can't run beside") == 1
    monkeypatch.setattr(shadows, "SECONDS_BETWEEN_LOADS", 0)
    found = find_shadow(NAME, Shadow(silent.version, None))
    assert found.resize(draw_image(1)) is not None
    assert find_shadow(NAME, found) is found


def test_a_shadow_that_fails_in_another_thread_while_it_is_asked_stops_no_verdict():
    class FailsMeanwhile(Detector):
        def __bool__(self):
            beside._detector = None
            return True

    beside = Shadow("m/2", None)
    beside._detector = FailsMeanwhile(FORMER)
    assert beside.resize(draw_image(1)) is not None
    assert beside.resize(draw_image(1)) is None
