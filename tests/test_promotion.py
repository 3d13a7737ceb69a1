import pytest

from deepfake_core.config import PromotionParameters
from deepfake_core.metrics import Confusion, Evaluation
from deepfake_core.promotion import decide_promotion

FLOORS = PromotionParameters(min_precision=0.8, min_recall=0.7)
GOOD = Confusion(true_positives=80, false_positives=20, true_negatives=80, false_negatives=20)
IMPRECISE = Confusion(true_positives=79, false_positives=21, true_negatives=80, false_negatives=20)
FORGETFUL = Confusion(true_positives=69, false_positives=1, true_negatives=99, false_negatives=31)


def evaluation(confusion: Confusion, auc: float) -> Evaluation:
    return Evaluation(confusion, auc, auc)


@pytest.mark.parametrize(
    ("challenger", "production", "blockers", "promoted", "reason"),
    [
        (evaluation(GOOD, 0.9), None, (), True, "met: no production model yet"),
        (evaluation(GOOD, 0.9), evaluation(GOOD, 0.89), (), True, "met: AUC 0.9000, production's 0.8900"),
        (evaluation(GOOD, 0.9), evaluation(GOOD, 0.9), (), False, "NOT met: AUC 0.9000, production's 0.9000"),
        (evaluation(GOOD, 0.9), evaluation(GOOD, 0.91), (), False, "NOT met: AUC 0.9000, production's 0.9100"),
        (evaluation(IMPRECISE, 0.9), None, (), False, "NOT met: precision 0.7900, floor 0.8000"),
        (evaluation(FORGETFUL, 0.9), None, (), False, "NOT met: recall 0.6900, floor 0.7000"),
        (evaluation(GOOD, 0.9), evaluation(GOOD, 0.5), ("drawn",), False, "NOT met: drawn"),
    ],
)
def test_decision(challenger, production, blockers, promoted, reason):
    decision = decide_promotion(challenger, production, FLOORS, blockers)
    assert decision.promoted is promoted
    assert reason in decision.text


def test_the_description_names_both_versions():
    text = decide_promotion(evaluation(GOOD, 0.9), evaluation(GOOD, 0.8), FLOORS).describe("m", "7", "5")
    assert "m version 7 is now in production" in text
    assert "Version 5 was in production." in text
