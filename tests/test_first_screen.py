"""What a command of `flows` shows on the way; `test_flows.py` has all that a whole retrain prints."""

import logging
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from deepfake_core.errors import SourceError
from flows import retrain, terminal
from tasks.progress import moving_line, show_progress

ROOT = Path(__file__).parents[1]


@pytest.fixture
def screen(monkeypatch):
    """Put the root logger and the filters of warnings back as they were."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", root.handlers[:])
    with warnings.catch_warnings():
        yield


def log(name: str, level: int, message: str, path: object = "/lib/prefect/engine.py", **more: object) -> None:
    error = more.pop("error", None)
    record = logging.LogRecord(name, level, str(path), 1, message, None, error and (type(error), error, None))
    record.__dict__.update(more)
    logging.getLogger().handle(record)


@pytest.mark.usefixtures("screen")
def test_lines_of_our_own_and_failures_of_anything_are_shown(capsys):
    with terminal.show_run():
        log("deepfake_core.data.index", logging.INFO, "40 files [1/2]")
        log("prefect.flow_runs", logging.INFO, "hardware: no GPU", ROOT / "tasks/model.py", flow_run_name="blue-ant")
        log("prefect.task_runs", logging.INFO, "Finished in state Completed()", task_run_name="merge")
        log("prefect", logging.INFO, "Starting temporary server")
        log("mlflow.store.db.utils", logging.INFO, "Updating database tables")
        log("prefect.task_runs", logging.INFO, "Task run failed with exception: - Retry 1/3", task_run_name="merge")
        log("deepfake_core.data.index", logging.WARNING, "one is odd")
        log("mlflow.pyfunc", logging.ERROR, "no space left", error=OSError("disk full"))
        log("prefect.flow_runs", logging.ERROR, "failed", flow_run_name="blue-ant", error=SourceError("there is none"))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line[10:] if line[2:3] == ":" else line for line in shown.err.splitlines()] == [
        "40 files [1/2]",
        "hardware: no GPU",
        "INFO merge: Task run failed with exception: - Retry 1/3",
        "WARNING deepfake_core.data.index: one is odd",
        "ERROR mlflow.pyfunc: no space left",
        "OSError: disk full",
        "ERROR blue-ant: failed",
    ]


@pytest.mark.usefixtures("screen")
def test_a_terminal_has_a_moving_line_for_each_step_and_log_lines_above(monkeypatch, tmp_path):
    monkeypatch.delenv("NO_COLOR", raising=False)
    with (tmp_path / "screen").open("w+") as file:
        console = Console(file=file, force_terminal=True, force_interactive=True, width=80)
        monkeypatch.setattr(terminal, "console", console)

        def work(name: str) -> None:
            with moving_line(name) as move:
                for done in range(1, 101):
                    move(done, 100)
                log("deepfake_core", logging.INFO, f"{name} is done")
                log("prefect.task_runs", logging.INFO, f"{name}: 50 %", ROOT / "tasks/progress.py", is_progress=True)

        with terminal.show_run(), ThreadPoolExecutor(3) as pool:
            list(pool.map(work, ["download one", "download two", "download three"]))
        shown = file.seek(0) or file.read()
    assert "100%" in shown
    assert "50 %" not in shown
    for name in ("one", "two", "three"):
        assert shown.count(f"  download {name} is done\n") == 1
    assert shown.rindex("\x1b[?25h") > shown.rindex("100%")  # the cursor is back


def test_no_line_moves_where_there_is_no_terminal(capsys):
    with show_progress(Console(stderr=True)), moving_line("download") as move:
        move(1, 2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("prefect_api", "screen")
def test_a_failed_retrain_says_why_once_and_ends_with_status_1(tracking, monkeypatch, capsys):
    file = tracking / "retrain.yaml"
    file.write_text(f"data: {{sources: [{{name: {tracking}/none.zip}}], data_dir: {tracking}/data}}")
    monkeypatch.setattr(sys, "argv", ["retrain", "--config", str(file)])
    assert retrain.main() == 1
    shown = capsys.readouterr().err
    assert "ERROR download none: Finished in state Failed" in shown
    assert "\nretrain stopped: " in shown
    assert f"{tracking}/none.zip" in shown.partition("retrain stopped: ")[2]
    assert "Traceback" not in shown


@pytest.mark.process
def test_what_is_written_while_tensorflow_loads_is_passed_on_but_for_its_chatter(tmp_path):
    (tmp_path / "keras.py").write_text(
        "import os\n"
        "os.write(2, b'WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n')\n"
        "os.write(2, b'I0000 00:00:1.2    3 cudart_stub.cc:31] Could not find cuda drivers\\n')\n"
        "os.write(2, b'I0000 00:00:1.2    3 port.cc:153] oneDNN custom operations are on.\\n')\n"
        "os.write(2, b'The TensorFlow library was compiled to use AVX instructions\\n')\n"
        "os.abort()\n"
    )
    command = "import sys; sys.path.insert(0, sys.argv[1]); from flows.terminal import load_quietly; load_quietly()"
    ended = subprocess.run(
        [sys.executable, "-c", command, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode < 0
    assert ended.stderr == "The TensorFlow library was compiled to use AVX instructions\n"
