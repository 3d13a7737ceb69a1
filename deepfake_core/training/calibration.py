"""What a score means, fitted on validation images: temperature, threshold, and where a verdict is sure."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.stats import binom

from deepfake_core.config import FEEDBACK, EvaluationParameters, ThresholdRule
from deepfake_core.data.images import Images
from deepfake_core.detector import DESCRIPTION, Detector, apply_temperature, call_fake
from deepfake_core.input_gate import ImageQuality, fit_limits
from deepfake_core.storage.files import write_json

log = logging.getLogger(__name__)

TEMPERATURE_BOUNDS = (0.05, 20.0)

MIN_SOURCE_IMAGES = 50
"""Validation images of one class, near copies counted once, from which on a source's own share of errors is kept;
below, chance decides it."""

ALL_SOURCES = "all sources together"
"""Name of the group of images whose errors are held down where a source has too few."""

LOW_ALLOWED_SHARE = 0.7
"""Of a rate. There is a warning where a smaller share of the images may be called fake: for a rate of 0.1, below some
200 to 250 images."""

CONFIDENCE = 0.9
"""With which a threshold and bounds keep their rates of errors on images to come, and not on validation alone."""


def calibrate_detector(
    folder: Path, val: Images, parameters: EvaluationParameters, qualities: Sequence[ImageQuality] = ()
) -> None:
    """Fit what gives a detector's scores a meaning, and store it in its `detector.json`: the temperature, the
    threshold, the bounds beyond which a verdict is sure, and the limits of the images that all this was fitted on.

    Args:
        qualities: of each image of `val`; none sets no limits.
    """
    file = folder / DESCRIPTION
    description = json.loads(file.read_text()) | {"temperature": 1.0}
    write_json(file, description)
    raw = Detector(folder).score(val.pixels)
    temperature = fit_temperature(val.labels, raw)
    scores = apply_temperature(raw, temperature)
    threshold = choose_threshold(val.labels, scores, val.rows, parameters.threshold, parameters.false_alarm_rate)
    if parameters.threshold == "false_alarm_rate":
        for warning in warn_of_few_reals(val.labels == 0, val.rows, parameters.false_alarm_rate):
            log.warning("%s", warning)
    lower, upper = fit_bounds(val.labels, scores, val.rows, threshold, parameters.max_error)
    write_json(
        file,
        description
        | {
            "temperature": temperature,
            "threshold": threshold,
            "bounds": {"lower": lower, "upper": upper, "max_error": parameters.max_error},
            "limits": fit_limits(qualities),
        },
    )
    log.info(
        "calibrated on %d validation images: temperature %.3f, threshold %.3f, sure below %.3f and above %.3f",
        len(val),
        temperature,
        threshold,
        lower,
        upper,
    )


def fit_temperature(labels: np.ndarray, scores: np.ndarray) -> float:
    """Find the temperature at which scores are the likeliest: Guo et al., "On Calibration of Modern Neural Networks",
    ICML 2017, section 4.2.

    Args:
        labels: int array of shape (n,): 0 real, 1 fake.
        scores: float array of shape (n,): P(fake) at temperature 1.
    """

    def measure_loss(log_temperature: float) -> float:
        fake = np.clip(apply_temperature(scores, float(np.exp(log_temperature))).astype(np.float64), 1e-12, 1 - 1e-12)
        return -float(np.mean(np.where(labels == 1, np.log(fake), np.log(1 - fake))))

    bounds = tuple(np.log(TEMPERATURE_BOUNDS))
    return float(np.exp(minimize_scalar(measure_loss, bounds=bounds, method="bounded").x))


def choose_threshold(
    labels: np.ndarray, scores: np.ndarray, rows: pd.DataFrame, rule: ThresholdRule, false_alarm_rate: float
) -> float:
    """Choose the threshold between two neighbouring scores that serves the rule best.

    Args:
        labels: int array of shape (n,): 0 real, 1 fake.
        scores: float array of shape (n,): P(fake), each below 1.
        rows: columns `source` and `group` of the manifest, n long.
        rule: `best_f1`, `balanced_accuracy`, or `false_alarm_rate`: the highest balanced accuracy at which no source
            has more of its reals called fake than `count_allowed` says. Sources of fewer than `MIN_SOURCE_IMAGES` are
            taken together with all others. The same holds with near copies counted once, by their highest score. On
            confirmed reports no rate is kept: false alarms are what they were chosen for.
    """
    order = np.argsort(-scores, kind="stable")
    labels, scores = np.asarray(labels)[order] == 1, np.asarray(scores, np.float64)[order]
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of each run of equal scores
    hits, alarms = (np.append(0, one.cumsum()[ends]) for one in (labels, ~labels))  # from none called fake to all
    fakes, reals = max(1, labels.sum()), max(1, (~labels).sum())
    allowed = np.ones(len(hits), bool)
    if rule == "false_alarm_rate":
        ordered = rows.iloc[order]
        for name, group in group_sources(~labels, ordered).items():
            allowed[1:] &= _keeps_rate(group, ordered, ends, false_alarm_rate)
            count = int(keep_first(group, ordered).sum())
            most = count_allowed(count, false_alarm_rate)
            log.info("at most %d of the %d reals of %s may be called fake, near copies counted once", most, count, name)
    value = 2 * hits / (hits + alarms + fakes) if rule == "best_f1" else hits / fakes - alarms / reals
    best = int(np.argmax(np.where(allowed, value, -2)))
    if best == 0:
        return float(np.nextafter(scores[0], 1.0))
    lower = scores[ends[best - 1] + 1] if best < len(ends) else 0.0
    return float((scores[ends[best - 1]] + lower) / 2)


def group_sources(chosen: np.ndarray, rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return the images of a class whose errors are held down together: each source's, and all where one has too few.

    Args:
        chosen: mask of shape (n,).
        rows: columns `source` and `group` of the manifest, n long.

    Returns:
        By name, masks of shape (n,). Confirmed reports are in none: errors are what they were chosen for.
    """
    chosen = chosen & (rows["source"] != FEEDBACK).to_numpy()
    by_source = {name: chosen & (rows["source"] == name).to_numpy() for name in sorted(set(rows["source"][chosen]))}
    enough = {name: group for name, group in by_source.items() if keep_first(group, rows).sum() >= MIN_SOURCE_IMAGES}
    if len(enough) == len(by_source):
        return enough
    return enough | {ALL_SOURCES if len(by_source) > 1 else next(iter(by_source)): chosen}


