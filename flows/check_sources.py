"""Whether Kaggle has anything new."""

from typing import cast

from prefect import flow, get_run_logger
from prefect.client.schemas import FlowRun
from prefect.deployments import run_deployment
from prefect.states import Completed

from deepfake_core.config import DataParameters
from tasks.data import find_new_version
from tasks.remote import check_deployment


@flow(name="check-sources")
def check_sources(data: DataParameters = DataParameters(), deployment: str = "retrain/manual") -> dict[str, int]:
    """Ask Kaggle for versions alone, and start a retrain if a source has one that is not in the data folder.

    The same news start one retrain, however often they are found.

    Args:
        data: Whose sources, and the folder or URL at which they would be.
        deployment: Name of the deployment that retrains.

    Returns:
        The new versions, by source.
    """
    check_deployment(deployment)
    found = {source.name: find_new_version(source, data.data_dir) for source in data.sources}
    new = {name: version for name, version in found.items() if version is not None}
    if not new:
        message = f"Nothing new: {data.data_dir} has the versions of {len(found)} sources."
        return Completed(message=message, data=new)  # type: ignore[return-value] # Prefect unwraps it
    news = ", ".join(f"{name} version {version}" for name, version in sorted(new.items()))
    parameters = {"data": data.model_dump(mode="json", exclude_unset=True)} if data.model_fields_set else {}
    started = run_deployment(deployment, parameters=parameters, timeout=0, idempotency_key=f"check-sources: {news}")
    message = f"New: {news}. Retrain {cast(FlowRun, started).name} was started."
    get_run_logger().info(message)
    return Completed(message=message, data=new)  # type: ignore[return-value] # Prefect unwraps it
