"""Training on another machine, through a deployment, and one training at a time on a card."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.concurrency.sync import concurrency
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

from deepfake_core.config import EvaluationParameters, PromotionParameters, TrainingParameters
from deepfake_core.errors import ConfigurationError, ServiceError

GPU_LIMIT = "gpu"
"""A global concurrency limit, which `make deploy` creates."""


@contextmanager
def hold_gpu() -> Iterator[None]:
    """Hold a slot of the limit `gpu` meanwhile, so that two trainings never share a card; wait until one is free.

    A Prefect server that has no such limit, as one that was started for one run, lets the training begin at once.
    """
    with get_client(sync_client=True) as client:
        try:
            limits = [client.read_global_concurrency_limit_by_name(GPU_LIMIT).name]
        except ObjectNotFound:
            limits = []
    with concurrency(limits):
        yield


def check_deployment(name: str) -> None:
    """Refuse a deployment that does not exist before any work is done.

    Raises:
        ConfigurationError: if Prefect's server knows none of this name.
    """
    if not name:
        return
    with get_client(sync_client=True) as client:
        try:
            client.read_deployment_by_name(name)
        except (ObjectNotFound, ValueError) as exc:
            raise ConfigurationError(
                f"`train_on` must name a deployment, such as train/gpu, or be empty to train here. Received: "
                f"{name!r}, which the Prefect server at {client.api_url} does not know. `make deploy` creates "
                "the deployments."
            ) from exc


def run_remotely(
    name: str,
    dataset: str,
    training: TrainingParameters,
    evaluation: EvaluationParameters,
    promotion: PromotionParameters,
) -> str:
    """Run the train flow through its deployment and wait for it; return the id of its flow run.

    Raises:
        ServiceError: if it ends in any state but Completed; `run_deployment` itself would not say so.
    """
    run = cast(
        FlowRun,
        run_deployment(
            name,
            parameters={
                "dataset": dataset,
                # What was set alone: a whole augmentation would override what each candidate's recipe sets.
                "training": training.model_dump(mode="json", exclude_unset=True),
                "evaluation": evaluation.model_dump(mode="json"),
                "promotion": promotion.model_dump(mode="json"),
            },
        ),
    )
    if run.state is None or not run.state.is_completed():
        ended = f"{run.state.name}: {run.state.message}" if run.state else "unknown"
        raise ServiceError(
            f"The training run must complete. {name} run {run.name!r} ended as {ended}. Nothing was promoted "
            "unless its log says so; open that run's page for its log, then run again: the data set is kept."
        )
    return str(run.id)
