"""The four counts of verdicts at a threshold, and the rates that follow from them. Positive means fake."""

from dataclasses import dataclass

import numpy as np

from deepfake_core.detector import call_fake


@dataclass(frozen=True)
class Confusion:
    """The four counts at a threshold; every rate is derived from them, so that none can disagree."""

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int

    @classmethod
    def count(cls, labels: np.ndarray, scores: np.ndarray, threshold: float) -> "Confusion":
        """Count; a score at or above the threshold means fake."""
        fake, called_fake = np.asarray(labels) == 1, call_fake(scores, threshold)
        return cls(
            true_positives=int((fake & called_fake).sum()),
            false_positives=int((~fake & called_fake).sum()),
            true_negatives=int((~fake & ~called_fake).sum()),
            false_negatives=int((fake & ~called_fake).sum()),
        )

    @property
    def fakes(self) -> int:
        return self.true_positives + self.false_negatives

    @property
    def reals(self) -> int:
        return self.true_negatives + self.false_positives

    @property
    def total(self) -> int:
        return self.fakes + self.reals

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
        return _divide(self.true_positives, self.fakes)

    @property
    def false_alarm_rate(self) -> float:
        """Share of the reals that were called fake."""
        return _divide(self.false_positives, self.reals)

    @property
    def f1(self) -> float:
        return _divide(2 * self.true_positives, 2 * self.true_positives + self.false_positives + self.false_negatives)


def _divide(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
