"""Progress of a task, as a Prefect progress artifact and as log lines."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from deepfake_core.storage.progress import Progress

SECONDS_BETWEEN_UPDATES = 2.0
PERCENT_BETWEEN_LINES = 10


@contextmanager
def report_progress(name: str) -> Iterator[Progress]:
    """Yield a callback for what is done and what there is in all; the artifact appears with the first call."""
    log = get_run_logger()
    artifact = None
    last = logged = 0.0

    def report(done: int, total: int) -> None:
        nonlocal artifact, last, logged
        finished = done >= total
        if not finished and time.monotonic() - last < SECONDS_BETWEEN_UPDATES:
            return
        last = time.monotonic()
        share = 100.0 * done / total if total else 100.0
        if share >= logged + PERCENT_BETWEEN_LINES or finished:
            logged = share
            log.info("%s: %.0f %%", name, share)
        if artifact is None:
            key = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
            artifact = create_progress_artifact(share, key=key, description=name)
        else:
            update_progress_artifact(artifact, progress=share)

    yield report
