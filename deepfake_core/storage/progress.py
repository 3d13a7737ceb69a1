"""How far something has come."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]
"""Called with what is done and the total, both in one unit (bytes, images, batches)."""


@contextmanager
def watch_progress(measure: Callable[[], int], total: int, on_progress: Progress | None) -> Iterator[None]:
    """Report every second how far a library has come that reports nothing itself, and the total at the end.

    Args:
        measure: returns what is done. Called from a thread of its own: libraries that do report, such as s3fs, call
            back inside their event loop, where a slow or blocking `on_progress` would stop the transfer.
    """
    if on_progress is None or not total:
        yield
        return
    done = threading.Event()

    def report() -> None:
        while not done.wait(1.0):
            on_progress(measure(), total)

    watcher = threading.Thread(target=report, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    on_progress(total, total)
