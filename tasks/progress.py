"""Progress of a task: a Prefect progress artifact, a few log lines, and in a terminal a line that moves."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

    A step that takes longer than a minute also logs each quarter. A Prefect server that does not answer costs no work:
    it is asked again a minute later.
    """
    log = get_run_logger()
    artifact: UUID | None = None
    start = time.monotonic()
    last = logged = 0.0

    def report(done: int, total: int) -> None:
        nonlocal artifact, last, logged
        move(done, total)
        finished = done >= total
        now = time.monotonic()
        if not finished and now - last < SECONDS_BETWEEN_UPDATES:
            return
        last = now
        share = 100.0 * done / total if total else 100.0
        if share >= logged + PERCENT_BETWEEN_LINES and not finished and now - start > SECONDS_BEFORE_LINES:
            logged = share
            log.info("%s: %.0f %%", name, share, extra={"is_progress": True})
        try:
            artifact = _draw(artifact, name, share)
        except httpx.HTTPError as exc:
            log.warning("Prefect can't show how far '%s' is (%s: %s)", name, type(exc).__name__, exc)
            last = time.monotonic() + SECONDS_AFTER_FAILURE

    with moving_line(name) as move:
        yield report


def _draw(artifact: UUID | None, name: str, share: float) -> UUID:
    """Create a progress artifact or update it, and return its id. The work waits for it, so there is no retry."""
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
