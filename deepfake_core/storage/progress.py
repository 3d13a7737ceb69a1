"""How far something has come."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context

from fsspec.callbacks import Callback

Progress = Callable[[int, int], None]
"""Called with what is done and the total, both in one unit (bytes, images, batches)."""

SECONDS_BETWEEN_REPORTS = 1.0


@contextmanager
def count_bytes(total: int, on_progress: Progress | None) -> Iterator[Callback]:
    """Yield a callback for fsspec that reports at most once a second, and the total at the end."""
    if on_progress is None or not total:
        yield Callback()
        return
    reported = time.monotonic()

    def report(_: int | None, value: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= SECONDS_BETWEEN_REPORTS:
            reported = time.monotonic()
            on_progress(value, total)

    yield Callback(hooks={"report": report})
    on_progress(total, total)


@contextmanager
def watch_progress(measure: Callable[[], int], total: int, on_progress: Progress | None) -> Iterator[None]:
    """Report every second how far a library has come that reports nothing itself, and the total at the end.

    Args:
        measure: returns what is done.
    """
    if on_progress is None or not total:
        yield
        return
    done = threading.Event()

    def report() -> None:
        while not done.wait(SECONDS_BETWEEN_REPORTS):
            on_progress(measure(), total)

    # In the caller's context, by which Prefect knows whose progress it is.
    watcher = threading.Thread(target=copy_context().run, args=(report,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    on_progress(total, total)
