"""How tasks are declared: what is retried, and that inputs, which are large, are never hashed for a cache."""

from typing import Any

from prefect import State, Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import TaskRun

from deepfake_core.errors import PermanentError, TransientError


def retry_transient(task: Task, task_run: TaskRun, state: State) -> bool:  # noqa: ARG001 - Prefect's signature
    """Retry what can heal, such as a network; a person has to act on anything else."""
    return isinstance(state.result(raise_on_failure=False), TransientError)


def retry_shard(task: Task, task_run: TaskRun, state: State) -> bool:  # noqa: ARG001 - Prefect's signature
    """Retry unless a person has to act. What is not known may heal, such as a shared disk that does not answer."""
    return not isinstance(state.result(raise_on_failure=False), PermanentError)


CPU: dict[str, Any] = {"tags": ["cpu"], "cache_policy": NO_CACHE}
SHARD: dict[str, Any] = {**CPU, "retries": 2, "retry_delay_seconds": 10, "retry_condition_fn": retry_shard}
GPU: dict[str, Any] = {
    "tags": ["gpu"],
    "cache_policy": NO_CACHE,
    "retries": 1,
    "retry_condition_fn": retry_transient,
}
MLFLOW: dict[str, Any] = {"tags": ["mlflow"], "cache_policy": NO_CACHE}
NETWORK: dict[str, Any] = {
    "tags": ["network"],
    "cache_policy": NO_CACHE,
    "retries": 3,
    "retry_delay_seconds": [10, 60, 300],
    "retry_condition_fn": retry_transient,
}
