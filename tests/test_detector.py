"""What `detector.json` may say, and that it describes the network beside it."""

import json
import math
from pathlib import Path

import onnx
import pytest

from deepfake_core.detector import Detector, InvalidModelError
from deepfake_core.errors import ModelError
from deepfake_core.serving.predictor import load_detector
from tests.builders import copy_former, forbid

OUT_OF_RANGE = [
    *(("image_size", value) for value in (0, -1, 1025, 20_000, 32.0, "32", True, None, math.nan)),
    *(("threshold", value) for value in (-0.1, 1.1, math.nan, math.inf, "0.5", True, None)),
    *(("temperature", value) for value in (0, -1, 1e9, math.nan, math.inf, "1", False, None)),
    *(("class_names", value) for value in (["fake", "real"], ["real"], ["real", "fake", "else"], "real", None)),
]  # 29


def write_model(folder: Path, **changes: object) -> Path:
    copy_former(folder)
    file = folder / "detector.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_what_is_out_of_range_is_refused_before_the_network_is_loaded(tmp_path, monkeypatch, name, value):
    forbid(monkeypatch, "onnxruntime.InferenceSession")
    folder = write_model(tmp_path / "model", **{name: value})
    with pytest.raises(ModelError, match=rf"{name} must be .*\. Received: .*\. Pull the model again"):
        load_detector(folder)


@pytest.mark.parametrize("size", [31, 33, 1024])
def test_images_must_have_the_size_of_the_network(tmp_path, size):
    folder = write_model(tmp_path / "model", image_size=size)
    with pytest.raises(ModelError, match=rf"\(n, {size}, {size}, 3\)\. Received: .*32, 32, 3"):
        load_detector(folder)


@pytest.mark.parametrize("text", ["", "words", "[]", "3", "null", "{}", '{"image_size": 32}'])
def test_a_damaged_description_is_said(tmp_path, text):
    folder = write_model(tmp_path / "model")
    (folder / "detector.json").write_text(text)
    with pytest.raises(ModelError, match="must be"):
        load_detector(folder)


def test_the_network_must_give_a_score_and_may_give_a_heat_map(tmp_path):
    folder = write_model(tmp_path / "model")
    assert Detector(folder).explains
    network = onnx.load(folder / "model.onnx")
    score, heat = network.graph.output
    for outputs, explains in (([score], False), ([heat, score], None), ([score, heat, score], None), ([heat], None)):
        del network.graph.output[:]
        network.graph.output.extend(outputs)
        onnx.save(network, folder / "model.onnx")
        if explains is None:
            with pytest.raises((InvalidModelError, RuntimeError)):
                Detector(folder)
        else:
            assert Detector(folder).explains is explains
