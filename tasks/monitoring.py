"""What is observed of production, compared with its test split."""

from collections.abc import Sequence
from datetime import UTC, datetime

import pandas as pd
from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact

from deepfake_core.config import WatchParameters
from deepfake_core.data.dataset import Dataset
from deepfake_core.detector import Detector
from deepfake_core.evaluation.test_split import Measured
from deepfake_core.monitoring.drift import Agreement, Drift, compare_windows, measure_agreement
from deepfake_core.monitoring.observations import read_recent
from deepfake_core.monitoring.reference import observe_images
from deepfake_core.monitoring.reported import Reported, judge_reported
from deepfake_core.registry import runs, windows
from deepfake_core.registry.aliases import read_production
from deepfake_core.registry.candidates import TrainedCandidate
from deepfake_core.registry.versions import ModelVersion
from deepfake_core.reports import drift_report
from tasks.announcement import announce_drift
from tasks.options import NETWORK, ONCE


@task(name="record reference", **ONCE)
def record_reference(best: TrainedCandidate, measured: Measured, dataset: Dataset) -> None:
    """Log the observations of the test split, with which those of users are compared."""
    paths = measured.images.rows["path"].tolist()
    windows.log_reference(best.run_id, observe_images(Detector(best.candidate.folder), paths, dataset.read))


@task(name="read reference", **ONCE)
def read_watched(watch: WatchParameters) -> tuple[ModelVersion, pd.DataFrame]:
    """Return the version in production, and the observations of its test split."""
    version = read_production(watch.model_name)
    return version, windows.read_reference(version)


@task(name="read observations", **NETWORK)
def read_observations(watch: WatchParameters, version: ModelVersion) -> pd.DataFrame:
    """Return the window: what was observed of a version in the last days."""
    return read_recent(watch.observations, watch.window_days, f"{version.name}/{version.version}")


@task(name="judge confirmed reports", **ONCE)
def judge_confirmed(watch: WatchParameters, version: ModelVersion) -> Reported:
    """Count on how many confirmed reports production, and the challenger, are wrong."""
    return judge_reported(watch.feedback, version)


@task(name="compare", **ONCE)
def compare(reference: pd.DataFrame, window: pd.DataFrame, watch: WatchParameters) -> tuple[Drift, list[Agreement]]:
    """Compare the window with the reference, and production with the version beside it."""
    return compare_windows(reference, window, watch.min_distance), measure_agreement(window)


@task(name="report on window", **ONCE)
def report_window(
    version: ModelVersion,
    watch: WatchParameters,
    reference: pd.DataFrame,
    window: pd.DataFrame,
    drift: Drift,
    agreements: Sequence[Agreement],
    judged: Reported,
) -> str:
    """Log the window to the version's run, show it, and announce drift."""
    text = drift_report.describe_drift(version, drift, agreements, judged, watch.window_days)
    metrics = drift_report.name_metrics(drift, agreements) | judged.flatten(version.name)
    lasts = windows.record_window(version, metrics, drift.drifted, datetime.now(UTC).date(), watch.window_days)
    figure = drift_report.plot_drift(reference, window, drift)
    if figure:
        runs.log_figures(version.run_id, {"drift": figure})
    create_markdown_artifact(drift_report.add_figure(text, figure), key="watch", description=text.splitlines()[0])
    get_run_logger().info(text)
    if drift.drifted:
        announce_drift(version.name, version.version, text, lasts)
    return text
