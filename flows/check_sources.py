"""Whether Kaggle has anything new."""

from typing import cast

from prefect import flow, get_run_logger
from prefect.client.schemas import FlowRun
from prefect.deployments import run_deployment
from prefect.states import Completed

from deepfake_core.config import DataParameters
from deepfake_core.storage.store import open_store
from tasks.data import ask_for_version
from tasks.remote import check_deployment


@flow(name="check-sources")
def check_sources(data: DataParameters = DataParameters(), deployment: str = "retrain/manual") -> dict[str, int]:
    """Ask Kaggle for versions alone, and start a retrain if a source has one that is not in the data folder.

    The same new versions start one retrain, however often they are found.

    Args:
        data: The sources, and the folder or URL that holds their archives.
        deployment: Name of the deployment that retrains.

    Returns:
        The new versions, by source.
    """
    check_deployment(deployment, "deployment")
    store = open_store(data.data_dir)
    found = {source.name: ask_for_version(source, store) for source in data.sources}
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
