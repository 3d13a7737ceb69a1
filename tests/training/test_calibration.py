import json
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import beta

from deepfake_core.config import EvaluationParameters
from deepfake_core.detector import HIGHEST_SCORE, Detector, apply_temperature, call_fake
from deepfake_core.evaluation.confusion import Confusion
from deepfake_core.evaluation.evaluation import evaluate_scores
from deepfake_core.input_gate import ImageQuality
from deepfake_core.training.calibration import (
    calibrate_detector,
    choose_threshold,
    count_allowed,
    fit_bounds,
    fit_temperature,
    warn_of_few_reals,
)
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


def make_rows(sources, groups=None):
    """Return the columns of a manifest that a threshold asks for; without groups, no image has a near copy."""
    return pd.DataFrame({"source": sources, "group": np.arange(len(sources)) if groups is None else groups})


ONE = make_rows(["one"] * 1000)
"""A single source."""


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("rule", "measure"),
    [("best_f1", lambda found: found.f1), ("balanced_accuracy", lambda found: found.recall - found.false_alarm_rate)],
)
def test_no_threshold_is_better_by_the_rule(rule, measure, seed):
    labels, scores = draw_scores(40, seed)
    scores = np.round(scores, 1 + seed % 3)
    chosen = choose_threshold(labels, scores, ONE[:40], rule, 0.0)
    best = max(measure(Confusion.count(labels, scores, threshold)) for threshold in [*np.unique(scores), 1.01])
    assert measure(Confusion.count(labels, scores, chosen)) == pytest.approx(best)


def is_at_most(rate, wrong, images):
    """Whether the upper end of Clopper and Pearson's one-sided interval, at 0.9, is at most the rate."""
    return rate == 1 if wrong == images else beta.ppf(0.9, wrong + 1, images - wrong) <= rate


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_false_alarm_rate_is_kept_on_every_source_at_the_best_balanced_accuracy(seed, rate):
    labels, scores = draw_scores(400, seed)
    scores = np.round(scores, 2)
    sources = np.array(["first", "second"])[np.random.default_rng(seed).integers(0, 2, 400)]
    scores[sources == "second"] **= 0.7  # whose reals look more like fakes

    def count(threshold):
        parts = (
            Confusion.count(labels[part], scores[part], threshold) for part in (sources == "first", sources == "second")
        )
        kept = all(one.false_positives == 0 or is_at_most(rate, one.false_positives, one.reals) for one in parts)
        whole = Confusion.count(labels, scores, threshold)
        return kept, whole.recall - whole.false_alarm_rate

    chosen = choose_threshold(labels, scores, make_rows(sources), "false_alarm_rate", rate)
    kept, reached = count(chosen)
    assert kept
    assert reached == pytest.approx(max(value for kept, value in map(count, [*np.unique(scores), 1.01]) if kept))


def test_the_worst_source_decides_and_one_of_few_reals_is_taken_with_the_others(caplog):
    scores = np.concatenate([np.linspace(0, 0.4, 100), np.linspace(0, 0.8, 60), np.linspace(0.9, 1, 50)])
    labels, sources = np.repeat([0, 1], [160, 50]), np.repeat(["easy", "hard", "easy"], [100, 60, 50])
    caplog.set_level("INFO")
    assert 0.7 < choose_threshold(labels, scores, make_rows(sources), "false_alarm_rate", 0.1) <= 0.9
    fakes_lower = np.where(labels == 1, scores - 0.15, scores)
    strict = choose_threshold(labels, fakes_lower, make_rows(sources), "false_alarm_rate", 0.1)
    assert Confusion.count(labels[sources == "hard"], fakes_lower[sources == "hard"], strict).false_positives == 2
    assert "at most 2 of the 60 reals of hard may be called fake" in caplog.text
    few = np.where(np.arange(210) < 120, "easy", sources)  # 40 are left of the hard one
    caplog.clear()
    choose_threshold(labels, fakes_lower, make_rows(few), "false_alarm_rate", 0.1)
    assert "the 160 reals of all sources together" in caplog.text


