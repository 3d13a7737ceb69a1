"""Housekeeping: what years of retrains leave behind."""

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact

from deepfake_core.config import (
    DEFAULT_DATA_DIR,
    DEFAULT_KEEP,
    DEFAULT_KEEP_OBSERVATIONS_DAYS,
    DEFAULT_KEEP_REJECTED_DAYS,
    DEFAULT_MODEL,
    DEFAULT_OBSERVATIONS,
)
from deepfake_core.housekeeping import sum_up
from deepfake_core.storage.store import open_store
from tasks.data import remove_unneeded


@flow(name="clean")
def clean(
    keep: int = DEFAULT_KEEP,
    data_dir: str = DEFAULT_DATA_DIR,
    model_name: str = DEFAULT_MODEL,
    dry_run: bool = False,
    feedback: str = "",
    keep_rejected_days: int = DEFAULT_KEEP_REJECTED_DAYS,
    observations: str = DEFAULT_OBSERVATIONS,
    keep_observations_days: int = DEFAULT_KEEP_OBSERVATIONS_DAYS,
) -> str:
    """Remove old data sets, archives, caches, model files and observations, never what production or a run needs.

    Of reports on wrong verdicts that were rejected long ago, images and notes are removed.

    Args:
        keep: Number of newest data sets, archives of each source, and versions' model files that stay (at least 1).
        data_dir: Folder that holds archives, image indexes and split folders; of a URL, this machine's cache.
        model_name: Name in MLflow's model registry.
        dry_run: Only list what would be removed.
        feedback: Folder or URL that keeps reports on wrong verdicts. Empty: that in the data folder, or at its URL.
        keep_rejected_days: How long images and notes of rejected reports stay (at least 0).
        observations: Folder or URL that `--observe` names. Empty: no observations are removed.
        keep_observations_days: Days of observations that stay (at least 1).

    Returns:
        What was done, as a sentence.
    """
    removals = remove_unneeded(
        open_store(data_dir),
        model_name,
        keep,
        dry_run,
        feedback=feedback,
        keep_rejected_days=keep_rejected_days,
        observations=observations,
        keep_observations_days=keep_observations_days,
    )
    done = f"{sum_up(removals)}, {'would be removed' if dry_run else 'removed'}"
    get_run_logger().info(done)
    create_table_artifact(
        [{"what": one.what, "why": one.why, "MB": round(one.bytes / 1e6, 1)} for one in removals],
        key="clean",
        description=done,
    )
    return done
