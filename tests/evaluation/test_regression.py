"""The rule on confirmed reports: an exact paired test, in which near copies count once."""

import hashlib

import numpy as np
import pytest
from scipy.stats import binomtest

from deepfake_core.config import PromotionParameters
from deepfake_core.evaluation.promotion import decide_promotion
from deepfake_core.evaluation.regression import MAX_IMAGES_NAMED, MAX_REGRESSION_P, Regression, ReportedImage
from tests.builders import CHEAP, NO_FLOORS, make_comparison, make_evaluation


def image(number: int, after: bool, before: bool | None, group: int | None = None) -> ReportedImage:
    """Make an image that the models have wrong or not."""
    sha256 = hashlib.sha256(str(number).encode()).hexdigest()
    group_name = str(number if group is None else group)
    return ReportedImage(sha256, group_name, "feedback", f"fake/{sha256}.jpg", "fake", "a", 0.5, after, 0.5, before)


def count(worse: int, better: int, both: int = 0) -> Regression:
    changes = [(True, False)] * worse + [(False, True)] * better + [(True, True)] * both
    return Regression(tuple(image(number, *sides) for number, sides in enumerate(changes)))


def decide(regression: Regression, parameters: PromotionParameters = NO_FLOORS):
    better = make_comparison(1.0)
    return decide_promotion(make_evaluation(), better, CHEAP, parameters, regression=regression)


def test_the_test_is_scipys():
    for worse in range(12):
        for better in range(12):
            tosses = worse + better
            expected = binomtest(worse, tosses, alternative="greater").pvalue if tosses else 1.0
            assert count(worse, better, both=3).p_value == pytest.approx(expected)
    assert count(600, 500).p_value == pytest.approx(binomtest(600, 1100, alternative="greater").pvalue)


@pytest.mark.parametrize(
    ("worse", "better", "promoted"), [(4, 0, True), (5, 0, False), (6, 1, True), (7, 1, False), (0, 9, True)]
)
def test_a_challenger_with_more_mistakes_than_chance_explains_is_refused(worse, better, promoted):
    decision = decide(count(worse, better, both=2))
    assert decision.promoted is promoted
    text = f"confirmed reports: wrong on {worse + 2} of {worse + better + 2}, production on {better + 2}, so much worse"
    assert decision.reasons[-1].startswith(f"{'met' if promoted else 'NOT met'}: {text}")
    assert ("wrong in this version alone" in decision.text) is not promoted


def test_at_most_ten_images_are_named():
    few, many = count(MAX_IMAGES_NAMED, 0), count(MAX_IMAGES_NAMED + 7, 0)
    names = ", ".join(one.sha256[:12] for one in few.images)
    assert decide(few).text.endswith(f"alone: {names}")
    assert decide(many).text.endswith(f"alone: {names} and 7 more")


def test_without_production_or_confirmed_reports_the_rule_says_nothing():
    alone = Regression(tuple(image(number, True, None) for number in range(20)))
    for regression in (None, Regression(), alone):
        assert decide_promotion(make_evaluation(), None, CHEAP, NO_FLOORS, regression=regression).promoted
        assert "confirmed reports" not in decide(regression).text
    assert alone.flatten() == {"regression/images": 20, "regression/wrong": 20}


def test_near_copies_count_once():
    copies = [image(number, True, False, group=0) for number in range(30)]
    assert Regression(tuple(copies)).p_value == 0.5
    mixed = [image(30, False, True, group=0), *copies[:1]]
    assert Regression(tuple(mixed)).p_value == 1.0


def test_of_equally_good_models_at_most_the_stated_share_is_refused():
    """Mistakes of both go together, and those of near copies are the same."""
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(2000):
        sizes = random.integers(1, 6, 60)
        hard = random.random(60)
        after, before = random.random((2, 60)) < hard
        images = [
            image(number, bool(after[group]), bool(before[group]), group)
            for number, group in enumerate(np.repeat(np.arange(60), sizes))
        ]
        refused += Regression(tuple(images)).p_value < MAX_REGRESSION_P
    assert 0 < refused <= 2000 * MAX_REGRESSION_P


def test_a_much_worse_model_is_refused():
    random = np.random.default_rng(1)
    after, before = random.random((2, 200, 60)) < np.array([0.6, 0.2])[:, None, None]
    refused = [
        not decide(
            Regression(tuple(image(n, bool(a), bool(b)) for n, (a, b) in enumerate(zip(*one, strict=True))))
        ).promoted
        for one in zip(after, before, strict=True)
    ]
    assert np.mean(refused) > 0.95