@pytest.mark.parametrize(
    ("images", "rate", "allowed"),
    [(51, 0.1, 1), (107, 0.1, 6), (200, 0.1, 14), (1000, 0.1, 87), (21, 0.1, 0), (0, 0.1, 0), (60, 0, 0), (60, 1, 60)],
)
def test_of_few_images_fewer_may_be_wrong_than_the_rate_says(images, rate, allowed):
    assert count_allowed(images, rate) == allowed


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.3, 0.7, 1.0]), st.booleans()), min_size=1),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from(["false_alarm_rate", "balanced_accuracy", "best_f1"]),
)
def test_scores_that_are_equal_or_one_float32_apart_break_no_limit(images, rate, rule):
    scores = np.array([base for _, base, _ in images], np.float32)
    for step in range(5):
        further = np.array([steps > step for steps, _, _ in images])
        scores = np.where(further, np.nextafter(scores, np.float32(0.5)), scores)
    scores = apply_temperature(scores, 1)
    labels = np.array([int(fake) for _, _, fake in images])
    chosen = choose_threshold(labels, scores, ONE[: len(images)], rule, rate)
    found = Confusion.count(labels, scores, chosen)
    reals = int((labels == 0).sum())
    assert rule != "false_alarm_rate" or found.false_positives <= count_allowed(reals, rate)
    others = [Confusion.count(labels, scores, threshold) for threshold in [*np.unique(scores).tolist(), 1.0]]
    measure = (lambda one: one.f1) if rule == "best_f1" else (lambda one: one.recall - one.false_alarm_rate)
    kept = [one for one in others if rule != "false_alarm_rate" or one.false_positives <= count_allowed(reals, rate)]
    assert measure(found) == pytest.approx(max(map(measure, kept)))
    assert found == Confusion.count(labels, scores.astype(np.float64), chosen)


def test_a_threshold_of_1_calls_no_image_fake():
    saturated = np.ones(2, np.float32)
    for temperature in (0.05, 1, 2):
        scores = apply_temperature(saturated, temperature)
        assert (scores <= HIGHEST_SCORE).all()
        assert not call_fake(scores, 1).any()


@given(st.floats(0, 1, width=32), st.floats(0.05, 20))
@example(1.0, 2.0)
def test_a_score_means_the_same_where_bounds_are_fitted_and_where_it_is_served(score, temperature):
    at_1 = apply_temperature(np.array([score], np.float32), 1)
    assert apply_temperature(at_1, temperature) == apply_temperature(np.array([score], np.float32), temperature)


def test_near_copies_count_once_by_the_highest_score():
    scores = np.append(np.arange(60) / 100, np.repeat(np.arange(50, 60) / 100 + 0.005, 4))
    labels = np.repeat([0, 1], [60, 40])
    alone = choose_threshold(labels, scores, ONE[:100], "false_alarm_rate", 0.1)
    assert Confusion.count(labels, scores, alone).false_positives == count_allowed(60, 0.1) == 2
    groups = np.arange(100)
    groups[[0, 1, 2, 3, 4, 59]] = 0  # with 55 images that count, 2 may be called fake
    copies = choose_threshold(labels, scores, make_rows(["one"] * 100, groups), "false_alarm_rate", 0.1)
    assert Confusion.count(labels, scores, copies).false_positives == count_allowed(55, 0.1) == 2
    groups = np.arange(100)
    groups[[*range(9), 59]] = 0  # with 51 images that count, 1 may be, which is the group's highest
    copies = choose_threshold(labels, scores, make_rows(["one"] * 100, groups), "false_alarm_rate", 0.1)
    assert Confusion.count(labels, scores, copies).false_positives == count_allowed(51, 0.1) == 1


def test_no_more_images_are_called_fake_than_may_be_where_they_are_near_copies_of_each_other():
    scores = np.append(np.arange(60) / 100, np.repeat(np.arange(50, 60) / 100 + 0.005, 4))
    labels, groups = np.repeat([0, 1], [60, 40]), np.append(np.arange(55), [55] * 45)
    chosen = choose_threshold(labels, scores, make_rows(["one"] * 100, groups), "false_alarm_rate", 0.1)
    assert Confusion.count(labels, scores, chosen).false_positives == count_allowed(60, 0.1) == 2


REAL = np.ones(1000, bool)


@pytest.mark.parametrize(
    ("images", "rate", "said"),
    [
        (250, 0.1, None),
        (60, 1.0, None),
        (51, 0.1, "To keep the rate of 0.1 for new images with a confidence of 0.9, only 1 of the 51 real"),
        (60, 0.05, "with a confidence of 0.9, none of the 60 real validation images of one may be called fake."),
        (60, 0.02, "images of one are too few to keep the rate of 0.02 for new images with a confidence of 0.9"),
        (60, 0.02, "though none of them is called fake: 114 are enough."),
        (60, 0.0, "though none of them is called fake: no number is enough."),
    ],
)
def test_what_few_real_images_cost_is_said(images, rate, said):
    found = warn_of_few_reals(REAL[:images], ONE[:images], rate)
    assert [said in one for one in found] == [True] if said else found == []


def test_a_source_of_few_real_images_keeps_no_rate_of_its_own():
    rows = make_rows(np.repeat(["many", "few", "feedback"], [250, 30, 99]))
    (warning,) = warn_of_few_reals(REAL[:379], rows, 0.1)
    assert warning.startswith("Fewer than 50 real validation images: 30 of few. The threshold keeps a rate of false ")
    fewer = warn_of_few_reals(REAL[:190], rows[90:280], 0.1)
    assert fewer[0] == warning
    assert [one.split(", ")[1].split(" With")[0] for one in fewer[1:]] == [
        "only 10 of the 160 real validation images of many may be called fake.",
        "only 13 of the 190 real validation images of all sources together may be called fake.",
    ]


