"""Scores and labels become metrics, each with an interval. Positive means fake."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deepfake_core.detector import Detector
from deepfake_core.evaluation.bootstrap import METRIC_TITLES, compute_metrics, draw_resamples, resample_metrics
from deepfake_core.evaluation.parts import Rows, find_parts

if TYPE_CHECKING:
    from deepfake_core.data.images import Images


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
        fake, called_fake = np.asarray(labels) == 1, np.asarray(scores) >= threshold
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
    def f1(self) -> float:
        return _divide(2 * self.true_positives, 2 * self.true_positives + self.false_positives + self.false_negatives)


def _divide(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @classmethod
    def summarise(cls, value: float, resampled: np.ndarray) -> "Estimate":
        """Take the percentile interval (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).

        Args:
            resampled: the metric in each resample, shape (b,); NaN where it did not exist.
        """
        resampled = resampled[~np.isnan(resampled)]
        low, high = np.percentile(resampled, (2.5, 97.5)) if len(resampled) else (value, value)
        return cls(float(value), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Evaluation:
    """How one model did on one set of images.

    Attributes:
        metrics: estimates by name (`METRIC_TITLES`); without those that do not exist, such as the AUC of a single
            class.
        parts: evaluations of parts of the images, by kind (`source`, `origin`, `edit`) and name.
    """

    confusion: Confusion
    metrics: Mapping[str, Estimate]
    parts: "Mapping[str, Mapping[str, Evaluation]]" = field(default_factory=dict)

    @property
    def auc(self) -> float | None:
        return self._get("auc")

    @property
    def average_precision(self) -> float | None:
        return self._get("average_precision")

    def _get(self, name: str) -> float | None:
        return self.metrics[name].value if name in self.metrics else None

    @property
    def sources(self) -> "Mapping[str, Evaluation]":
        return self.parts.get("source", {})

    def flatten(self, prefix: str) -> dict[str, float]:
        """Return MLflow's names and values: `test/auc`, `test/auc_low`, `test/auc_high`, `test/<source>/auc`, …

        Parts by origin and edit are left to `list_rows`.
        """
        flat = {f"{prefix}/{name}": float(value) for name, value in asdict(self.confusion).items()}
        for name, estimate in self.metrics.items():
            flat[f"{prefix}/{name}"] = estimate.value
            flat[f"{prefix}/{name}_low"], flat[f"{prefix}/{name}_high"] = estimate.low, estimate.high
        for source, evaluation in self.sources.items():
            flat |= evaluation.flatten(f"{prefix}/{source}")
        return flat

    @classmethod
    def unflatten(cls, prefix: str, flat: Mapping[str, float]) -> "Evaluation":
        """Make the whole's evaluation, without parts, of what `flatten` returned."""
        confusion = Confusion(**{one.name: int(flat[f"{prefix}/{one.name}"]) for one in fields(Confusion)})
        metrics = {
            name: Estimate(*(flat[f"{prefix}/{name}{end}"] for end in ("", "_low", "_high")))
            for name in METRIC_TITLES
            if f"{prefix}/{name}" in flat
        }
        return cls(confusion, metrics)

    def list_rows(self, kind: str = "all", name: str = "all") -> Iterator[dict[str, Any]]:
        """Yield a row for the whole and for each part: `kind`, `name`, counts, and each metric with low and high."""
        row: dict[str, Any] = {"kind": kind, "name": name, "images": self.confusion.total, **asdict(self.confusion)}
        for metric in METRIC_TITLES:
            estimate = self.metrics.get(metric)
            row[metric], row[f"{metric}_low"], row[f"{metric}_high"] = (
                (estimate.value, estimate.low, estimate.high) if estimate else (None, None, None)
            )
        yield row
        for kind, parts in self.parts.items():
            for name, part in parts.items():
                yield from part.list_rows(kind, name)


def evaluate_scores(
    labels: np.ndarray,
    scores: np.ndarray,
    threshold: float,
    rows: "Rows | None" = None,
    weights: np.ndarray | None = None,
    resampled: Mapping[str, np.ndarray] | None = None,
) -> Evaluation:
    """Evaluate scores, overall and for the parts that `find_parts` finds.

    Args:
        labels: int array of shape (n,): 0 real, 1 fake.
        scores: float array of shape (n,): P(fake).
        threshold: scores at or above it mean fake.
        rows: columns `source`, `member` and `group` of the manifest, as a table or a mapping, n long; without them,
            there are no parts and each image is its own group.
        weights: from `draw_resamples`; None draws them.
        resampled: from `resample_metrics` with these weights; None computes them.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    if weights is None:
        weights = draw_resamples(np.arange(len(labels)) if rows is None else np.asarray(rows["group"]))
    if resampled is None:
        resampled = resample_metrics(labels, scores, threshold, weights)
    whole = Evaluation(
        Confusion.count(labels, scores, threshold), estimate_metrics(labels, scores, threshold, resampled)
    )
    if rows is None:
        return whole

    def evaluate_part(part: np.ndarray) -> Evaluation:
        if part.all():
            return whole
        return evaluate_scores(labels[part], scores[part], threshold, weights=weights[:, part])

    kinds = find_parts(labels, rows)
    parts = {kind: {name: evaluate_part(part) for name, part in named.items()} for kind, named in kinds.items()}
    return replace(whole, parts=parts)


def evaluate_detector(detector: Detector, images: "Images") -> tuple[Evaluation, np.ndarray]:
    """Score a split with what will be served, and evaluate it at the detector's own threshold.

    Returns:
        The evaluation, and P(fake) per image as float32 of shape (n,).
    """
    scores = detector.score(images.pixels)
    return evaluate_scores(images.labels, scores, detector.threshold, images.rows), scores


def estimate_metrics(
    labels: np.ndarray, scores: np.ndarray, threshold: float, resampled: Mapping[str, np.ndarray]
) -> dict[str, Estimate]:
    """Compute each metric that exists on all images, and its interval over the resamples."""
    values = compute_metrics(labels, scores, threshold)
    return {
        name: Estimate.summarise(values[name], resampled[name]) for name in METRIC_TITLES if not np.isnan(values[name])
    }


def cross_sources(labels: np.ndarray, scores: np.ndarray, sources: np.ndarray) -> dict[str, dict[str, float]]:
    """Compute the AUC of each source's fakes (outer name) against each source's reals (inner name).

    Where one threshold means the same on every source, these agree; a source whose reals score like another's fakes
    shows here, and not in the AUC per source.
    """
    table: dict[str, dict[str, float]] = {}
    for fakes_of in sorted(set(sources[labels == 1])):
        for reals_of in sorted(set(sources[labels == 0])):
            chosen = ((labels == 1) & (sources == fakes_of)) | ((labels == 0) & (sources == reals_of))
            auc = compute_metrics(labels[chosen], scores[chosen], 0.5)["auc"]
            table.setdefault(str(fakes_of), {})[str(reals_of)] = auc
    return table
