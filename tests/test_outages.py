"""What a run does when something that it needs goes away: real servers that are killed, real signals."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from flows.terminal import STOPPED
from tests.builders import ROOT, faces, wait_until, write_zip

pytestmark = [pytest.mark.process, pytest.mark.slow]


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
