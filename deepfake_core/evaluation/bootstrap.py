"""Scores and labels become figures, each with an interval. Positive means fake."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deepfake_core.detector import Detector

if TYPE_CHECKING:
    from deepfake_core.batches import Images

FIGURES = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "auc": "AUC",
    "average_precision": "average precision",
    "recall_at_1_percent_fpr": "recall at 1 % false alarms",
    "recall_at_5_percent_fpr": "recall at 5 % false alarms",
    "brier": "Brier score",
    "ece": "expected calibration error",
}
"""The names of figures in code and MLflow, and in reports."""

FALSE_ALARMS = {"recall_at_1_percent_fpr": 0.01, "recall_at_5_percent_fpr": 0.05}
RESAMPLES = 1000
CALIBRATION_BINS = 15
CHUNK = 4_000_000
"""Image weights of resamples that are computed on at once, which bounds the memory."""

EDITED_PARTS = ("left eye", "right eye", "nose", "mouth")
EDIT_NAME = re.compile(r"(easy|mid|hard)_\d+_([01]{3,4})\.\w+$")
ORIGIN_NAME = re.compile(r"(?:^|/)(train|valid|validation|val|test)/")


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
class Estimate:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @classmethod
    def summarise(cls, value: float, resampled: np.ndarray) -> "Estimate":
        """Take the percentile interval (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).

        Args:
            resampled: the figure in each resample, shape (b,); NaN where it did not exist.
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
        figures: estimates by name (`FIGURES`); one that does not exist, such as the AUC of a single class, is absent.
        parts: evaluations of parts of the images, by kind (`source`, `origin`, `edit`) and name.
    """

    confusion: Confusion
    figures: Mapping[str, Estimate]
    parts: "Mapping[str, Mapping[str, Evaluation]]" = field(default_factory=dict)

    @property
    def auc(self) -> float | None:
        return self._get("auc")

    @property
    def average_precision(self) -> float | None:
        return self._get("average_precision")

    def _get(self, name: str) -> float | None:
        return self.figures[name].value if name in self.figures else None

    @property
    def sources(self) -> "Mapping[str, Evaluation]":
        return self.parts.get("source", {})

    def flatten(self, prefix: str) -> dict[str, float]:
        """Return MLflow's names and values: `test/auc`, `test/auc_low`, `test/auc_high`, `test/<source>/auc`, …

        Parts by origin and edit are left to `list_rows`.
        """
        flat = {f"{prefix}/{name}": float(value) for name, value in asdict(self.confusion).items()}
        for name, estimate in self.figures.items():
            flat[f"{prefix}/{name}"] = estimate.value
            flat[f"{prefix}/{name}_low"], flat[f"{prefix}/{name}_high"] = estimate.low, estimate.high
        for source, evaluation in self.sources.items():
            flat |= evaluation.flatten(f"{prefix}/{source}")
        return flat

    def list_rows(self, kind: str = "all", name: str = "all") -> Iterator[dict[str, Any]]:
        """Yield a row for the whole and for each part: `kind`, `name`, counts, and each figure with low and high."""
        row: dict[str, Any] = {"kind": kind, "name": name, "images": self.confusion.total, **asdict(self.confusion)}
        for figure in FIGURES:
            estimate = self.figures.get(figure)
            row[figure], row[f"{figure}_low"], row[f"{figure}_high"] = (
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
    rows: Any = None,
    weights: np.ndarray | None = None,
) -> Evaluation:
    """Evaluate scores, overall and for the parts that the manifest tells.

    Args:
        labels: int array of shape (n,): 0 real, 1 fake.
        scores: float array of shape (n,): P(fake).
        threshold: scores at or above it say fake.
        rows: columns `source`, `member` and `group` of the manifest, as a table or a mapping, n long; without them,
            there are no parts and each image is its own group.
        weights: from `draw_resamples`; None draws them.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    if weights is None:
        weights = draw_resamples(np.arange(len(labels)) if rows is None else np.asarray(rows["group"]))
    whole = Evaluation(Confusion.count(labels, scores, threshold), estimate_figures(labels, scores, threshold, weights))
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


def find_parts(labels: np.ndarray, rows: Any) -> dict[str, dict[str, np.ndarray]]:
    """Find the parts that are worth figures of their own.

    Returns:
        By kind and name, a mask of shape (n,): `source`; `origin`, the split that the source itself has an image in;
        `edit`, what ciplab's file names tell of a fake (easy, mid, hard; the parts replaced), with the reals of its
        source. Kinds with less than two names are left out, except sources.
    """
    source = np.asarray(rows["source"])
    parts: dict[str, dict[str, np.ndarray]] = {"source": {name: source == name for name in sorted(set(source))}}
    origin = np.array([match[1] if (match := ORIGIN_NAME.search(member)) else "" for member in rows["member"]])
    names = [f"{one}/{split}" for one, split in zip(source, origin, strict=True)]
    named = {name: np.array([other == name for other in names]) for name in sorted(set(names)) if name[-1] != "/"}
    if len(named) > 1:
        parts["origin"] = named
    edits: dict[str, np.ndarray] = {}
    for position, (member, label) in enumerate(zip(rows["member"], labels, strict=True)):
        match = EDIT_NAME.search(member) if label == 1 else None
        replaced = [part for part, bit in zip(EDITED_PARTS, match[2], strict=False) if bit == "1"] if match else []
        for name in [match[1], *replaced] if match else ():
            edits.setdefault(name, np.zeros(len(labels), bool))[position] = True
    for fakes in edits.values():
        fakes |= (labels == 0) & np.isin(source, np.unique(source[fakes]))
    if edits:
        order = ("easy", "mid", "hard", *EDITED_PARTS)
        parts["edit"] = {name: edits[name] for name in order if name in edits}
    return parts


