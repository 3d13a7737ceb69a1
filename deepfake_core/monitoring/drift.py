"""Whether a window of observations differs from the reference, and whether two versions agree: statistics alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binomtest, ks_2samp

from deepfake_core.monitoring.observations import DIGITS

COMPARED_COLUMNS = {
    "probability": "P(fake)",
    "sure": "share of sure verdicts",
    "side": "shorter side in pixels",
    "sharpness": "sharpness",
    "jpeg_quality": "JPEG quality",
    "width": "image width",
    "height": "image height",
}
"""The columns that are compared, and how they are called."""

JUDGED_KINDS = {"face": "faces", "whole": "whole images"}
"""Faces that were cut out of images are compared with such faces, and whole images with whole images."""

MIN_OBSERVATIONS = 100
MAX_DRIFT_P = 0.01
"""Probability that a window from the same world alarms, at most, over all columns together.

That is the average over references. All windows of a version are compared with one reference, and of these more than
1 in 100 may alarm. So the level is lower than the 5 in 100 that we accept.
"""


@dataclass(frozen=True)
class Shift:
    """One column of the window against the reference.

    Attributes:
        kind: a name in `JUDGED_KINDS`.
        distance: of Kolmogorov and Smirnov, 0 to 1: the largest difference between the shares below any value.
        p: probability of such a distance by chance, adjusted for the number of columns (Holm).
        drifted: whether it is neither chance nor small.
        before: mean in the reference; likewise `now`, in the window.
    """

    kind: str
    column: str
    distance: float
    p: float
    drifted: bool
    before: float
    now: float

    def describe(self) -> str:
        """Return it as a sentence."""
        found = f"mean {_show(self.now)}, on the test split {_show(self.before)}"
        chance = f"distance {self.distance:.2f}, p {f'= {self.p:.2g}' if self.p >= 0.0001 else '< 0.0001'}"
        verdict = "has changed" if self.drifted else "no change"
        return f"{COMPARED_COLUMNS[self.column]} of {JUDGED_KINDS[self.kind]}: {verdict} ({found}; {chance})"


@dataclass(frozen=True)
class Drift:
    """A window against a reference.

    Attributes:
        observations: number of images in the window, each with its largest face or as a whole.
        shifts: of each column that both hold; none where there are too few observations.
    """

    observations: int
    shifts: tuple[Shift, ...]

    @property
    def changed(self) -> list[Shift]:
        return [one for one in self.shifts if one.drifted]

    @property
    def drifted(self) -> bool | None:
        """Whether any column drifted; None where nothing could be compared."""
        return bool(self.changed) if self.shifts else None


def compare_windows(reference: pd.DataFrame, window: pd.DataFrame, min_distance: float) -> Drift:
    """Compare each column by the two-sample test of Kolmogorov and Smirnov, all together at `MAX_DRIFT_P` (Holm 1979).

    A column that neither has is left out. No JPEG counts as quality 0, so that another share of JPEGs is a change too.
    Of the faces of an image, the largest counts: the test takes observations for independent, and these are alike.

    Args:
        reference: observations (`OBSERVATION_SCHEMA`) of the version's test split; likewise `window`, of users.
        min_distance: below it, a column has not drifted.
    """
    tests: list[tuple[str, str, np.ndarray, np.ndarray]] = []
    for kind in JUDGED_KINDS:
        before, now = (select_kind(rows, kind) for rows in (reference, window))
        if min(len(before), len(now)) < MIN_OBSERVATIONS:
            continue
        for column in COMPARED_COLUMNS:
            ours, theirs = _read_column(before, column), _read_column(now, column)
            if min(len(ours), len(theirs)) >= MIN_OBSERVATIONS:
                tests.append((kind, column, ours, theirs))
    results = [ks_2samp(before, now, method="asymp") for _, _, before, now in tests]
    adjusted = adjust_holm([one.pvalue for one in results])
    shifts = [
        Shift(
            kind=kind,
            column=column,
            distance=float(one.statistic),
            p=p,
            drifted=bool(p < MAX_DRIFT_P and one.statistic >= min_distance),
            before=float(before.mean()),
            now=float(now.mean()),
        )
        for (kind, column, before, now), one, p in zip(tests, results, adjusted, strict=True)
    ]
    return Drift(sum(len(select_kind(window, kind)) for kind in JUDGED_KINDS), tuple(shifts))


def select_kind(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Return the largest face of each image (`face`), or the images that were judged as a whole (`whole`)."""
    return rows[rows["face"].isin([1]) if kind == "face" else rows["face"].isna()]


def adjust_holm(p: Sequence[float]) -> list[float]:
    """Return p-values such that those below a level reject their hypotheses at that level for the whole family."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, place in enumerate(np.argsort(p)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = float(highest)
    return adjusted


def _read_column(rows: pd.DataFrame, column: str) -> np.ndarray:
    values = rows[column].astype("float64").round(DIGITS)  # as observations are; an older reference is not
    return (values.fillna(0) if column == "jpeg_quality" else values.dropna()).to_numpy()


def _show(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"


@dataclass(frozen=True)
class Agreement:
    """How often the version beside production gave the same label.

    Attributes:
        share: 0 to 1, with the ends of its 95 % interval (Clopper and Pearson).
        kappa: Cohen's, which leaves out the agreement that is due to chance; NaN where both gave one label only.
    """

    version: str
    observations: int
    share: float
    low: float
    high: float
    kappa: float

    def describe(self) -> str:
        """Return it as a sentence."""
        kappa = "" if np.isnan(self.kappa) else f"; Cohen's kappa {self.kappa:.2f}"
        return (
            f"{self.version} ran beside it and gave the same label to {100 * self.share:.1f} of 100 of "
            f"{self.observations:,} ({100 * self.low:.1f} to {100 * self.high:.1f}){kappa}"
        )


def measure_agreement(window: pd.DataFrame) -> list[Agreement]:
    """Return the agreement with each version that ran beside production, by version: one observation an image."""
    found = []
    both = window[window["shadow_fake"].notna() & (window["face"].isna() | window["face"].isin([1]))]
    for version, rows in both.groupby("shadow_version"):
        ours, theirs = (rows[name].astype(bool).to_numpy() for name in ("fake", "shadow_fake"))
        same, count = int((ours == theirs).sum()), len(rows)
        interval = binomtest(same, count).proportion_ci()
        chance = ours.mean() * theirs.mean() + (1 - ours.mean()) * (1 - theirs.mean())
        kappa = (same / count - chance) / (1 - chance) if chance < 1 else float("nan")
        found.append(
            Agreement(
                version=str(version),
                observations=count,
                share=same / count,
                low=float(interval.low),
                high=float(interval.high),
                kappa=float(kappa),
            )
        )
    return found