def test_what_few_images_cost_counts_near_copies_once():
    pairs = make_rows(["one"] * 80 + ["other"] * 300, [*np.arange(80) // 2, *range(100, 400)])
    few, *_, together = warn_of_few_reals(REAL[:380], pairs, 0.01)
    assert few.startswith("Fewer than 50 real validation images: 40 of one. ")
    assert "of the 340 real validation images of all sources together" in together
    (alone,) = warn_of_few_reals(REAL[:80], pairs[:80], 0.1)
    assert "only 1 of the 40 real validation images of one may be called fake" in alone
    assert warn_of_few_reals(np.arange(380) >= 80, pairs, 0.1) == []  # a source of fakes alone has no false alarms


def test_confirmed_reports_set_no_false_alarm_rate(caplog):
    scores = np.concatenate([np.linspace(0, 0.6, 100), np.linspace(0.6, 1, 60), np.linspace(0.5, 1, 100)])
    labels = np.repeat([0, 1], [160, 100])
    sources = np.repeat(["usual", "feedback", "usual"], [100, 60, 100])
    caplog.set_level("INFO")
    chosen = choose_threshold(labels, scores, make_rows(sources), "false_alarm_rate", 0.1)
    assert Confusion.count(labels[sources == "usual"], scores[sources == "usual"], chosen).recall > 0.8
    assert "the 100 reals of usual" in caplog.text
    assert "feedback" not in caplog.text
    another = np.where(sources == "feedback", "another", sources)
    strict = choose_threshold(labels, scores, make_rows(another), "false_alarm_rate", 0.1)
    assert Confusion.count(labels, scores, strict).recall < 0.2


@pytest.mark.slow
def test_in_1000_draws_the_next_image_keeps_every_stated_rate():
    """Images to come are as likely wrong as stated: the sure verdicts of each label on average over draws, reals and
    fakes of a class in nine of ten draws. Among these shapes of the scores' distribution, the rate decides which
    threshold is chosen."""
    random, wrong, chances = np.random.default_rng(0), [], []
    labels, new_labels = (np.repeat([0, 1], count) for count in (79, 200))
    for _ in range(1000):
        shape = random.uniform(1.5, 3)
        draw = lambda count, shape=shape: np.concatenate([random.beta(1, shape, count), random.beta(shape, 1, count)])  # noqa: E731
        scores, new = draw(79), draw(200)
        threshold = choose_threshold(labels, scores, ONE[:158], "false_alarm_rate", 0.1)
        lower, upper = fit_bounds(labels, scores, ONE[:158], threshold, 0.05)
        # The chances that a real one, of Beta(1, shape), or a fake one, of Beta(shape, 1), is called what it is not.
        chances.append([(1 - threshold) ** shape, (1 - upper) ** shape, lower**shape])
        surely_fake, surely_real = (new > upper) & (new >= threshold), (new < lower) & (new < threshold)
        wrong.append(
            [
                (new_labels[surely_fake] == 0).mean() if surely_fake.any() else 0.0,
                (new_labels[surely_real] == 1).mean() if surely_real.any() else 0.0,
            ]
        )
    mean, error = np.mean(wrong, axis=0), np.std(wrong, axis=0) / 1000**0.5
    assert (mean <= 0.05 + 3 * error).all(), mean
    assert (mean >= 0.02).all(), mean
    assert (np.mean(chances, axis=0) <= [0.1, 0.05, 0.05]).all(), np.mean(chances, axis=0)
    broken = np.mean(np.array(chances) > [0.1, 0.05, 0.05], axis=0)
    assert (broken <= 0.1 + 3 * (0.09 / 1000) ** 0.5).all(), broken
    assert (broken >= 0.02).all(), broken  # and hardly less: threshold and bounds are no further out than need be


@given(st.integers(0, 150), st.integers(0, 150), st.floats(0.3, 6), st.integers(1, 4), st.floats(0, 1), st.integers(0))
def test_of_each_class_and_of_the_sure_at_most_the_stated_share_is_surely_wrong(
    reals, fakes, shape, decimals, threshold, seed
):
    random, labels = np.random.default_rng(seed), np.repeat([0, 1], [reals, fakes])
    scores = np.round(np.append(random.beta(0.3, shape, reals), random.beta(shape, 0.3, fakes)), decimals)
    lower, upper = fit_bounds(labels, scores, ONE[: len(scores)], threshold, 0.05)
    assert (scores[labels == 1] < lower).sum() <= count_allowed(fakes, 0.05)
    assert (scores[labels == 0] > upper).sum() <= count_allowed(reals, 0.05)
    for sure, wrong_class in (
        ((scores < lower) & (scores < threshold), 1),
        ((scores > upper) & (scores >= threshold), 0),
    ):
        wrong = (labels[sure] == wrong_class).sum()
        assert not sure.any() or wrong + 1 <= 0.05 * (sure.sum() + 1) + 1e-9
    assert not np.signbit(lower)  # a report would show -0.00
    if fakes < 19:
        assert lower == 0
    if reals < 19:
        assert upper == 1


REALS, FAKES = np.linspace(0, 0.4, 200), np.linspace(0.6, 1, 200)


def fit(rows, reals=REALS, fakes=FAKES, threshold=0.5):
    """Fit bounds for an error of 0.05."""
    labels = np.repeat([0, 1], [len(reals), len(fakes)])
    return fit_bounds(labels, np.append(reals, fakes), rows[: len(labels)], threshold, 0.05)


def test_the_source_that_errs_most_decides_the_bounds():
    place = np.arange(400) % 200
    assert count_allowed(60, 0.05) == 0
    assert [count_allowed(images, 0.05) for images in (140, 160, 200)] == [3, 4, 5]
    assert fit(ONE) == (FAKES[5], REALS[194])
    assert fit(make_rows(np.where(place < 140, "low", "high"))) == (FAKES[3], REALS[199])
    too_few_of_its_own = np.where(place < 151, "low", "high")
    assert fit(make_rows(too_few_of_its_own)) == (FAKES[count_allowed(151, 0.05)], REALS[194])
    reported = np.where(place < 140, "low", "feedback")  # they set no limit of their own
    assert fit(make_rows(reported)) == (FAKES[3], REALS[136])
    assert fit(make_rows(["feedback"] * 400)) == (0, 1)


def test_from_19_images_of_a_class_on_there_is_a_bound():
    assert fit(ONE, REALS[-19:], FAKES[:19]) == (FAKES[0], REALS[-1])
    assert fit(ONE, REALS[-19:], FAKES[:18])[0] == 0
    assert fit(ONE, REALS[-18:], FAKES[:19])[1] == 1


def test_the_share_of_the_sure_is_kept_at_the_bound_that_a_class_sets():
    """Six reals score highest. The class allows five above the bound, of so few sure verdicts five are too many."""
    reals = np.append(REALS[:194], [0.995, 0.996, 0.997, 0.998, 0.999, 1.0])
    assert fit(ONE, reals, FAKES * 0.9) == (FAKES[5] * 0.9, 1)


def test_the_share_of_the_sure_is_that_at_the_threshold():
    """Above the bound that the class sets, 200 are right and 3 wrong; from 0.95 on, 5 are right and 3 wrong."""
    reals, fakes = np.append(REALS[:197], [0.97, 0.98, 0.99]), np.append(FAKES[:195] * 0.9, np.linspace(0.95, 0.96, 5))
    assert fit(ONE, reals, fakes)[1] == REALS[194]
    assert fit(ONE, reals, fakes, 0.95)[1] == 1


def test_bounds_hold_for_images_and_with_near_copies_counted_once_by_the_most_extreme():
    def copy(*places):
        groups = np.arange(400)
        groups[list(places)] = places[0]
        return make_rows(["one"] * 400, groups)

    assert fit(copy(*range(194, 200))) == (FAKES[5], REALS[194])  # as images: five of 200 above
    assert fit(copy(*range(217, 400)))[0] == 0  # 18 fakes and their copies are too few
    assert [count_allowed(images, 0.05) for images in (77, 76)] == [1, 0]
    assert fit(copy(0, 76), REALS[:77])[1] == REALS[76]  # the highest of a group counts
    assert fit(copy(0, 1), REALS[:77])[1] == REALS[76]
    reals = np.append(REALS[:195], [0.95, 0.96, 0.97, 0.98, 0.99])
    assert fit(ONE, reals)[1] == REALS[194]
    assert fit(copy(*range(200, 400)), reals)[1] == 1  # of the sure, five would be wrong and one right
    few_found = np.append(REALS[:150], FAKES[:50])
    assert fit(copy(*range(195, 200)), reals, few_found)[1] == 1  # as images, five wrong and 50 right


def test_all_is_stored_with_the_detector_and_used(candidate, tmp_path):
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
    qualities = [ImageQuality(32, 0.1 + 0.01 * number, 90 - number) for number in range(64)]
    calibrate_detector(folder, val, EvaluationParameters(false_alarm_rate=0), qualities)
    assert Detector(folder).description["limits"] == {"side": 32, "sharpness": 0.1, "jpeg_quality": 27}
    assert Confusion.count(val.labels, detector.score(val.pixels), Detector(folder).threshold).false_positives == 0
