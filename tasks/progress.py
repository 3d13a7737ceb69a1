"""Progress of a task: a Prefect progress artifact, a few log lines, and in a terminal a line that moves."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from contextvars import copy_context
from typing import cast
from uuid import UUID

import httpx
import rich.progress
from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from rich.console import Console

from deepfake_core.storage.progress import Progress

SECONDS_BETWEEN_UPDATES = 2.0
SECONDS_BEFORE_LINES = 60.0
PERCENT_BETWEEN_LINES = 25
SECONDS_AFTER_FAILURE = 60.0

MAX_SECONDS_TO_END = 5.0
"""How long a step that has ended waits for a Prefect server to be told so."""

_lines: rich.progress.Progress | None = None


@contextmanager
def show_progress(console: Console) -> Iterator[None]:
    """Show a moving line for each step of this process that runs meanwhile, if the console is a terminal."""
    global _lines
    if not console.is_interactive:
        yield
        return
    columns = (
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeRemainingColumn(compact=True),
    )
    lines = rich.progress.Progress(
        *columns, console=console, transient=True, redirect_stdout=False, refresh_per_second=4
    )
    with lines:
        _lines = lines
        try:
            yield
        finally:
            _lines = None


@contextmanager
def report_progress(name: str) -> Iterator[Progress]:
    """Yield a callback for what is done and what there is in all; what shows it appears with the first call.

    A step that takes longer than a minute also logs each quarter.
    """
    log, start, logged = get_run_logger(), time.monotonic(), 0.0

    def report(done: int, total: int) -> None:
        nonlocal logged
        move(done, total)
        share = 100.0 * done / total if total else 100.0
        artifact.show(share)
        if share >= logged + PERCENT_BETWEEN_LINES and done < total and time.monotonic() - start > SECONDS_BEFORE_LINES:
            logged = share
            log.info("%s: %.0f %%", name, share, extra={"is_progress": True})

    with closing(ProgressArtifact(name)) as artifact, moving_line(name) as move:
        yield report


class ProgressArtifact:
    """How far a step is, at Prefect's server. The work never waits for the server, but up to 5 s at the step's end.

    One that does not answer is asked again a minute later.
    """

    def __init__(self, name: str) -> None:
        self._name, self._log = name, get_run_logger()
        self._share: float | None = None
        self._news, self._ended = threading.Event(), threading.Event()
        # In the caller's context, by which Prefect knows whose progress it is.
        self._sender = threading.Thread(target=copy_context().run, args=(self._send,), daemon=True)
        self._sender.start()

    def show(self, share: float) -> None:
        """Show a share in percent, soon."""
        self._share = share
        self._news.set()

    def close(self) -> None:
        """Send the last share."""
        self._ended.set()
        self._news.set()
        self._sender.join(MAX_SECONDS_TO_END)

    def _send(self) -> None:
        artifact, sent = None, None
        while self._news.wait():
            self._news.clear()
            is_last, share = self._ended.is_set(), self._share
            if share is not None and share != sent:
                try:
                    artifact, sent = _draw(artifact, self._name, share), share
                    self._ended.wait(SECONDS_BETWEEN_UPDATES)
                except httpx.HTTPError as exc:
                    kind = type(exc).__name__
                    self._log.warning("Prefect can't show how far '%s' is (%s: %s)", self._name, kind, exc)
                    is_last |= self._ended.wait(SECONDS_AFTER_FAILURE)
            if is_last:
                return


def _draw(artifact: UUID | None, name: str, share: float) -> UUID:
    """Create a progress artifact or update it, and return its id. There is no retry: the next share is news."""
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: 5.0}):
        if artifact:
            return cast(UUID, update_progress_artifact(artifact, progress=share))
        key = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return cast(UUID, create_progress_artifact(share, key=key, description=name))


@contextmanager
def moving_line(name: str) -> Iterator[Progress]:
    """Yield a callback that moves a step's line, where lines are shown; it is removed when the step ends."""
    lines = _lines
    line: rich.progress.TaskID | None = None

    def move(done: int, total: int) -> None:
        nonlocal line
        if lines is None:
            return
        if line is None:
            line = lines.add_task(name)
        lines.update(line, completed=done, total=total)

    try:
        yield move
    finally:
        if lines is not None and line is not None:
            lines.refresh()  # a short step's end too
            lines.remove_task(line)
