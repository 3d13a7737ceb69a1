"""What passes between deployments: a training on another machine, one at a time on a card; a question to a person."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.concurrency.sync import concurrency
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled

from deepfake_core.config import DEFAULT_MODEL, EvaluationParameters, PromotionParameters, TrainingParameters
from deepfake_core.errors import ConfigurationError, ServiceError
from deepfake_core.registry.approval import explain_answered

APPROVE = "approve/manual"
"""The deployment that asks a person."""

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


def check_deployment(name: str, parameter: str) -> None:
    """Refuse a deployment that does not exist before any work is done.

    Args:
        name: empty for none.
        parameter: of the flow, that names it.

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
                f"`{parameter}` must name a deployment, such as train/gpu, or be empty. Received: {name!r}, which "
                f"the Prefect server at {client.api_url} does not know. `make deploy` creates the deployments."
            ) from exc


def run_remotely(
    name: str,
    address: str,
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
                "dataset": address,
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


def ask_for_approval(model_name: str, version: str) -> None:
    """Start the run that asks a person whether a version is promoted, unless one was started before, whatever became
    of it; without its deployment, log how to answer."""
    parameters = {"version": int(version), "model_name": model_name}
    key = f"{APPROVE}-{model_name}-{version}"
    try:
        run_deployment(APPROVE, parameters=parameters, timeout=0, as_subflow=False, idempotency_key=key)
    except (ObjectNotFound, ValueError):
        get_run_logger().warning(
            "version %s of %s waits for approval: `deepfake promote %s` or `deepfake refuse %s` answers. "
            "`make deploy` creates the deployment %s, which asks in Prefect",
            *(version, model_name, version, version, APPROVE),
        )


def close_questions() -> None:
    """Cancel the runs that still ask about a version that was decided about elsewhere, or deleted."""
    flow, suspended = FlowFilter(name={"any_": ["approve"]}), FlowRunFilter(state={"name": {"any_": ["Suspended"]}})
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_filter=flow, flow_run_filter=suspended):
            model_name, version = run.parameters.get("model_name", DEFAULT_MODEL), str(run.parameters["version"])
            if message := explain_answered(model_name, version):
                client.set_flow_run_state(run.id, Cancelled(message=message), force=True)
