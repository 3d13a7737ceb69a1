"""Whether a challenger goes into production: a pure function of metrics on images that neither model has learned."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deepfake_core.config import FEEDBACK, NOT_PROMOTED, PROMOTED, WAITS, PrimaryMetric, PromotionParameters
from deepfake_core.detector import Detector
from deepfake_core.evaluation.bootstrap import draw_resamples, resample_metrics
from deepfake_core.evaluation.evaluation import Estimate, Evaluation, evaluate_scores
from deepfake_core.evaluation.metrics import METRIC_TITLES
from deepfake_core.evaluation.parts import Rows

if TYPE_CHECKING:
    from deepfake_core.evaluation.regression import Regression

REASON_SEPARATOR = "; "
"""Between the reasons of a decision, where they are stored as one text."""

NOT_MET = "NOT met"
"""How a reason against a promotion begins."""


@dataclass(frozen=True)
class Scored:
    """A model's scores, P(fake) per image, and its own threshold."""

    scores: np.ndarray
    threshold: float


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images.

    Attributes:
        metric: name of the metric that decides.
        difference: the challenger's minus production's; None if a class is missing.
        probability: that the challenger is better, by the paired bootstrap: the share of resamples in which it is,
            ties counted half, less what a limited number of resamples may err by (one-sided, 95 %).
        left_out: images left out for both, since production was trained on them or on near copies, or since its
            mistakes chose them (confirmed reports).
    """

    challenger: Evaluation
    production: Evaluation
    metric: PrimaryMetric
    difference: Estimate | None
    probability: float
    left_out: int = 0


@dataclass(frozen=True)
class Cost:
    """What a model costs to serve: milliseconds for one image on this CPU, and megabytes of `model.onnx`."""

    latency: float
    size: float


MIN_BORDERLINE_PROBABILITY = 0.8
"""From this probability of being better on, a person may promote a challenger that the rule refuses."""


class Check(NamedTuple):
    """One condition of the rule.

    Attributes:
        is_close: whether a challenger that fails it may still be promoted by a person (`promotion.approval`).
    """

    passed: bool
    text: str
    is_close: bool = False


@dataclass(frozen=True)
class PromotionDecision:
    """Promote or not, and every reason, readable on its own.

    Attributes:
        waits: whether a person decides; it is not promoted until then.
    """

    promoted: bool
    reasons: tuple[str, ...]
    waits: bool = False

    @property
    def name(self) -> str:
        return WAITS if self.waits else PROMOTED if self.promoted else NOT_PROMOTED

    @property
    def text(self) -> str:
        return REASON_SEPARATOR.join(self.reasons)

    def describe(self, model_name: str, version: str, production: str | None) -> str:
        """Return the decision as Markdown."""
        verdict = {PROMOTED: "is now in production", NOT_PROMOTED: "was not promoted", WAITS: WAITS}[self.name]
        before = f"Version {production} was in production." if production else "There was no production model."
        reasons = "\n".join(f"- {reason}" for reason in self.reasons)
        return f"## {model_name} version {version} {verdict}\n\n{before}\n\n{reasons}\n"


def measure_cost(detector: Detector) -> Cost:
    """Measure a detector: the median time of one image among 10, after one that is not counted."""
    image = np.zeros((1, detector.image_size, detector.image_size, 3), np.uint8)
    seconds = []
    for _ in range(11):
        start = time.perf_counter()
        detector.score(image)
        seconds.append(time.perf_counter() - start)
    return Cost(latency=1000 * statistics.median(seconds[1:]), size=detector.size / 1e6)


def compare_scores(
    labels: np.ndarray,
    rows: Rows,
    challenger: Scored,
    production: Scored,
    metric: PrimaryMetric = "auc",
    left_out: Sequence[bool] | np.ndarray = (),
) -> Comparison:
    """Compare two models on the same images and the same resamples of them.

    The paired bootstrap: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 16.4; near copies are
    resampled together.

    Args:
        labels: int array of shape (n,): 0 real, 1 fake.
        rows: columns `source`, `member` and `group` of the manifest, as a table or a mapping, n long.
        left_out: mask of shape (n,) of images to leave out for both.
    """
    keep = ~np.asarray(left_out, bool) if len(left_out) else np.ones(len(labels), bool)
    labels = np.asarray(labels)[keep]
    columns = {name: np.asarray(rows[name])[keep] for name in ("source", "member", "group")}
    weights = draw_resamples(columns["group"])
    sides = [np.asarray(one.scores, np.float64)[keep] for one in (challenger, production)]
    thresholds = [challenger.threshold, production.threshold]
    resampled = [
        resample_metrics(labels, scores, threshold, weights)
        for scores, threshold in zip(sides, thresholds, strict=True)
    ]
    evaluations = [
        evaluate_scores(labels, scores, threshold, columns, weights, metrics)
        for scores, threshold, metrics in zip(sides, thresholds, resampled, strict=True)
    ]
    difference, probability = None, 0.0
    if all(metric in evaluation.metrics for evaluation in evaluations):
        ours, theirs = (metrics[metric] for metrics in resampled)
        gain = (ours - theirs)[~np.isnan(ours - theirs)]
        values = [evaluation.metrics[metric].value for evaluation in evaluations]
        difference = Estimate.summarise(values[0] - values[1], gain)
        share = float(np.mean(gain > 0) + np.mean(gain == 0) / 2)
        probability = max(0.0, share - 1.645 * (share * (1 - share) / len(gain)) ** 0.5)
    return Comparison(evaluations[0], evaluations[1], metric, difference, probability, left_out=int((~keep).sum()))


def decide_promotion(
    challenger: Evaluation,
    comparison: Comparison | None,
    cost: Cost,
    parameters: PromotionParameters,
    blockers: Sequence[str] = (),
    regression: "Regression | None" = None,
) -> PromotionDecision:
    """Promote a challenger that meets the floors and beats production by more than chance, at no source's cost.

    Args:
        challenger: the new model on the whole test split.
        comparison: it and production on the same images; None if there is no production yet.
        blockers: reasons that forbid promotion, whatever the metrics.
        regression: both on images of confirmed reports that neither has learned.
    """
    reached = challenger.confusion
    checks = [
        *(Check(False, blocker) for blocker in blockers),
        Check(
            reached.precision >= parameters.min_precision,
            f"precision {reached.precision:.4f}, floor {parameters.min_precision:.4f}",
        ),
        Check(
            reached.recall >= parameters.min_recall,
            f"recall {reached.recall:.4f}, floor {parameters.min_recall:.4f}",
        ),
    ]
    checks += [
        Check(
            part.metrics["false_alarm_rate"].low <= parameters.max_false_alarm_rate,
            f"false alarms on {source} {part.metrics['false_alarm_rate']}, ceiling {parameters.max_false_alarm_rate:g} "
            "for the interval's lower end",
        )
        for source, part in challenger.sources.items()
        if "false_alarm_rate" in part.metrics and source != FEEDBACK  # false alarms are what these are reported for
    ]
    if parameters.max_latency is not None:
        text = f"{cost.latency:.1f} ms an image, ceiling {parameters.max_latency:g} ms"
        checks.append(Check(cost.latency <= parameters.max_latency, text))
    if parameters.max_size is not None:
        text = f"{cost.size:.1f} MB, ceiling {parameters.max_size:g} MB"
        checks.append(Check(cost.size <= parameters.max_size, text))
    checks += (
        [Check(True, "no production model yet")] if comparison is None else _check_comparison(comparison, parameters)
    )
    checks += [Check(*checked, is_close=True) for checked in regression.check()] if regression else []
    passed = all(check.passed for check in checks)
    close = not passed and all(check.passed or check.is_close for check in checks)
    waits = {"never": False, "borderline": close, "always": close or passed}[parameters.approval]
    return PromotionDecision(
        promoted=passed and not waits,
        reasons=tuple(f"{'met' if check.passed else NOT_MET}: {check.text}" for check in checks),
        waits=waits,
    )


def _check_comparison(comparison: Comparison, parameters: PromotionParameters) -> list[Check]:
    images = comparison.challenger.confusion.total
    if comparison.difference is None:
        return [
            Check(
                False,
                f"{METRIC_TITLES[comparison.metric]} needs both classes among the {images} images new to production",
            )
        ]
    ours, theirs = (one.metrics[comparison.metric].value for one in (comparison.challenger, comparison.production))
    checks = [
        Check(
            comparison.probability >= parameters.min_probability,
            f"{METRIC_TITLES[comparison.metric]} {ours:.4f}, production's {theirs:.4f} on the same {images} images, "
            f"better with probability {comparison.probability:.3f}, at least {parameters.min_probability:g} is needed",
            is_close=comparison.probability >= MIN_BORDERLINE_PROBABILITY,
        )
    ]
    for source, part in comparison.challenger.sources.items():
        if "recall" not in part.metrics:
            continue
        recall, other = part.metrics["recall"].value, comparison.production.sources[source].metrics
        accused = other.get("false_alarm_rate")
        if accused and accused.low > parameters.max_false_alarm_rate:
            checks.append(
                Check(
                    True,
                    f"recall on {source} {recall:.4f}, not compared since production has too many false alarms there: "
                    f"{accused}",
                )
            )
            continue
        lowest = max(0.0, other["recall"].low - parameters.max_recall_drop)
        checks.append(Check(recall >= lowest, f"recall on {source} {recall:.4f}, at least {lowest:.4f} is needed"))
    return checks