def draw_resamples(groups: np.ndarray, count: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Draw bootstrap resamples in which near copies come and go together.

    Args:
        groups: group of each image, shape (n,).

    Returns:
        How often each image is in each resample: uint8 of shape (count, n).
    """
    _, group = np.unique(groups, return_inverse=True)
    number = group.max() + 1 if len(group) else 0
    random = np.random.default_rng(seed)
    weights = np.zeros((count, len(group)), np.uint8)
    for resample in weights:
        resample[:] = np.bincount(random.integers(0, number, number), minlength=number)[group] if number else 0
    return weights


def estimate_figures(
    labels: np.ndarray, scores: np.ndarray, threshold: float, weights: np.ndarray
) -> dict[str, Estimate]:
    """Compute each figure that exists on all images, and its interval over the resamples."""
    once = np.ones((1, len(labels)), np.uint8)
    values = {name: float(value[0]) for name, value in compute_figures(labels, scores, threshold, once).items()}
    resampled = compute_figures(labels, scores, threshold, weights)
    return {name: Estimate.summarise(values[name], resampled[name]) for name in FIGURES if not np.isnan(values[name])}


def compute_figures(
    labels: np.ndarray, scores: np.ndarray, threshold: float, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Compute each figure in each resample.

    Args:
        weights: how often each image counts, shape (b, n).

    Returns:
        By name, float64 of shape (b,); NaN where a class that the figure needs is missing.
    """
    step = max(1, CHUNK // max(1, len(labels)))
    chunks = [_compute(labels, scores, threshold, weights[at : at + step]) for at in range(0, len(weights), step)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in FIGURES}


def _compute(labels: np.ndarray, scores: np.ndarray, threshold: float, weights: np.ndarray) -> dict[str, np.ndarray]:
    order = np.argsort(-scores, kind="stable")
    labels, scores, weights = labels[order] == 1, scores[order], weights[:, order].astype(np.float64)
    fake, real = weights * labels, weights * ~labels
    fakes, reals = fake.sum(1), real.sum(1)
    total = fakes + reals
    said = int((scores >= threshold).sum())
    hits, alarms = fake[:, :said].sum(1), real[:, :said].sum(1)

    # One column per distinct score, from the highest down: what is called fake at that threshold.
    starts = np.flatnonzero(np.diff(scores, prepend=np.inf))
    fake_at, real_at = np.add.reduceat(fake, starts, axis=1), np.add.reduceat(real, starts, axis=1)
    hits_to, alarms_to = fake_at.cumsum(1), real_at.cumsum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision_to = np.where(hits_to + alarms_to > 0, hits_to / (hits_to + alarms_to), 0)
        figures = {
            "accuracy": (hits + reals - alarms) / total,
            "precision": np.where(hits + alarms > 0, hits / (hits + alarms), np.where(total > 0, 0, np.nan)),
            "recall": hits / fakes,
            "f1": 2 * hits / (fakes + hits + alarms),
            # Bamber 1975: the share of pairs in the right order, ties counted half.
            "auc": (real_at * (hits_to - fake_at / 2)).sum(1) / (fakes * reals),
            "average_precision": np.where(reals > 0, (fake_at * precision_to).sum(1) / fakes, np.nan),
        }
        for name, rate in FALSE_ALARMS.items():
            within = (alarms_to <= rate * reals[:, None] + 1e-9).sum(1)
            reached = np.take_along_axis(hits_to, np.maximum(within - 1, 0)[:, None], 1)[:, 0]
            figures[name] = np.where(reals > 0, np.where(within > 0, reached, 0) / fakes, np.nan)
        figures["brier"] = weights @ np.square(scores - labels) / total
        bins = np.minimum((scores * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        members = (bins[:, None] == np.arange(CALIBRATION_BINS)).astype(np.float64)
        # Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2: bins of equal width.
        figures["ece"] = np.abs((weights * (scores - labels)) @ members).sum(1) / total
    return figures


def cross_sources(labels: np.ndarray, scores: np.ndarray, sources: np.ndarray) -> dict[str, dict[str, float]]:
    """Compute the AUC of each source's fakes (outer name) against each source's reals (inner name).

    Where one threshold means the same on every source, these agree; a source whose reals score like another's fakes
    shows here, and not in the AUC per source.
    """
    table: dict[str, dict[str, float]] = {}
    for fakes_of in sorted(set(sources[labels == 1])):
        for reals_of in sorted(set(sources[labels == 0])):
            chosen = ((labels == 1) & (sources == fakes_of)) | ((labels == 0) & (sources == reals_of))
            once = np.ones((1, int(chosen.sum())), np.uint8)
            auc = compute_figures(labels[chosen], np.asarray(scores[chosen], np.float64), 0.5, once)["auc"]
            table.setdefault(str(fakes_of), {})[str(reals_of)] = float(auc[0])
    return table
