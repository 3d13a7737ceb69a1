"""Whether production still sees what its test split shows."""

from prefect import flow

from deepfake_core.config import WatchParameters
from deepfake_core.registry.connection import connect
from tasks.monitoring import compare, judge_confirmed, read_observations, read_watched, report_window


@flow(name="watch")
def watch(watch: WatchParameters = WatchParameters()) -> str:
    """Compare what was observed of production with its test split, and tell if it has changed.

    Args:
        watch: Where observations are, and when a change counts.

    Returns:
        What was found: a sentence for each column.
    """
    connect()
    version, reference = read_watched(watch)
    window = read_observations(watch, version)
    drift, agreements = compare(reference, window, watch)
    return report_window(version, watch, reference, window, drift, agreements, judge_confirmed(watch, version))
