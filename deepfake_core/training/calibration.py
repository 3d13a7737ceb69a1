"""What a score means: the temperature and the threshold, both fitted on validation images."""

import json
import logging
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar

from deepfake_core.config import EvaluationParameters, ThresholdRule
from deepfake_core.data.images import Images
from deepfake_core.detector import DESCRIPTION, Detector, apply_temperature
from deepfake_core.storage.files import write_json

log = logging.getLogger(__name__)

TEMPERATURE_BOUNDS = (0.05, 20.0)


def calibrate_detector(folder: Path, val: Images, parameters: EvaluationParameters) -> None:
    """Fit a detector's temperature and threshold, and store both in its `detector.json`."""
    file = folder / DESCRIPTION
    description = json.loads(file.read_text()) | {"temperature": 1.0}
    write_json(file, description)
    raw = Detector(folder).score(val.pixels)
    temperature = fit_temperature(val.labels, raw)
    scores = apply_temperature(raw, temperature)
    threshold = choose_threshold(val.labels, scores, parameters.threshold, parameters.false_alarm_rate)
    write_json(file, description | {"temperature": temperature, "threshold": threshold})
    log.info("calibrated on %d validation images: temperature %.3f, threshold %.3f", len(val), temperature, threshold)


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


def choose_threshold(labels: np.ndarray, scores: np.ndarray, rule: ThresholdRule, false_alarm_rate: float) -> float:
    """Choose the threshold between two neighbouring scores that serves the rule best.

    Args:
        rule: `best_f1`, or `false_alarm_rate`: the most fakes found with at most this share of reals called fake.
    """
    order = np.argsort(-scores, kind="stable")
    labels, scores = np.asarray(labels)[order] == 1, np.asarray(scores, np.float64)[order]
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of each run of equal scores
    hits, alarms = labels.cumsum()[ends], (~labels).cumsum()[ends]
    if rule == "best_f1":
        best = int(np.argmax(2 * hits / (hits + alarms + labels.sum())))
    else:
        best = int((alarms <= false_alarm_rate * (~labels).sum()).sum()) - 1
    if best < 0:
        return float(np.nextafter(scores[0], 1.0)) if scores[0] < 1 else 1.0
    lower = scores[ends[best] + 1] if best + 1 < len(ends) else 0.0
    return float((scores[ends[best]] + lower) / 2)
