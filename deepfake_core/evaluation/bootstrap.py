"""Bootstrap resamples of images, and the metrics on each of them."""

import numpy as np

from deepfake_core.evaluation.metrics import METRIC_TITLES, compute_weighted_metrics

RESAMPLES = 1000
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
    chunks = [
        compute_weighted_metrics(labels, scores, threshold, weights[at : at + step], sure)
        for at in range(0, len(weights), step)
    ]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in METRIC_TITLES}
