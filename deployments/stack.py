"""The whole stack on this machine, on loopback: `make up` and `make down`.

    python deployments/stack.py up|down

Prefect's server, MLflow's server, a worker on each pool, and all deployments, kept running by supervisord. What they
keep is in the folder STACK (default: stack/). Ports: PREFECT_SERVER_API_PORT, MLFLOW_PORT; stack.env holds their
defaults. Other databases and artifact stores: PREFECT_SERVER_DATABASE_CONNECTION_URL, MLFLOW_BACKEND_STORE_URI,
MLFLOW_ARTIFACTS_DESTINATION.
"""

import argparse
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from dotenv import dotenv_values

ROOT = Path(__file__).parents[1]
CONFIGURATION = ROOT / "deployments" / "supervisord.conf"
SHARED = ROOT / "deployments" / "stack.env"
BIN = Path(sys.executable).parent
MAX_SECONDS_TO_START = 180
"""How long a part may take until it answers."""


def make_environment() -> dict[str, str]:
    """Return the environment of all parts: what is set already counts."""
    stack = Path(os.environ.get("STACK", ROOT / "stack")).absolute()
    defaults = {
        **dotenv_values(SHARED),
        "PREFECT_HOME": str(stack / "prefect"),
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{stack}/mlflow.db",
        "MLFLOW_ARTIFACTS_DESTINATION": str(stack / "artifacts"),
    }
    if not has_gpu():
        defaults["CUDA_VISIBLE_DEVICES"] = "-1"  # the gpu worker trains on the CPU on purpose
    environment = {**defaults, **os.environ}
    return {
        **environment,
        "STACK": str(stack),
        "BIN": str(BIN),
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_API_URL": f"http://127.0.0.1:{environment['PREFECT_SERVER_API_PORT']}/api",
        "MLFLOW_HOST": "127.0.0.1",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{environment['MLFLOW_PORT']}",
    }


def has_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def control(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "supervisorctl", "-c", CONFIGURATION, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def is_up(environment: dict[str, str]) -> bool:
    return control(environment, "pid").stdout.strip().isdigit()


def wait_for(name: str, address: str, log: str) -> None:
    """Wait until an address answers."""
    print(f"waiting for {name} at {address}", flush=True)
    deadline = time.monotonic() + MAX_SECONDS_TO_START
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                sys.exit(
                    f"{name} must answer within {MAX_SECONDS_TO_START} s. Received: nothing from {address}. See {log}."
                )
            time.sleep(0.5)


def up() -> None:
    environment = make_environment()
    stack = Path(environment["STACK"])
    stack.mkdir(parents=True, exist_ok=True)
    if not is_up(environment):
        subprocess.run([BIN / "supervisord", "-c", CONFIGURATION], env=environment, check=True)
    prefect, mlflow = environment["PREFECT_API_URL"].removesuffix("/api"), environment["MLFLOW_TRACKING_URI"]
    wait_for("Prefect", f"{prefect}/api/health", f"{stack}/prefect-server.log")
    wait_for("MLflow", f"{mlflow}/health", f"{stack}/mlflow-server.log")
    print("applying the deployments", flush=True)
    deploy = ["make", "--no-print-directory", "--assume-old", ".venv/installed", "deploy", f"BIN={BIN}"]
    done = subprocess.run(deploy, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"The deployments must be applied. Received:\n{done.stdout}{done.stderr}")
    print(done.stdout.splitlines()[-1])  # who receives alerts
    for worker in ("worker-cpu", "worker-gpu"):
        control(environment, "start", worker)
    print(control(environment, "status").stdout, end="")
    if environment.get("CUDA_VISIBLE_DEVICES") == "-1":
        print("\nNo GPU is used: the gpu worker trains on this machine's CPU.")
    print(
        f"\nPrefect: {prefect}\nMLflow: {mlflow}\nLogs and data: {stack}\n"
        f"Here: export PREFECT_API_URL={prefect}/api MLFLOW_TRACKING_URI={mlflow}\nEnd it: make down"
    )


def down() -> None:
    """End what `up` started, and nothing else."""
    environment = make_environment()
    pid = control(environment, "pid").stdout.strip()
    if not pid.isdigit():
        print(f"Nothing of {environment['STACK']} runs.")
        return
    control(environment, "shutdown")
    while is_up(environment) or Path(f"/proc/{pid}").exists():
        time.sleep(0.2)
    print(f"The stack of {environment['STACK']} has ended; what it kept is still there.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["up", "down"])
    {"up": up, "down": down}[parser.parse_args().command]()


if __name__ == "__main__":
    main()
