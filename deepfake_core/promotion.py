"""Whether a challenger goes into production: a pure function of two evaluations."""

from collections.abc import Sequence
from dataclasses import dataclass

from deepfake_core.config import PromotionParameters
from deepfake_core.metrics import Evaluation


@dataclass(frozen=True)
class Decision:
    """Promote or not, and every reason, readable on its own."""

    promoted: bool
    reasons: tuple[str, ...]

    @property
    def text(self) -> str:
        return "; ".join(self.reasons)

    def describe(self, model_name: str, version: str, production: str | None) -> str:
        """Return the decision as Markdown."""
        verdict = "is now in production" if self.promoted else "was not promoted"
        before = f"Version {production} was in production." if production else "There was no production model."
        reasons = "\n".join(f"- {reason}" for reason in self.reasons)
        return f"## {model_name} version {version} {verdict}\n\n{before}\n\n{reasons}\n"


def decide_promotion(
    challenger: Evaluation,
    production: Evaluation | None,
    parameters: PromotionParameters,
    blockers: Sequence[str] = (),
) -> Decision:
    """Promote a challenger that meets the floors and has a higher AUC than production.

    Args:
        challenger: the new model on the test split.
        production: the production model on the same images; None if there is none yet.
        blockers: reasons that forbid promotion, whatever the figures.
    """
    reached = challenger.confusion
    checks = [
        *((False, blocker) for blocker in blockers),
        (
            reached.precision >= parameters.min_precision,
            f"precision {reached.precision:.4f}, floor {parameters.min_precision:.4f}",
        ),
        (
            reached.recall >= parameters.min_recall,
            f"recall {reached.recall:.4f}, floor {parameters.min_recall:.4f}",
        ),
    ]
    if production is None:
        checks.append((True, "no production model yet"))
    else:
        assert challenger.auc is not None and production.auc is not None  # every split holds both classes
        checks.append(
            (
                challenger.auc > production.auc,
                f"AUC {challenger.auc:.4f}, production's {production.auc:.4f} on the same images "
                "(a tie keeps production)",
            )
        )
    return Decision(
        promoted=all(passed for passed, _ in checks),
        reasons=tuple(f"{'met' if passed else 'NOT met'}: {text}" for passed, text in checks),
    )
