"""Scores of many images."""

from pathlib import Path

from prefect import task

from deepfake_core.monitoring.observer import open_observer
from deepfake_core.serving.batch_scoring import ScoredTable, score_images
from deepfake_core.serving.load_versions import find_shadow, load_version
from deepfake_core.serving.predictor import Predictor
from tasks.options import CPU
from tasks.progress import report_progress


@task(name="score images", **CPU)
def judge(
    images: Path, output: Path, name: str, version: str, detect: bool, observe: str = "", shadow: bool = False
) -> ScoredTable:
    """Write the table of scores, and observe the verdicts where `observe` names a folder or URL."""
    beside = find_shadow(name) if shadow else None
    with open_observer(observe, shadow) as observer, report_progress("score images") as on_progress:
        predictor = Predictor(load_version(name, version), detect, f"{name}/{version}", beside)
        return score_images(predictor, images, output, on_progress, observer)
