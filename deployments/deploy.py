"""Create the work pools cpu and gpu, the limit gpu, the deployments and the alerts on the Prefect server.

The server is that at PREFECT_API_URL.

    python deployments/deploy.py [--gpu process|kubernetes]

`make deploy` runs it. Workers of both pools run the code at the path of this file. Of the gpu pool's types,
process is a worker on a machine with a GPU, and kubernetes one that starts a job for each run, as kubernetes-gpu.json
says. Without --gpu an existing pool keeps its type, and a new one is of type process.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

HERE = Path(__file__).parent
ROOT = HERE.parent
TYPES = ("process", "kubernetes")


def read_template(kind: str) -> dict[str, Any]:
    """Return the base job template of a work pool's type."""
    if kind == "kubernetes":
        return json.loads((HERE / "kubernetes-gpu.json").read_text())
    return ProcessWorker.get_default_base_job_template()


def apply_pool(client: SyncPrefectClient, name: str, kind: str = "") -> None:
    """Create a work pool, or update its base job template; its limits and whether it is paused stay as they are."""
    try:
        existing = client.read_work_pool(name).type
    except ObjectNotFound:
        existing = ""
    kind = kind or (existing if existing in TYPES else TYPES[0])
    template = read_template(kind)
    if not existing:
        client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=template))
    elif existing == kind:
        client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
    else:
        sys.exit(
            f"The type of the work pool {name} must be {kind}. Received: {existing}, which can't be changed. "
            f"When nothing runs on it: prefect work-pool delete {name}, then try again."
        )


def apply_limit(client: SyncPrefectClient, name: str) -> None:
    """Create a global concurrency limit of 1, which a training holds; one that exists keeps what a person has set."""
    try:
        client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=TYPES, default="", help="type of the gpu pool")
    gpu = parser.parse_args().gpu
    with get_client(sync_client=True) as client:
        apply_pool(client, "cpu", "process")
        apply_pool(client, "gpu", gpu)
        apply_limit(client, "gpu")  # tasks.remote.GPU_LIMIT
    environment = {**os.environ, "PWD": str(ROOT)}  # prefect.yaml's pull step holds it
    prefect = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    prefect += ["--prefect-file", "deployments/prefect.yaml"]
    for command in (prefect, [sys.executable, "deployments/alerts.py"]):
        done = subprocess.run(command, cwd=ROOT, env=environment)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
