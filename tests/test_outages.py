"""What a run does when something that it needs goes away: real servers that are killed, real signals."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import requests
import yaml

from flows.terminal import STOPPED
from tests.builders import ROOT, faces, free_port, wait_until, write_zip

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.sweep]


@contextmanager
def start_retrain(folder: Path, epochs: int, **environment: str) -> Iterator[psutil.Popen]:
    """Run `python -m flows.retrain` on a small zip, in a process group of its own, and kill it at the end."""
    archive = folder / "faces.zip"
    if not archive.exists():
        write_zip(archive, faces(20))
    training = {"candidates": ["cnn"], "image_size": 32, "epochs": epochs, "patience": epochs}
    values = {"data": {"sources": [{"name": str(archive)}], "data_dir": str(folder / "data")}, "training": training}
    (folder / "retrain.yaml").write_text(yaml.safe_dump(values))
    with (folder / "screen").open("w") as screen:
        run = psutil.Popen(
            [sys.executable, "-m", "flows.retrain", "--config", folder / "retrain.yaml"],
            env={**os.environ, "PREFECT_HOME": str(folder / "prefect"), **environment},
            stdout=screen,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        yield run
    finally:
        for process in [*run.children(recursive=True), run] if run.is_running() else []:
            process.kill()
        run.wait()


def read_epochs(folder: Path) -> int:
    """Return how many epochs the screen has shown."""
    return len(re.findall(r"cnn epoch \d+", (folder / "screen").read_text()))


def read_runs(folder: Path) -> set[tuple[str, int]]:
    """Return the status of MLflow's runs, and how many have it."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        return set(database.execute("select status, count(*) from runs group by status"))


@contextmanager
def start_server(address: str, *command: str, **environment: str) -> Iterator[psutil.Popen]:
    """Run a server that answers at an address, in a process group of its own, and kill it at the end."""
    server = psutil.Popen(
        [sys.executable, "-m", *command], env={**os.environ, **environment}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        wait_until(lambda: server.poll() is not None or answers(address))
        assert server.is_running()
        yield server
    finally:
        kill_group(server)


def answers(address: str) -> bool:
    try:
        return requests.get(address, timeout=5).ok
    except requests.RequestException:
        return False


def kill_group(server: psutil.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def test_prefects_server_gone_while_a_network_trains_costs_no_training(tracking):
    address = f"http://127.0.0.1:{(port := free_port())}/api"
    command = ("prefect", "server", "start", "--port", str(port))
    with (
        start_server(f"{address}/health", *command, PREFECT_HOME=str(tracking / "prefect")) as server,
        start_retrain(tracking, epochs=100, PREFECT_API_URL=address, PREFECT_CLIENT_MAX_RETRIES="1") as run,
    ):
        wait_until(lambda: read_epochs(tracking) > 2 or run.poll() is not None)
        kill_group(server)
        assert run.wait() == 1
    screen = (tracking / "screen").read_text()
    assert "Prefect can't show how far 'train cnn' is" in screen
    assert read_epochs(tracking) == 100
    assert "cnn: kept the checkpoint of epoch" in screen
    assert "\nretrain stopped: Prefect must answer until a run ends." in screen
    assert "Traceback" not in screen
    assert len(list(tracking.glob("data/training/*/detector/model.onnx"))) == 1  # the next run need not train


def test_mlflow_gone_in_mid_run_is_said_in_one_line(tracking):
    address = f"http://127.0.0.1:{(port := free_port())}"
    store = ("--backend-store-uri", f"sqlite:///{tracking}/mlflow.db")
    command = ("mlflow", "server", "--port", str(port), "--workers", "1", *store)
    environment = {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    with (
        start_server(f"{address}/health", *command) as server,
        start_retrain(tracking, epochs=10_000, **environment) as run,
    ):
        wait_until(lambda: read_epochs(tracking) > 2 or run.poll() is not None)
        kill_group(server)
        assert run.wait() == 1
    screen = (tracking / "screen").read_text()
    (line,) = [line for line in screen.splitlines() if line.startswith("retrain stopped: ")]
    assert line.startswith(f"retrain stopped: MLflow must answer at the tracking URI. Received: {address}")
    assert screen.endswith(f"\n{line}\n")
    assert "Traceback" not in screen
    assert list(tracking.glob("data/training/*/history.csv"))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_one_sentence_its_children_and_its_runs_in_mlflow(tracking, stop):
    with start_retrain(tracking, epochs=10_000) as run:
        wait_until(lambda: read_epochs(tracking) > 2 or run.poll() is not None)
        children = run.children(recursive=True)
        assert any("prefect.server" in " ".join(child.cmdline()) for child in children)
        if stop == signal.SIGINT:
            os.killpg(run.pid, stop)  # as a terminal does
        else:
            run.send_signal(stop)
        assert run.wait() == 128 + stop
    screen = (tracking / "screen").read_text()
    assert screen.endswith(f"\n{STOPPED}\n")
    assert "Traceback" not in screen
    assert "ERROR" not in screen
    psutil.wait_procs(children)
    assert read_runs(tracking) == {("FAILED", 2)}
    assert list(tracking.glob("data/training/*/history.csv"))


def check_prefect(folder: Path, *lines: str, seconds: str = "600") -> subprocess.CompletedProcess[str]:
    """Start Prefect's temporary server as a retrain does, in a process that runs other lines before."""
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    return subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, "from flows.command_line import check_prefect as check", "check()"])],
        env={
            **environment,
            "PREFECT_HOME": str(folder),
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": seconds,
            "PREFECT_LOGGING_LEVEL": "ERROR",
        },
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


PAUSE = """
import threading, time, psutil
def pause():
    own, servers = psutil.Process(), []
    while not servers:
        time.sleep(0.1)
        servers = [child for child in own.children() if "uvicorn" in child.cmdline()]
    while not any(connection.status == psutil.CONN_LISTEN for connection in servers[0].net_connections("inet")):
        time.sleep(0.001)
    servers[0].suspend()
    time.sleep(8)
    servers[0].resume()
threading.Thread(target=pause, daemon=True).start()
"""
"""The server listens, and does not answer for eight seconds, as on a busy machine."""


def test_a_busy_temporary_server_is_waited_for(tmp_path):
    ended = check_prefect(tmp_path, PAUSE)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_temporary_server_that_is_too_late_is_ended_and_said_in_one_sentence(tmp_path):
    ended = check_prefect(tmp_path, seconds="1")
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("deepfake_core.errors.ServiceError: Prefect's temporary server must answer within 1 seconds")
    address = re.search(r"no answer from (http://127\.0\.0\.1:\d+)", last)[1]
    assert not answers(f"{address}/api/health")
