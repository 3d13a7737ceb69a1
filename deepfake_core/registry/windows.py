"""What became of the windows of observations, in the run of the version that was observed."""

import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow

from deepfake_core.errors import ModelError
from deepfake_core.registry import names
from deepfake_core.registry.runs import log_file, log_metrics, read_table
from deepfake_core.registry.versions import ModelVersion

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow

DRIFTED = "drift/drifted"
"""Metric of a version's run: 1 where a window drifted, 0 where not; its step is the day, counted from 1970."""

RECENT_WINDOWS = 5
MIN_DRIFTED_WINDOWS = 2


def log_reference(run_id: str, observed: "pyarrow.Table") -> None:
    """Log the observations of the test split to a version's run."""
    from pyarrow import parquet  # no part of the base install

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(names.REFERENCE).name
        parquet.write_table(observed, file)
        log_file(run_id, file, str(Path(names.REFERENCE).parent))


def read_reference(version: ModelVersion) -> "pd.DataFrame":
    """Return the observations of a version's test split.

    Raises:
        ModelError: if its run holds none.
    """
    found = read_table(version.run_id, names.REFERENCE)
    if found is None:
        raise ModelError(
            f"A version's run must hold {names.REFERENCE} to be watched. Received: version {version.version} of "
            f"{version.name}, run {version.run_id}, which an earlier release trained. Retrain, or promote a newer one."
        )
    return found


def record_window(
    version: ModelVersion, metrics: Mapping[str, float], drifted: bool | None, day: date, days: int = 1
) -> bool:
    """Log a window's metrics to the version's run; return whether drift lasts.

    It lasts where at least 2 of the last 5 windows that could be compared drifted, and the newest is among them. A day
    that is compared again counts once, as it was compared last. Of windows that overlap, the newer counts.

    Args:
        drifted: None where there was nothing to compare.
        day: on which the window ends, in UTC.
        days: length of a window.
    """
    verdict = {} if drifted is None else {DRIFTED: float(drifted)}
    log_metrics(version.run_id, {**metrics, **verdict}, step=(day - date(1970, 1, 1)).days)
    history = mlflow.MlflowClient().get_metric_history(version.run_id, DRIFTED)
    by_day = {one.step: one.value for one in sorted(history, key=lambda one: one.timestamp)}
    ends: list[int] = []
    for step in sorted(by_day, reverse=True):
        if not ends or step <= ends[-1] - days:
            ends.append(step)
    recent = [by_day[step] for step in ends[:RECENT_WINDOWS]]
    return bool(drifted and sum(recent) >= MIN_DRIFTED_WINDOWS)
