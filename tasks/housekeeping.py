"""What old retrains left behind goes."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfake_core import housekeeping
from deepfake_core.housekeeping import Removal


@task(name="remove what is not needed", tags=["cpu"], cache_policy=NO_CACHE)
def remove_unneeded(data_dir: str, model_name: str, keep: int, dry_run: bool) -> list[Removal]:
    """Remove what is not needed any more, or only say what would go."""
    return housekeeping.clean(data_dir, model_name, keep, dry_run)
