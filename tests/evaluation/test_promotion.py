import numpy as np
import pytest

from deepfake_core.config import PromotionParameters
from deepfake_core.evaluation.confusion import Confusion
from deepfake_core.evaluation.evaluation import Estimate, Evaluation
from deepfake_core.evaluation.promotion import Comparison, Scored, compare_scores, decide_promotion
from tests.builders import CHEAP, GOOD, NO_FLOORS, make_comparison, make_evaluation

FLOORS = PromotionParameters(min_precision=0.8, min_recall=0.7)
IMPRECISE = Confusion(true_positives=79, false_positives=21, true_negatives=80, false_negatives=20)
FORGETFUL = Confusion(true_positives=69, false_positives=1, true_negatives=99, false_negatives=31)


def accuse(low: float) -> Evaluation:
    source = Evaluation(GOOD, {"false_alarm_rate": Estimate(0.2, low, 0.3)})
    return Evaluation(GOOD, {}, {"source": {"a": source}})


def bought(low: float) -> Comparison:
    """Compare with a production of much higher recall, and false alarms from `low` up."""
    theirs = {"recall": Estimate(0.95, 0.9, 1.0), "false_alarm_rate": Estimate(0.3, low, 0.4)}
    production = Evaluation(GOOD, make_evaluation().metrics, {"source": {"a": Evaluation(GOOD, theirs)}})
    return Comparison(make_evaluation(), production, "auc", Estimate(0.1, 0.01, 0.2), 1.0)


NO_CLASS = Comparison(make_evaluation(), make_evaluation(), "auc", None, 0.0)


@pytest.mark.parametrize(
    ("case", "promoted", "reason"),
    [
        pytest.param({}, True, "met: no production model yet", id="the first version"),
        pytest.param(
            {"compared": make_comparison(0.95)},
            True,
            "met: AUC 0.9000, production's 0.8500",
            id="better than production",
        ),
        pytest.param(
            {"compared": make_comparison(0.949)},
            False,
            "NOT met: AUC 0.9000, production's 0.8500",
            id="perhaps by chance",
        ),
        pytest.param(
            {"compared": make_comparison(0.949), "min_probability": 0.9},
            True,
            "at least 0.9 is needed",
            id="less certainty is asked for",
        ),
        pytest.param(
            {"compared": make_comparison(0.03, other=0.95)}, False, "probability 0.030", id="worse than production"
        ),
        pytest.param(
            {"challenger": make_evaluation(IMPRECISE)},
            False,
            "NOT met: precision 0.7900, floor 0.8000",
            id="misses the precision floor",
        ),
        pytest.param(
            {"challenger": make_evaluation(FORGETFUL)},
            False,
            "NOT met: recall 0.6900, floor 0.7000",
            id="misses the recall floor",
        ),
        pytest.param(
            {"challenger": make_evaluation(IMPRECISE), "compared": make_comparison(1.0)},
            False,
            "NOT met: precision 0.7900",
            id="better, but misses a floor",
        ),
        pytest.param(
            {"challenger": accuse(0.121)},
            False,
            "NOT met: false alarms on a 0.200 (0.121 to 0.300), ceiling 0.12",
            id="accuses too many of a source",
        ),
        pytest.param({"challenger": accuse(0.12)}, True, "met: false alarms on a 0.200", id="perhaps accuses too many"),
        pytest.param(
            {"compared": bought(0.121)},
            True,
            "recall on a 0.8000, not compared since production has too many false alarms there: 0.300 (0.121 to 0.400)",
            id="production accuses too many",
        ),
        pytest.param({"compared": bought(0.12)}, False, "NOT met: recall on a 0.8000", id="production accuses few"),
        # production's recall on the source is 0.8 (0.7 to 0.9): 0.65 is the least
        pytest.param(
            {"compared": make_comparison(1.0, recall=0.651)},
            True,
            "met: recall on a 0.6510, at least 0.6500",
            id="a source's recall falls as far as it may",
        ),
        pytest.param(
            {"compared": make_comparison(1.0, recall=0.649)},
            False,
            "NOT met: recall on a 0.6490",
            id="a source's recall falls too far",
        ),
        pytest.param(
            {"compared": make_comparison(1.0, recall=0.649), "max_recall_drop": 0.1},
            True,
            "met: recall on a",
            id="a source's recall may fall further",
        ),
        pytest.param({"max_latency": 4.9}, False, "NOT met: 5.0 ms an image, ceiling 4.9 ms", id="too slow"),
        pytest.param({"max_latency": 5}, True, "met: 5.0 ms", id="just fast enough"),
        pytest.param({"max_size": 9}, False, "NOT met: 10.0 MB, ceiling 9 MB", id="too large"),
        pytest.param(
            {"compared": make_comparison(1.0), "blockers": ("drawn",)},
            False,
            "NOT met: drawn",
            id="better, but blocked",
        ),
        pytest.param({"compared": NO_CLASS}, False, "NOT met: AUC needs both classes", id="nothing to compare on"),
    ],
)
def test_decision(case, promoted, reason):
    changes = {name: value for name, value in case.items() if name in PromotionParameters.model_fields}
    decision = decide_promotion(
        case.get("challenger", make_evaluation()),
        case.get("compared"),
        CHEAP,
        FLOORS.model_copy(update=changes),
        case.get("blockers", ()),
    )
    assert decision.promoted is promoted
    assert reason in decision.text


