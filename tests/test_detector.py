"""What `detector.json` may say, and that it describes the network beside it."""

import json
import math
from pathlib import Path

import onnx
import pytest

from deepfake_core.description import describe_rates
from deepfake_core.detector import Detector, InvalidModelError
from deepfake_core.errors import ModelError
from deepfake_core.serving.predictor import load_detector
from tests.builders import copy_former, draw_image, encode, forbid, jpeg


def rate_part(table: list, name: str = "", images: int = 100) -> dict:
    return {"name": name, "reals": images, "fakes": images, "table": table}


OUT_OF_RANGE = [
    *(("image_size", value) for value in (0, -1, 1025, 20_000, 32.0, "32", True, None, math.nan)),
    *(("threshold", value) for value in (-0.1, 1.1, math.nan, math.inf, "0.5", True, None)),
    *(("temperature", value) for value in (0, -1, 1e9, math.nan, math.inf, "1", False, None)),
    *(("class_names", value) for value in (["fake", "real"], ["real"], ["real", "fake", "else"], "real", None)),
    *(("bounds", value) for value in ([], {}, {"lower": 0.1, "upper": 1.1, "max_error": 0.05}, True, "0.1")),
    *(("limits", value) for value in ({"side": -1}, {"side": "big"}, {"depth": 1}, [], {"sharpness": math.nan})),
    *(("rates", value) for value in ([], {}, {"parts": []}, {"parts": [{"name": "", "reals": 1, "fakes": 1}]})),
    *(("rates", {"parts": [rate_part(table)]}) for table in ([], [[0.5, 0.1]], [[0.5, 0.1, 2]], ["a"])),
]  # 47

BOUNDS = {"bounds": {"lower": 0.2, "upper": 0.8, "max_error": 0.05}}


def write_model(folder: Path, **changes: object) -> Path:
    copy_former(folder)
    file = folder / "detector.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_what_is_out_of_range_is_refused_before_the_network_is_loaded(tmp_path, monkeypatch, name, value):
    forbid(monkeypatch, "onnxruntime.InferenceSession")
    folder = write_model(tmp_path / "model", **{**(BOUNDS if name == "limits" else {}), name: value})
    with pytest.raises(ModelError, match=rf"{name} must (be|have) .*\. Received: .*\. Pull the model again"):
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


@pytest.mark.parametrize(
    ("score", "label", "sure"),
    [
        *((score, "real", score < 0.2) for score in (0.1, 0.2, 0.49)),
        *((score, "fake", score > 0.8) for score in (0.5, 0.8, 0.81)),
    ],
)
def test_a_verdict_is_sure_beyond_the_bound_of_its_label(tmp_path, score, label, sure):
    detector = Detector(write_model(tmp_path / "model", **BOUNDS, limits={}))
    judged = detector.judge(score)
    assert (judged.label, judged.sure) == (label, sure)
    assert (judged.reason is None) == sure


def test_bounds_that_cross_leave_no_verdict_unsure_but_where_the_label_is_the_others(tmp_path):
    """The reals' upper bound is below the fakes' lower one: a detector that separates both well."""
    crossed = {"bounds": {"lower": 0.9, "upper": 0.3, "max_error": 0.05}, "limits": {}}
    detector = Detector(write_model(tmp_path / "model", **crossed))
    assert all(detector.judge(score).sure for score in (0.1, 0.4, 0.5, 0.95))
    assert detector.at(0.1).judge(0.2).sure is False  # called fake, but as low as many reals


def test_another_threshold_changes_labels_and_no_score(tmp_path):
    detector = Detector(write_model(tmp_path / "model"))
    images = [jpeg(number) for number in range(4)]
    before = detector.predict(images)
    assert {one.label for one in detector.at(0).predict(images)} == {"fake"}
    assert [one.fake_probability for one in detector.at(0).predict(images)] == [one.fake_probability for one in before]
    assert detector.predict(images) == before
    with pytest.raises(ValueError, match="from 0 to 1"):
        detector.at(1.5)


def test_a_model_without_bounds_does_not_say_whether_it_is_sure(tmp_path):
    (found,) = Detector(write_model(tmp_path / "model")).predict([jpeg(1)])
    assert (found.sure, found.reason) == (None, None)


def test_what_is_unlike_the_calibration_images_is_not_sure(tmp_path):
    everything = {"bounds": {"lower": 1.0, "upper": 0.0, "max_error": 0.05}}
    limits = {"side": 48, "sharpness": 0.0, "jpeg_quality": 80, "saturation": 0.02}
    detector = Detector(write_model(tmp_path / "model", **everything, limits=limits))
    images = [encode(draw_image(1, side), quality=quality) for side, quality in ((48, 90), (47, 90), (48, 70))]
    found = detector.predict([*images, encode(draw_image(1, 48).convert("L"), quality=90)])
    assert [one.sure for one in found] == [True, False, False, False]
    assert "shorter side of 47 pixels" in found[1].reason
    assert "JPEG quality 70" in found[2].reason
    assert "saturation 0.000" in found[3].reason


def test_the_rates_of_a_threshold_are_those_of_the_next_lower_one(tmp_path):
    table = [[0.1, 0.5, 0.99], [0.5, 0.07, 0.8], [0.9, 0.0, 0.4]]
    parts = [rate_part(table), rate_part([[0.1, 0.2, 0.3]], "ciplab", images=0)]
    description = Detector(write_model(tmp_path / "model", rates={"drawn": False, "parts": parts})).description
    assert describe_rates(description, 0.5).startswith("On test images, of 100 real ones about 7")
    assert describe_rates(description, 0.6) == (
        "On test images, with fake from 0.5 up, of 100 real ones about 7 (3 to 14) were called fake, and of 100 "
        "fakes about 80 (71 to 87) "
        "were found; ciplab: an unknown number and an unknown number."
    )
    assert describe_rates(description, 0.05) == ""  # a version of before may hold no rate so low
    assert "about 0 (0 to 4)" in describe_rates(description, 0.95)
    assert describe_rates({}, 0.5) == ""
    drawn = description | {"rates": {"drawn": True, "parts": parts}}
    assert describe_rates(drawn, 0.6).startswith("On drawn test images")
