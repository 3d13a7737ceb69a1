"""Files that appear whole or not at all."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all, both in one unit (bytes, images, epochs)."""


@contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield a path beside to write to; it is renamed into place when the body ends, removed if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    with write_beside(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n")


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def watch_progress(measure: Callable[[], int], total: int, on_progress: Progress | None) -> Iterator[None]:
    """Report every second what a library has done that tells it in no other way, and the total at the end."""
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
