"""How tasks are declared: what is retried, and that inputs, which are large, are never hashed for a cache.

They have no tags: for each tag, Prefect's server is asked for a limit before a task begins, which takes it seconds at
times.
"""

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


ONCE: dict[str, Any] = {"cache_policy": NO_CACHE}
SHARD: dict[str, Any] = {**ONCE, "retries": 2, "retry_delay_seconds": 10, "retry_condition_fn": retry_shard}
GPU: dict[str, Any] = {**ONCE, "retries": 1, "retry_condition_fn": retry_transient}
NETWORK: dict[str, Any] = {
    **ONCE,
    "retries": 3,
    "retry_delay_seconds": [10, 60, 300],
    "retry_condition_fn": retry_transient,
}