def test_no_ceiling_holds_for_confirmed_reports_which_are_chosen_for_their_false_alarms():
    source = accuse(0.9).sources["a"]
    challenger = Evaluation(GOOD, {}, {"source": {"feedback": source}})
    assert decide_promotion(challenger, None, CHEAP, FLOORS).promoted
    assert not decide_promotion(Evaluation(GOOD, {}, {"source": {"a": source}}), None, CHEAP, FLOORS).promoted


def test_the_description_names_both_versions():
    text = decide_promotion(make_evaluation(), make_comparison(1.0), CHEAP, FLOORS).describe("m", "7", "5")
    assert "m version 7 is now in production" in text
    assert "Version 5 was in production." in text


def draw_models(random, count=80, gain=0.0):
    """Return labels, columns, and two models' scores: equally good, but for the first one's gain."""
    labels = np.arange(count) % 2
    face = random.normal(0, 0.7, count)
    scores = [
        1 / (1 + np.exp(-(2 + extra) * (labels - 0.5) - face - random.normal(0, 0.7, count))) for extra in (gain, 0)
    ]
    columns = {"source": ["a"] * count, "member": ["x.jpg"] * count, "group": range(count)}
    return labels, columns, *(Scored(one, 0.5) for one in scores)


def test_a_model_never_replaces_itself():
    labels, columns, model, _ = draw_models(np.random.default_rng(0))
    compared = compare_scores(labels, columns, model, model)
    assert compared.difference == Estimate(0, 0, 0)
    assert not decide_promotion(compared.challenger, compared, CHEAP, NO_FLOORS).promoted


def count_promotions(repeats: int, gain: float) -> int:
    random = np.random.default_rng(1)
    promoted = 0
    for _ in range(repeats):
        labels, columns, ours, theirs = draw_models(random, gain=gain)
        compared = compare_scores(labels, columns, ours, theirs)
        promoted += decide_promotion(compared.challenger, compared, CHEAP, NO_FLOORS).promoted
    return promoted


@pytest.mark.sweep
def test_of_1000_retrains_of_equally_good_models_at_most_50_are_promoted():
    assert count_promotions(1000, gain=0) <= 50


@pytest.mark.slow
def test_a_much_better_model_is_promoted():
    assert count_promotions(20, gain=3) == 20


def test_what_production_learned_is_left_out_for_both():
    labels, columns, ours, theirs = draw_models(np.random.default_rng(2))
    left_out = np.arange(len(labels)) < 40
    kept = {name: list(values)[40:] for name, values in columns.items()}
    compared = compare_scores(labels, columns, ours, theirs, left_out=left_out)
    alone = compare_scores(labels[40:], kept, Scored(ours.scores[40:], 0.5), Scored(theirs.scores[40:], 0.5))
    assert compared.left_out == 40
    assert (compared.challenger, compared.production) == (alone.challenger, alone.production)
    assert compare_scores(labels, columns, ours, theirs, left_out=labels == 1).difference is None


def test_each_is_judged_at_its_own_threshold():
    labels, columns, ours, _ = draw_models(np.random.default_rng(3))
    compared = compare_scores(labels, columns, ours, Scored(ours.scores, 0.9))
    assert compared.challenger.confusion == Confusion.count(labels, ours.scores, 0.5)
    assert compared.production.confusion == Confusion.count(labels, ours.scores, 0.9)


CLOSE, FAR = make_comparison(0.94), make_comparison(0.79)


@pytest.mark.parametrize(
    ("approval", "case", "expected"),
    [
        ("never", {"comparison": CLOSE}, "not promoted"),
        ("borderline", {"comparison": CLOSE}, "waits for approval"),
        ("borderline", {"comparison": FAR}, "not promoted"),
        ("borderline", {"comparison": CLOSE, "blockers": ["drawn images"]}, "not promoted"),
        ("borderline", {"challenger": make_evaluation(IMPRECISE), "comparison": CLOSE}, "not promoted"),
        ("borderline", {"comparison": make_comparison(0.99)}, "promoted"),
        ("borderline", {"comparison": None}, "promoted"),
        ("always", {"comparison": None}, "waits for approval"),
        ("always", {"comparison": make_comparison(0.99)}, "waits for approval"),
        ("always", {"comparison": CLOSE}, "waits for approval"),
        ("always", {"comparison": FAR}, "not promoted"),
        ("always", {"comparison": NO_CLASS}, "not promoted"),
    ],
)
def test_a_person_decides_about_what_is_close_or_about_all_that_would_be_promoted(approval, case, expected):
    parameters = FLOORS.model_copy(update={"approval": approval})
    decision = decide_promotion(**({"challenger": make_evaluation(), "cost": CHEAP, "parameters": parameters} | case))
    assert decision.name == expected
    assert decision.promoted == (expected == "promoted")
    text = decision.describe("m", "2", "1")
    assert text.startswith(f"## m version 2 {'is now in production' if decision.promoted else ''}")
