"""Housekeeping: what years of retrains leave behind."""

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact

from deepfake_core import housekeeping, registry
from tasks.housekeeping import remove_unneeded


@flow(name="clean")
def clean(
    keep: int = housekeeping.KEEP,
    data_dir: str = "data",
    model_name: str = registry.DEFAULT_MODEL,
    dry_run: bool = False,
) -> str:
    """Remove old data sets, archives, caches and model files, never what production, a rollback or a run needs.

    Args:
        keep: Number of newest data sets, archives of each source, and versions' model files that stay (at least 1).
        data_dir: Folder that holds archives, image indexes and split folders; of a URL, this machine's cache.
        model_name: Name in MLflow's model registry.
        dry_run: Only say what would go.

    Returns:
        What was done, as a sentence.
    """
    goes = remove_unneeded(data_dir, model_name, keep, dry_run)
    size = sum(removal.bytes for removal in goes) / 1e6
    done = f"{len(goes)} things, {size:,.1f} MB, {'would go' if dry_run else 'removed'}"
    get_run_logger().info(done)
    create_table_artifact(
        [{"what": one.what, "why": one.why, "MB": round(one.bytes / 1e6, 1)} for one in goes],
        key="clean",
        description=done,
    )
    return done
