"""Scores and labels become metrics, each with an interval. Positive means fake."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deepfake_core.detector import Detector
from deepfake_core.evaluation.bootstrap import draw_resamples, resample_metrics
from deepfake_core.evaluation.confusion import Confusion
from deepfake_core.evaluation.metrics import METRIC_TITLES, compute_metrics
from deepfake_core.evaluation.parts import Rows, find_parts
from deepfake_core.input_gate import ImageQuality

if TYPE_CHECKING:
    from deepfake_core.data.images import Images


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


def per_100(rate: Estimate) -> str:
    """Return a share as a number of 100, with its interval: `about 7 (4 to 11)`."""
    value, low, high = (f"{100 * one:.{1 if 0 < one < 0.0095 else 0}f}" for one in (rate.value, rate.low, rate.high))
    return f"about {value} ({low} to {high})"


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

    @property
    def mean_source_auc(self) -> float | None:
        """The mean AUC of the sources that have both classes, so that a large source outweighs no small one."""
        found = [one.auc for one in self.sources.values() if one.auc is not None]
        return sum(found) / len(found) if found else self.auc

    @property
    def in_words(self) -> str:
        """False alarms and recall, as a person would say them, with their intervals."""
        rates = {name: self.metrics.get(name) for name in ("false_alarm_rate", "recall")}
        texts = {"false_alarm_rate": "real images {} are called fake", "recall": "fakes {} are found"}
        found = [f"of 100 {texts[name].format(per_100(rate))}" for name, rate in rates.items() if rate]
        return ", ".join(found)

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
        """Make the evaluation of the whole and of each source of what `flatten` returned."""
        confusion = Confusion(**{one.name: int(flat[f"{prefix}/{one.name}"]) for one in fields(Confusion)})
        metrics = {
            name: Estimate(*(flat[f"{prefix}/{name}{end}"] for end in ("", "_low", "_high")))
            for name in METRIC_TITLES
            if f"{prefix}/{name}" in flat
        }
        start, end = f"{prefix}/", f"/{fields(Confusion)[0].name}"
        names = [key[len(start) : -len(end)] for key in flat if key.startswith(start) and key.endswith(end)]
        sources = {name: cls.unflatten(start + name, flat) for name in names if name}
        return cls(confusion, metrics, {"source": sources} if sources else {})

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
    sure: np.ndarray | None = None,
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
        sure: mask of shape (n,) of the verdicts that are sure; None leaves their metrics out.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    if weights is None:
        weights = draw_resamples(np.arange(len(labels)) if rows is None else np.asarray(rows["group"]))
    if resampled is None:
        resampled = resample_metrics(labels, scores, threshold, weights, sure)
    reals, fakes, known = (
        int(one.sum()) for one in (labels == 0, labels == 1, sure if sure is not None else labels < 0)
    )
    counts = {"false_alarm_rate": reals, "recall": fakes, "error_when_sure": known}
    counts |= {"reals_surely_fake": reals, "fakes_surely_real": fakes}
    whole = Evaluation(
        Confusion.count(labels, scores, threshold),
        estimate_metrics(compute_metrics(labels, scores, threshold, sure), resampled, counts),
    )
    if rows is None:
        return whole

    def evaluate_part(part: np.ndarray) -> Evaluation:
        if part.all():
            return whole
        known = None if sure is None else sure[part]
        return evaluate_scores(labels[part], scores[part], threshold, weights=weights[:, part], sure=known)

    kinds = find_parts(labels, rows)
    parts = {kind: {name: evaluate_part(part) for name, part in named.items()} for kind, named in kinds.items()}
    return replace(whole, parts=parts)


def evaluate_detector(
    detector: Detector, images: "Images", qualities: Sequence[ImageQuality] = ()
) -> tuple[Evaluation, np.ndarray]:
    """Score a split with what will be served, and evaluate it at the detector's own threshold.

    Args:
        qualities: of each image; none leaves out which verdicts are sure.

    Returns:
        The evaluation, and P(fake) per image as float32 of shape (n,).
    """
    scores = detector.score(images.pixels)
    sure = find_sure(detector, scores, qualities) if qualities else None
    return evaluate_scores(images.labels, scores, detector.threshold, images.rows, sure=sure), scores


def find_sure(detector: Detector, scores: np.ndarray, qualities: Sequence[ImageQuality]) -> np.ndarray | None:
    """Return a mask of shape (n,) of the verdicts that are sure; None if the detector has no bounds."""
    judged = [detector.judge(float(score), one).sure for score, one in zip(scores, qualities, strict=True)]
    return None if None in judged else np.array(judged, bool)


def estimate_metrics(
    values: Mapping[str, float], resampled: Mapping[str, np.ndarray], counts: Mapping[str, int]
) -> dict[str, Estimate]:
    """Return each metric that exists, with its interval.

    Args:
        counts: images that a metric is a share of. No resample leaves a share of 0 or 1, so that such a one gets the
            interval of Clopper and Pearson, Biometrika 26, 1934.
    """
    estimates = {}
    for name in METRIC_TITLES:
        value = values[name]
        if np.isnan(value):
            continue
        estimates[name] = Estimate.summarise(value, resampled[name])
        if value in (0, 1) and counts.get(name):
            edge = 0.025 ** (1 / counts[name])
            estimates[name] = Estimate(0.0, 0.0, 1 - edge) if value == 0 else Estimate(1.0, edge, 1.0)
    return estimates


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
