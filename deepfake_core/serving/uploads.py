"""The folder in which the page keeps uploads, for a while."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MAX_UPLOAD_AGE_SECONDS = 600
"""Older uploads are removed."""

UPLOADS = "deepfake-page-"
"""How the names of folders with uploads begin; the number of the process follows."""


@contextmanager
def keep_uploads() -> Iterator[None]:
    """Let Gradio keep uploads in a folder of this process, which goes at the end; remove those of ended processes."""
    parent = Path(os.environ.get("GRADIO_TEMP_DIR", tempfile.gettempdir()))
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{UPLOADS}*"):
        if not _is_running(left.name.removeprefix(UPLOADS).partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{UPLOADS}{os.getpid()}-", dir=parent) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        ended = threading.Event()
        threading.Thread(target=_remove_old, args=(Path(folder), ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()


def _remove_old(folder: Path, ended: threading.Event) -> None:
    """Remove old files until the page ends: those of aborted uploads too, of which Gradio does not know."""
    while not ended.wait(MAX_UPLOAD_AGE_SECONDS / 10):
        for parent, _, names in os.walk(folder):  # a folder that goes meanwhile is passed over
            for file in (Path(parent, name) for name in names):
                with suppress(OSError):
                    if time.time() - file.stat().st_mtime > MAX_UPLOAD_AGE_SECONDS:
                        file.unlink()


def _is_running(number: str) -> bool:
    try:
        os.kill(int(number), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass  # another user's
    return True
