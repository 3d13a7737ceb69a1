"""Scores and labels become figures. Positive means fake."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn import metrics as sklearn_metrics

from deepfake_core.detector import Detector

if TYPE_CHECKING:
    from deepfake_core.batches import Images


@dataclass(frozen=True)
class Confusion:
    """The four counts at a threshold; every rate is derived from them, so that none can disagree."""

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int

    @classmethod
    def count(cls, labels: np.ndarray, scores: np.ndarray, threshold: float) -> "Confusion":
        """Count; a score at or above the threshold says fake."""
        fake, said_fake = np.asarray(labels) == 1, np.asarray(scores) >= threshold
        return cls(
            true_positives=int((fake & said_fake).sum()),
            false_positives=int((~fake & said_fake).sum()),
            true_negatives=int((~fake & ~said_fake).sum()),
            false_negatives=int((fake & ~said_fake).sum()),
        )

    @property
    def total(self) -> int:
        return self.true_positives + self.false_positives + self.true_negatives + self.false_negatives

    @property
    def accuracy(self) -> float:
        return _divide(self.true_positives + self.true_negatives, self.total)

    @property
    def precision(self) -> float:
        """Share of the images called fake that are; 0 if none was called so."""
        return _divide(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        """Share of the fakes that were called fake."""
        return _divide(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        return _divide(2 * self.true_positives, 2 * self.true_positives + self.false_positives + self.false_negatives)


def _divide(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


@dataclass(frozen=True)
class Evaluation:
    """How one model did on one set of images.

    `auc` and `average_precision` are None where a class is missing, since neither exists then.
    """

    confusion: Confusion
    auc: float | None
    average_precision: float | None
    sources: "dict[str, Evaluation]" = field(default_factory=dict)

    def flatten(self, prefix: str) -> dict[str, float]:
        """Return MLflow's names and values: `test/precision`, `test/<source>/precision`, …"""
        counts = {name: float(value) for name, value in asdict(self.confusion).items()}
        rates = {name: getattr(self.confusion, name) for name in ("accuracy", "precision", "recall", "f1")}
        curves = {"auc": self.auc, "average_precision": self.average_precision}
        own = {**counts, **rates, **{name: value for name, value in curves.items() if value is not None}}
        flat = {f"{prefix}/{name}": value for name, value in own.items()}
        for source, evaluation in self.sources.items():
            flat |= evaluation.flatten(f"{prefix}/{source}")
        return flat


def evaluate_scores(
    labels: np.ndarray, scores: np.ndarray, threshold: float, sources: pd.Series | None = None
) -> Evaluation:
    """Evaluate scores, overall and per source.

    Args:
        labels: int array of shape (n,): 0 real, 1 fake.
        scores: float array of shape (n,): P(fake).
        threshold: scores at or above it say fake.
        sources: name of each image's source.
    """
    both = len(np.unique(labels)) == 2
    per_source = {}
    if sources is not None:
        for source in sorted(sources.unique()):
            mine = (sources == source).to_numpy()
            per_source[source] = evaluate_scores(labels[mine], scores[mine], threshold)
    return Evaluation(
        confusion=Confusion.count(labels, scores, threshold),
        auc=float(sklearn_metrics.roc_auc_score(labels, scores)) if both else None,
        average_precision=float(sklearn_metrics.average_precision_score(labels, scores)) if both else None,
        sources=per_source,
    )


def evaluate_detector(detector: Detector, images: "Images") -> tuple[Evaluation, np.ndarray]:
    """Score a split with what will be served, and evaluate it at the detector's own threshold.

    Returns:
        The evaluation, and P(fake) per image as float32 of shape (n,).
    """
    scores = detector.score(images.pixels)
    return evaluate_scores(images.labels, scores, detector.threshold, images.rows["source"]), scores
