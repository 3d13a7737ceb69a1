"""What a run from the command line shows: our own lines, others' warnings, how far each step has come, how it ends.

A worker's runs keep Prefect's logging, whose pages show every line, and Prefect's way to end them.
"""

import atexit
import copy
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from deepfake_core.errors import DeepfakeError, ServiceError

CHATTER = r"^WARNING: All log messages before absl::InitializeLog\(\)|^I0000 .* (cudart_stub|port)\.cc"
"""What TensorFlow's C++ writes while it loads, of CUDA that is missing and of oneDNN, as grep's pattern."""

STOPPED = "Stopped. What is finished is kept: run the same command again, and it continues from there."

SECONDS_TO_STOP = 30.0
"""For runs in MLflow to be closed, and for threads that can't be interrupted, such as a download's."""

ABORTED = re.compile(r"Crash detected! Execution was aborted by|Finished in state Crashed\('Execution was aborted by")
"""What Prefect logs of each task and flow of a run that was stopped."""

OWN_FOLDERS = {Path(__file__).parent, Path(__file__).parents[1] / "tasks"}

console = Console(stderr=True)
_status = 0


def load_quietly() -> None:
    """Import Keras, and with it TensorFlow, without what it writes meanwhile; otherwise the first import prints it.

    No variable silences these lines, which C++ writes straight to file descriptor 2. A process of its own passes
    on all others, so that the reason of a crash is seen too.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # to TensorFlow, a machine without a GPU is an error
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    stderr = os.dup(2)
    with subprocess.Popen(["grep", "--line-buffered", "-Ev", CHATTER], stdin=subprocess.PIPE, stdout=stderr) as grep:
        os.dup2(grep.stdin.fileno(), 2)  # type: ignore[union-attr] # a pipe
        try:
            import keras  # noqa: F401
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def end_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end this process with one sentence, its runs in MLflow closed and its children ended."""
    atexit.register(_leave)  # what is registered first is called last
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(number: int, _: object) -> None:
    """Raise SystemExit once; end at once at the next signal, or if a thread goes on for too long."""

    def end(*_: object) -> None:
        atexit._run_exitfuncs()  # says the sentence, ends Prefect's temporary server, and leaves

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, end)
    timer = threading.Timer(SECONDS_TO_STOP, end)
    timer.daemon = True
    timer.start()
    atexit.register(print, f"\n{STOPPED}", file=sys.stderr)
    raise SystemExit(set_status(128 + number))


def set_status(status: int) -> int:
    """Remember the status of a process that fails, and return it."""
    global _status
    _status = status
    return status


def _leave() -> None:
    """Skip the interpreter's teardown, in which TensorFlow waits forever for a fit that was interrupted."""
    if _status:
        sys.stdout.flush()
        os._exit(_status)


@contextmanager
def show_run() -> Iterator[None]:
    """Show lines of our own and others' warnings on standard error; in a terminal, also moving lines of progress.

    The root logger keeps its new handler: Prefect still logs when the process ends.
    """
    import httpx
    from prefect.logging.handlers import PrefectConsoleHandler  # not before load_quietly, as all that imports it

    from deepfake_core.registry.connection import use_root_logger
    from deepfake_core.storage.files import translate_disk_errors
    from tasks.progress import show_progress

    root = logging.getLogger()
    root.handlers = [each for each in root.handlers if not isinstance(each, PrefectConsoleHandler)]
    root.addHandler(TerminalHandler())
    logging.getLogger("deepfake_core").setLevel(logging.INFO)
    use_root_logger()
    logging.raiseExceptions = False  # a server that is gone can't take logs: Prefect would say so every two seconds
    warnings.filterwarnings("ignore", category=FutureWarning, module="keras")
    with show_progress(console):
        try:
            with translate_disk_errors(Path.cwd()):
                yield
        except httpx.HTTPError as exc:  # of Prefect's client
            raise ServiceError(
                f"Prefect must answer until a run ends. Received: {type(exc).__name__}: {exc}. Start its server again "
                "and run the same command: what is finished is kept, and it continues from there."
            ) from exc


class TerminalHandler(logging.Handler):
    """Prints time and message; level and origin only of warnings and of lines that are not our own."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(is_shown)
        self.times = logging.Formatter(datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        line = copy.copy(record)  # other handlers, such as Prefect's, get the record as it was
        if record.exc_info and (isinstance(record.exc_info[1], DeepfakeError) or record.name.startswith("prefect")):
            line.exc_info = line.exc_text = None  # the message says it all, or what ends the run says it again
        if not is_own(record) or record.levelno >= logging.WARNING:
            run = getattr(record, "task_run_name", None) or getattr(record, "flow_run_name", None)
            line.msg, line.args = f"{record.levelname} {run or record.name}: {record.getMessage()}", None
        time = self.times.formatTime(record, self.times.datefmt)
        return f"{time}  {self.times.format(line)}"

    def emit(self, record: logging.LogRecord) -> None:
        try:
            console.print(self.format(record), soft_wrap=True, markup=False, emoji=False, highlight=False)
        except Exception:  # noqa: BLE001 - as logging's own handlers do
            self.handleError(record)


def is_own(record: logging.LogRecord) -> bool:
    """Return whether our code logged this, in the core or through a run's logger."""
    return record.name.startswith("deepfake_core") or Path(record.pathname).parent in OWN_FOLDERS


def is_shown(record: logging.LogRecord) -> bool:
    """Return whether a line is worth showing: in a terminal, moving lines say how far a step has come."""
    if getattr(record, "is_progress", False):
        return not console.is_interactive
    if ABORTED.match(str(record.msg)):
        return False
    failed = str(record.msg).startswith("Task run failed")  # Prefect logs at INFO what it is about to retry
    return failed or is_own(record) or record.levelno >= logging.WARNING
