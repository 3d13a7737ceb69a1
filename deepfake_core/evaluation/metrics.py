"""The metrics: their names, titles and formulas. Positive means fake."""

import numpy as np

from deepfake_core.detector import call_fake

METRIC_TITLES = {
    "false_alarm_rate": "false alarms",
    "recall": "recall",
    "precision": "precision",
    "accuracy": "accuracy",
    "f1": "F1",
    "auc": "AUC",
    "average_precision": "average precision",
    "recall_at_1_percent_fpr": "recall at 1 % false alarms",
    "recall_at_5_percent_fpr": "recall at 5 % false alarms",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "sure_share": "sure",
    "error_when_sure": "wrong where sure",
    "reals_surely_fake": "reals surely called fake",
    "fakes_surely_real": "fakes surely called real",
}
"""The metrics: their names in code and MLflow, and in reports."""

SURE_METRICS = ("sure_share", "error_when_sure", "reals_surely_fake", "fakes_surely_real")
"""Those that need to know which verdicts are sure."""

FALSE_ALARM_RATES = {"recall_at_1_percent_fpr": 0.01, "recall_at_5_percent_fpr": 0.05}
CALIBRATION_BINS = 15


def compute_metrics(
    labels: np.ndarray, scores: np.ndarray, threshold: float, sure: np.ndarray | None = None
) -> dict[str, float]:
    """Compute each metric; NaN where a class that it needs is missing.

    Args:
        labels: int array of shape (n,): 0 real, 1 fake.
        scores: float array of shape (n,): P(fake).
        threshold: scores at or above it mean fake.
        sure: mask of shape (n,) of the verdicts that are sure; None where no one knows.
    """
    unweighted = np.ones((1, len(labels)), np.uint8)
    found = compute_weighted_metrics(np.asarray(labels), np.asarray(scores, np.float64), threshold, unweighted, sure)
    return {name: float(values[0]) for name, values in found.items()}


def compute_weighted_metrics(
    labels: np.ndarray, scores: np.ndarray, threshold: float, weights: np.ndarray, sure: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Compute each metric as `compute_metrics` does, once for each row of weights.

    Args:
        weights: how often each image counts, shape (b, n).

    Returns:
        By name, float64 of shape (b,); NaN where a class that the metric needs is missing.
    """
    order = np.argsort(-scores, kind="stable")
    labels, scores, weights = labels[order] == 1, scores[order], weights[:, order].astype(np.float64)
    fake, real = weights * labels, weights * ~labels
    fakes, reals = fake.sum(1), real.sum(1)
    total = fakes + reals
    is_called_fake = call_fake(scores, threshold)
    called_fake = int(is_called_fake.sum())
    hits, alarms = fake[:, :called_fake].sum(1), real[:, :called_fake].sum(1)

    # One column per distinct score, from the highest down: what is called fake at that threshold.
    starts = np.flatnonzero(np.diff(scores, prepend=np.inf))
    fake_at, real_at = np.add.reduceat(fake, starts, axis=1), np.add.reduceat(real, starts, axis=1)
    hits_to, alarms_to = fake_at.cumsum(1), real_at.cumsum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision_to = np.where(hits_to + alarms_to > 0, hits_to / (hits_to + alarms_to), 0)
        metrics = {
            "accuracy": (hits + reals - alarms) / total,
            "false_alarm_rate": alarms / reals,
            "precision": np.where(hits + alarms > 0, hits / (hits + alarms), np.where(total > 0, 0, np.nan)),
            "recall": hits / fakes,
            "f1": 2 * hits / (fakes + hits + alarms),
            # Bamber 1975: the share of pairs in the right order, ties counted half.
            "auc": (real_at * (hits_to - fake_at / 2)).sum(1) / (fakes * reals),
            "average_precision": np.where(reals > 0, (fake_at * precision_to).sum(1) / fakes, np.nan),
        }
        for name, rate in FALSE_ALARM_RATES.items():
            within = (alarms_to <= rate * reals[:, None] + 1e-9).sum(1)
            reached = np.take_along_axis(hits_to, np.maximum(within - 1, 0)[:, None], 1)[:, 0]
            metrics[name] = np.where(reals > 0, np.where(within > 0, reached, 0) / fakes, np.nan)
        metrics["brier"] = weights @ np.square(scores - labels) / total
        bins = np.minimum((scores * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        members = (bins[:, None] == np.arange(CALIBRATION_BINS)).astype(np.float64)
        # Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2: bins of equal width.
        metrics["ece"] = np.abs((weights * (scores - labels)) @ members).sum(1) / total
        if sure is None:
            return metrics | dict.fromkeys(SURE_METRICS, np.full(len(weights), np.nan))
        known = np.asarray(sure, bool)[order]
        surely_fake, surely_real = known & is_called_fake, known & ~is_called_fake
        accused, missed, all_sure = real @ surely_fake, fake @ surely_real, weights @ known
        metrics |= {"sure_share": all_sure / total, "error_when_sure": (accused + missed) / all_sure}
        metrics |= {"reals_surely_fake": accused / reals, "fakes_surely_real": missed / fakes}
    return metrics