def keep_first(chosen: np.ndarray, rows: pd.DataFrame) -> np.ndarray:
    """Return the mask without the chosen rows that follow a near copy of theirs, which say no more than that one."""
    return chosen & ~rows["group"].where(chosen).duplicated().to_numpy()


def _keeps_rate(wrong: np.ndarray, rows: pd.DataFrame, ends: np.ndarray, rate: float) -> np.ndarray:
    """Return at which ends as few of these images have passed as is allowed, near copies counted once or not."""
    both = wrong, keep_first(wrong, rows)
    return np.all([one.cumsum()[ends] <= count_allowed(int(one.sum()), rate) for one in both], axis=0)


def warn_of_few_reals(real: np.ndarray, rows: pd.DataFrame, rate: float) -> list[str]:
    """Return what few validation images cost the rule `false_alarm_rate`: the confidence, or fakes found. Near copies
    are counted once.

    Args:
        real: mask of shape (n,).
        rows: columns `source` and `group` of the manifest, n long.
    """
    held = group_sources(real, rows)
    warnings = []
    if few := sorted(set(rows["source"][real]) - {FEEDBACK} - set(held)):
        counts = ", ".join(f"{keep_first(real & (rows['source'] == name), rows).sum()} of {name}" for name in few)
        warnings.append(
            f"Fewer than {MIN_SOURCE_IMAGES} real validation images: {counts}. The threshold keeps a rate of false "
            f"alarms on all sources together, and none on {'this one' if len(few) == 1 else 'these'} alone."
        )
    for name, reals in held.items():
        images = int(keep_first(reals, rows).sum())
        most = count_allowed(images, rate)
        keep = f"to keep the rate of {rate:g} for new images with a confidence of {CONFIDENCE}"
        if rate < 1 and (1 - rate) ** images > 1 - CONFIDENCE:
            needed = f"{math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-rate))} are" if rate else "no number is"
            warnings.append(
                f"The {images} real validation images of {name} are too few {keep}, though none of them is called "
                f"fake: {needed} enough."
            )
        elif most < LOW_ALLOWED_SHARE * rate * images:
            warnings.append(
                f"{keep.capitalize()}, {f'only {most}' if most else 'none'} of the {images} real validation images of "
                f"{name} may be called fake. With more such images, more fakes may be found."
            )
    return warnings


