"""Scores of many images."""

import tempfile
from pathlib import Path

from prefect import task

from deepfake_core.registry.detectors import pull_detector
from deepfake_core.serving.batch_scoring import ScoredTable, score_images
from deepfake_core.serving.predictor import Predictor, load_detector
from tasks.options import CPU
from tasks.progress import report_progress


@task(name="score images", **CPU)
def judge(images: Path, output: Path, model: str, detect: bool) -> ScoredTable:
    """Write the table of scores.

    Args:
        model: registry URI of a version.
    """
    with tempfile.TemporaryDirectory() as folder, report_progress("score images") as on_progress:
        predictor = Predictor(load_detector(pull_detector(model, Path(folder))), detect)
        return score_images(predictor, images, output, on_progress)
