import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfake_core.config import EvaluationParameters
from deepfake_core.detector import Detector, apply_temperature
from deepfake_core.evaluation.metrics import Confusion, evaluate_scores
from deepfake_core.training.calibration import calibrate_detector, choose_threshold, fit_temperature
from tests.builders import draw_scores, stripes


def make_overconfident(count=4000, temperature=3.0):
    """Return labels and scores whose logits are `temperature` times what they should be."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, count)
    labels = (random.random(count) < 1 / (1 + np.exp(-logits))).astype(int)
    return labels, (1 / (1 + np.exp(-logits * temperature))).astype(np.float32)


@pytest.mark.slow
def test_the_temperature_makes_a_score_mean_its_share():
    labels, scores = make_overconfident()
    temperature = fit_temperature(labels, scores)
    assert temperature == pytest.approx(3, rel=0.1)
    before, after = (
        evaluate_scores(labels, one, 0.5).metrics for one in (scores, apply_temperature(scores, temperature))
    )
    assert before["ece"].value > 0.1
    assert after["ece"].value < 0.03
    assert after["auc"].value == pytest.approx(before["auc"].value, abs=1e-6)


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30), st.floats(0.05, 20))
def test_a_temperature_keeps_the_order_and_the_half(scores, temperature):
    scores = np.sort(np.array(scores, np.float32))
    changed = apply_temperature(scores, temperature)
    assert (np.diff(changed) >= 0).all()
    assert ((changed >= 0) & (changed <= 1)).all()
    assert apply_temperature(np.array([0.5], np.float32), temperature)[0] == 0.5


@pytest.mark.parametrize("seed", range(10))
def test_no_threshold_has_a_better_f1(seed):
    labels, scores = draw_scores(40, seed)
    scores = np.round(scores, 1 + seed % 3)
    chosen = choose_threshold(labels, scores, "best_f1", 0.05)
    best = max(Confusion.count(labels, scores, threshold).f1 for threshold in np.unique(scores))
    assert Confusion.count(labels, scores, chosen).f1 == pytest.approx(best)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_false_alarm_rate_is_kept_and_used_up(seed, rate):
    labels, scores = draw_scores(60, seed)
    scores = np.round(scores, 2)
    chosen = choose_threshold(labels, scores, "false_alarm_rate", rate)
    reals = (labels == 0).sum()
    within = [
        Confusion.count(labels, scores, threshold).recall
        for threshold in [*np.unique(scores), 1.01]
        if Confusion.count(labels, scores, threshold).false_positives <= rate * reals
    ]
    reached = Confusion.count(labels, scores, chosen)
    assert reached.false_positives <= rate * reals
    assert reached.recall == pytest.approx(max(within))


def test_both_are_stored_with_the_detector_and_used(candidate, tmp_path):
    folder = shutil.copytree(candidate.folder, tmp_path / "detector")
    val = stripes(64, 5)
    calibrate_detector(folder, val, EvaluationParameters())
    first = json.loads((folder / "detector.json").read_text())
    calibrate_detector(folder, val, EvaluationParameters())
    assert json.loads((folder / "detector.json").read_text()) == first  # again is the same, not twice as warm
    detector = Detector(folder)
    assert detector.threshold == first["threshold"]
    raw = Detector(candidate.folder).score(val.pixels)
    assert np.allclose(detector.score(val.pixels), apply_temperature(raw, first["temperature"]), atol=1e-6)
    strict = EvaluationParameters(threshold="false_alarm_rate", false_alarm_rate=0)
    calibrate_detector(folder, val, strict)
    assert Confusion.count(val.labels, detector.score(val.pixels), Detector(folder).threshold).false_positives == 0