def count_allowed(images: int, rate: float) -> int:
    """Return how many of n images may be wrong so that, with `CONFIDENCE`, at most this share of all images is.

    The most at which the upper end of Clopper and Pearson's interval ("The Use of Confidence or Fiducial Limits",
    Biometrika 26, 1934) is at most the rate. False alarms only become fewer as a threshold rises, so the confidence
    holds for whichever of the allowed thresholds is chosen: Angelopoulos et al., "Learn then Test", Annals of Applied
    Statistics 19 (2), 2025. The images must be independent of each other, which near copies are not. Of few images none
    may be wrong, and the confidence is lower: of fewer than 22 at a rate of 0.1.
    """
    return images if rate == 1 else max(0, int(binom.ppf(1 - CONFIDENCE, images, rate)) - 1)


def fit_bounds(
    labels: np.ndarray, scores: np.ndarray, rows: pd.DataFrame, threshold: float, max_error: float
) -> tuple[float, float]:
    """Find the bounds beyond which a verdict is sure: the nearest ones that keep the stated error in two ways.

    Of each source, at most a share of the reals lies above the upper bound, and of the fakes below the lower one, each
    with `CONFIDENCE` (`count_allowed`), for any mix of reals and fakes: split-conformal prediction, label conditional
    and training conditional, Vovk, "Conditional Validity of Inductive Conformal Predictors", ACML 2012. Sources of
    fewer than `MIN_SOURCE_IMAGES` of a class are taken together with all others. Confirmed reports set no such limit.

    Of the sure verdicts of each label, at most the same share is wrong, with one more counted as wrong. This is of
    these images and their mix. Simulated images to come keep it on average over choices of these.

    Both hold for images, and with near copies counted once, by their most extreme score.

    Args:
        labels: int array of shape (n,): 0 real, 1 fake.
        scores: float array of shape (n,): P(fake), of images that the network was not trained on.
        rows: columns `source` and `group` of the manifest, n long.
        threshold: from which on a verdict is fake.

    Returns:
        Lower and upper, 0 and 1 where none keeps the error, such as for fewer than 19 images of a class at an error of
        0.05. The lower may be above the upper.
    """
    fake = call_fake(scores, threshold)
    return (
        0.0 - _find_bound(-scores, ~fake, labels == 1, rows, max_error, 0.0),  # no -0.0
        _find_bound(scores, fake, labels == 0, rows, max_error, 1.0),
    )


def _find_bound(
    scores: np.ndarray, judged: np.ndarray, wrong: np.ndarray, rows: pd.DataFrame, max_error: float, none: float
) -> float:
    """Return the lowest score above which errors are as few as stated, `none` if there is no such.

    Args:
        judged: mask of shape (n,) of the images that get the label whose bound it is.
        wrong: mask of shape (n,) of the images of which that label is wrong.
    """
    order = np.argsort(-scores, kind="stable")
    scores, judged, wrong, rows = scores[order], judged[order], wrong[order], rows.iloc[order]
    ends = np.flatnonzero(np.diff(scores))  # of each run of equal scores but the last, above which lie all others
    groups = group_sources(wrong, rows).values()
    kept = np.full(len(ends), bool(groups))
    for group in groups:
        enough = max_error * (keep_first(group, rows).sum() + 1) > 1 - 1e-9
        kept &= enough & _keeps_rate(group, rows, ends, max_error)
    sure = judged & wrong, judged & ~wrong
    for errors, others in (sure, [keep_first(one, rows) for one in sure]):
        one_more = errors.cumsum()[ends] + 1
        kept &= one_more <= max_error * (one_more + others.cumsum()[ends]) + 1e-9
    return float(scores[ends[kept][-1] + 1]) if kept.any() else none
