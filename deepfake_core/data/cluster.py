"""A connection to a Ray cluster. Ray is imported here alone, and only where `cluster` names one."""

import contextlib
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepfake_core.errors import ConfigurationError, ServiceError

CONNECT_SECONDS = 10


@contextlib.contextmanager
def connect_cluster(address: str, packages: Sequence[Path]) -> Iterator[int]:
    """Connect this process to a Ray cluster; yield the number of its cores.

    Args:
        address: as `cluster` has it, not empty.
        packages: folders of code that nodes run. They get a copy, so that they run what the driver runs.

    Raises:
        ConfigurationError: if Ray is not installed.
        ServiceError: if there is no cluster, it has another version of Ray or Python, or a node failed for good or has
            too little memory.
    """
    try:
        import prefect_ray  # noqa: F401
        import ray
    except ImportError as exc:
        raise ConfigurationError(
            f"`cluster` needs packages that are not installed ({exc}). Install the extra `cluster`: "
            "pip install 'deepfake-retraining[cluster]'. Or leave `cluster` empty."
        ) from exc
    rule = "`cluster` must name a running Ray cluster that this machine reaches"
    remedy = "Compare with `ray status` on its head node; start one by `ray start --head`, or leave it empty."
    code = {"py_modules": [str(package) for package in packages], "excludes": ["__pycache__"]}
    try:
        if address != "auto":
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")  # attempts to connect, of 40 s each; else 20
        os.environ.setdefault("RAY_task_oom_retries", "3")  # else for ever
        ray.init(address, runtime_env=code, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ray.exceptions.RayError) as exc:
        raise ServiceError(f"{rule}. Received: {address} ({_list_lines(exc)[-1]}). {remedy}") from exc
    try:
        cores = int(ray.cluster_resources().get("CPU", 0))
        if not cores:
            raise ServiceError(f"{rule}, with at least one core. Received: {address}, which has none. {remedy}")
        yield cores
    except ray.exceptions.OutOfMemoryError as exc:
        where = " ".join([_list_lines(exc)[0], *getattr(exc, "__notes__", ())])
        raise ServiceError(
            f"Each node of `cluster` must have memory for a shard on each of its cores. Received: {where}. What was "
            "finished is kept: give the nodes more memory, or fewer cores (`ray start --num-cpus`), and run again."
        ) from exc
    except ray.exceptions.RayError as exc:
        lines = _list_lines(exc)
        where = " ".join([lines[0], *getattr(exc, "__notes__", ())])
        raise ServiceError(
            "Each node of `cluster` must stay up, and have the packages that this machine has. "
            f"Received: {where}: {lines[-1]}. What was finished is kept: mend the node and run again."
        ) from exc
    finally:
        ray.shutdown()


def _list_lines(exc: Exception) -> list[str]:
    """Return an error's text without colours; of what failed elsewhere, the last line says why."""
    return re.sub(r"\x1b\[\d+m", "", str(exc)).strip().splitlines() or [type(exc).__name__]
