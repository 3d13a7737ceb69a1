"""Shards run as tasks, in threads of this machine or on a Ray cluster: only the task runner differs."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from prefect import Task
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from deepfake_core.data.cluster import connect_cluster
from deepfake_core.errors import ConfigurationError, DeepfakeError
from tasks.progress import report_progress

ROOT = Path(__file__).parents[1]
CODE = ("deepfake_core", "tasks")
"""The packages that a shard's task imports."""

Shard = TypeVar("Shard")
"""What a task works on; its text is its name."""


class Workers(NamedTuple):
    """What runs shards: how many at once at most, and in how many threads each."""

    runner: TaskRunner[Any]
    at_once: int
    threads: int


@contextmanager
def open_workers(cluster: str, at_once: int) -> Iterator[Workers]:
    """Yield the workers of a cluster, or so many threads of this machine, ready to run tasks."""
    if not cluster:
        here: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=at_once)
        with here:
            yield Workers(here, at_once, max(1, (os.cpu_count() or 1) // at_once))
        return
    if not PREFECT_API_URL.value():
        raise ConfigurationError(
            "`cluster` needs a Prefect server that the nodes reach too. Received: no PREFECT_API_URL. Start one, "
            "such as by `make up`, and set PREFECT_API_URL to its address."
        )
    with connect_cluster(cluster, [ROOT / name for name in CODE]) as cores:
        from prefect_ray import RayTaskRunner

        with RayTaskRunner() as there:  # of the connection that is open
            yield Workers(there, 2 * cores, 1)


def run_shards(task: Task[[Shard, int], None], shards: Sequence[Shard], cluster: str, at_once: int = 2) -> None:
    """Run a task for each shard, in order. If one fails, no other is begun, and those in progress are finished.

    Args:
        task: takes a shard, and the number of threads that it may use.
        cluster: address of a Ray cluster; empty for this machine.
        at_once: shards in progress on this machine; with 2, one ends while the next begins.

    Raises:
        DeepfakeError: of the first shard that failed, with its name.
    """
    if not shards:
        return
    waiting = deque(shards)
    begun: deque[tuple[Shard, PrefectFuture[None]]] = deque()
    failed: list[tuple[Shard, PrefectFuture[None]]] = []
    with open_workers(cluster, at_once) as workers, report_progress(task.name) as on_progress:
        while waiting or begun:
            while waiting and len(begun) < workers.at_once:
                shard = waiting.popleft()
                begun.append((shard, workers.runner.submit(task, {"shard": shard, "threads": workers.threads})))
            shard, future = begun.popleft()
            future.wait()
            if future.state.is_completed():
                on_progress(len(shards) - len(waiting) - len(begun), len(shards))
            else:
                failed.append((shard, future))
                waiting.clear()
        for shard, future in failed:
            raise_failure(future, f"{task.name} {shard}")


def raise_failure(future: PrefectFuture[None], name: str) -> None:
    """Raise why a task failed, with its name."""
    try:
        future.result()
    except DeepfakeError as exc:
        raise type(exc)(f"{name}: {exc}") from exc
    except Exception as exc:
        exc.add_note(f"in {name}")
        raise
