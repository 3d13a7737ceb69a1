"""The regression set: images of confirmed reports that no model learns from. A challenger must not do worse on them."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np

from deepfake_core.config import FEEDBACK, REGRESSION
from deepfake_core.data.dataset import Dataset
from deepfake_core.data.images import load_images
from deepfake_core.detector import Detector, call_fake

MAX_REGRESSION_P = 0.05
"""Probability, at most, that a challenger which is as good as production is refused for the regression set."""

MAX_IMAGES_NAMED = 10
SHA256_DIGITS_NAMED = 12
"""Digits of a SHA-256 by which a reason names an image."""


@dataclass(frozen=True)
class ReportedImage:
    """An image of the regression set, and what two models say of it.

    Attributes:
        path: below the data set's folder.
        after, wrong_after: the challenger's P(fake), and whether its verdict is wrong.
        before, wrong_before: production's; None where it was not asked.
    """

    sha256: str
    group: str
    source: str
    member: str
    label: str
    path: str
    after: float
    wrong_after: bool
    before: float | None = None
    wrong_before: bool | None = None

    @property
    def name(self) -> str:
        """The first digits of its SHA-256, or of that of the image that was sent."""
        return (PurePosixPath(self.member).name if self.source == FEEDBACK else self.sha256)[:SHA256_DIGITS_NAMED]

    @property
    def change(self) -> int:
        """1 where the challenger alone is wrong, -1 where production alone is, else 0."""
        return 0 if self.wrong_before is None else self.wrong_after - self.wrong_before


@dataclass(frozen=True)
class Regression:
    """A challenger and production on the regression set; without images where there are no confirmed reports."""

    images: tuple[ReportedImage, ...] = ()

    @property
    def compared(self) -> tuple[ReportedImage, ...]:
        return tuple(image for image in self.images if image.wrong_before is not None)

    @property
    def wrong_after(self) -> int:
        return sum(image.wrong_after for image in self.compared or self.images)

    @property
    def wrong_before(self) -> int:
        return sum(bool(image.wrong_before) for image in self.compared)

    @property
    def p_value(self) -> float:
        """The probability that a challenger as good as production does at least so much worse by chance.

        McNemar's test, Psychometrika 12, 1947, in its exact one-sided form: of the pictures on which one model alone is
        wrong, the challenger is in as many as a fair coin shows heads. Near copies count as one picture, that of the
        model with more mistakes among them (the sign test: Dixon and Mood, JASA 41, 1946).
        """
        changes: Counter[str] = Counter()
        for image in self.compared:
            changes[image.group] += image.change
        worse, better = (sum(sign * change > 0 for change in changes.values()) for sign in (1, -1))
        tosses = worse + better
        return sum(math.comb(tosses, heads) for heads in range(worse, tosses + 1)) / 2**tosses

    def check(self) -> list[tuple[bool, str]]:
        """Return whether the challenger may replace production, and why; nothing where there is nothing to compare."""
        if not self.compared:
            return []
        passed = self.p_value >= MAX_REGRESSION_P
        text = (
            f"confirmed reports: wrong on {self.wrong_after} of {len(self.compared)}, "
            f"production on {self.wrong_before}, "
            f"so much worse by chance with probability {self.p_value:.3f}, at least {MAX_REGRESSION_P:g} is needed"
        )
        return [(passed, text if passed else f"{text}, wrong in this version alone: {self._name_worse()}")]

    def _name_worse(self) -> str:
        worse = [image.name for image in self.images if image.change > 0]
        more = f" and {len(worse) - MAX_IMAGES_NAMED} more" if len(worse) > MAX_IMAGES_NAMED else ""
        return ", ".join(worse[:MAX_IMAGES_NAMED]) + more

    def flatten(self) -> dict[str, float]:
        """Return MLflow's names and values; none where there are no images."""
        if not self.images:
            return {}
        metrics = {"regression/images": float(len(self.images)), "regression/wrong": float(self.wrong_after)}
        if self.compared:
            metrics |= {
                "regression/compared": float(len(self.compared)),
                "regression/production_wrong": float(self.wrong_before),
                "regression/p_value": self.p_value,
            }
        return metrics


def score_regression(detector: Detector, dataset: Dataset) -> Regression:
    """Score the regression set of a data set with a challenger."""
    columns = ["sha256", "group", "source", "member", "label", "path"]
    rows = dataset.split(REGRESSION)[columns].itertuples(index=False, name=None)
    judged = zip(rows, _judge(detector, dataset), strict=True)
    return Regression(tuple(ReportedImage(*(*row, score, wrong)) for row, (score, wrong) in judged))


def add_production(regression: Regression, detector: Detector, dataset: Dataset, left_out: np.ndarray) -> Regression:
    """Add what production says of the same images.

    Args:
        left_out: mask of the images that production learned, or near copies of which it did.
    """
    judged = zip(regression.images, _judge(detector, dataset), left_out, strict=True)
    return Regression(
        tuple(
            image if known else replace(image, before=score, wrong_before=wrong)
            for image, (score, wrong), known in judged
        )
    )


def _judge(detector: Detector, dataset: Dataset) -> list[tuple[float, bool]]:
    """Return P(fake) of each image of the regression set, and whether the verdict is wrong."""
    if REGRESSION not in dataset.splits:
        return []
    images = load_images(dataset, REGRESSION, detector.image_size)
    scores = detector.score(images.pixels)
    wrong = call_fake(scores, detector.threshold) != (images.labels == 1)
    return list(zip(scores.tolist(), wrong.tolist(), strict=True))
