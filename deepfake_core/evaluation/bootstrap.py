"""Metrics of scores, on the images as they are and on bootstrap resamples of them. Positive means fake."""

import numpy as np

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
RESAMPLES = 1000
CALIBRATION_BINS = 15
WEIGHTS_AT_ONCE = 4_000_000
"""Image weights of resamples that are computed on at once, which bounds the memory."""


def draw_resamples(groups: np.ndarray, count: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Draw bootstrap resamples in which near copies are drawn together.

    Args:
        groups: group of each image, shape (n,).

    Returns:
        How often each image is in each resample: uint8 of shape (count, n).
    """
    _, group = np.unique(groups, return_inverse=True)
    number = group.max() + 1 if len(group) else 0
    random = np.random.default_rng(seed)
    weights = np.zeros((count, len(group)), np.uint8)
    step = max(1, WEIGHTS_AT_ONCE // max(1, number))
    for resamples in (weights[at : at + step] for at in range(0, count if number else 0, step)):
        cells = np.arange(len(resamples))[:, None] * number + random.integers(0, number, (len(resamples), number))
        resamples[:] = np.bincount(cells.ravel(), minlength=cells.size).reshape(cells.shape)[:, group]
    return weights


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
    found = _compute(np.asarray(labels), np.asarray(scores, np.float64), threshold, unweighted, sure)
    return {name: float(values[0]) for name, values in found.items()}


def resample_metrics(
    labels: np.ndarray, scores: np.ndarray, threshold: float, weights: np.ndarray, sure: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Compute each metric in each resample.

    Args:
        weights: how often each image counts, shape (b, n).

    Returns:
        By name, float64 of shape (b,); NaN where a class that the metric needs is missing.
    """
    step = max(1, WEIGHTS_AT_ONCE // max(1, len(labels)))
    chunks = [_compute(labels, scores, threshold, weights[at : at + step], sure) for at in range(0, len(weights), step)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in METRIC_TITLES}


def _compute(
    labels: np.ndarray, scores: np.ndarray, threshold: float, weights: np.ndarray, sure: np.ndarray | None
) -> dict[str, np.ndarray]:
    order = np.argsort(-scores, kind="stable")
    labels, scores, weights = labels[order] == 1, scores[order], weights[:, order].astype(np.float64)
    fake, real = weights * labels, weights * ~labels
    fakes, reals = fake.sum(1), real.sum(1)
    total = fakes + reals
    called_fake = int((scores >= threshold).sum())
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
        surely_fake, surely_real = known & (scores >= threshold), known & (scores < threshold)
        accused, missed, all_sure = real @ surely_fake, fake @ surely_real, weights @ known
        metrics |= {"sure_share": all_sure / total, "error_when_sure": (accused + missed) / all_sure}
        metrics |= {"reals_surely_fake": accused / reals, "fakes_surely_real": missed / fakes}
    return metrics
