"""One run at a time in a folder."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import filelock

from deepfake_core.errors import DiskError, LockedError
from deepfake_core.storage.files import translate_disk_errors, write_json


@contextmanager
def lock_folder(folder: Path, holder: str, remedy: str = "set `data.data_dir` to another folder") -> Iterator[None]:
    """Hold a folder for one run; calls can be nested in one process.

    The operating system releases the lock when the process ends, however it ends. It holds for this machine alone.

    Args:
        holder: who holds it, for the message that others get.
        remedy: what else than waiting would help them.

    Raises:
        LockedError: at once, if another process holds it; says which.
        DiskError: if a full disk, or a file or folder that can't be written, made the body fail.
    """
    folder = folder.expanduser().resolve()
    with translate_disk_errors(folder), _lock(folder, holder, remedy):
        yield


@contextmanager
def _lock(folder: Path, holder: str, remedy: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / ".lock.json"
    lock = filelock.FileLock(folder / ".lock", timeout=0, is_singleton=True, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout as exc:
        held_by = json.loads(note.read_text()) if note.exists() else {"holder": "unknown"}
        raise LockedError(
            f"One run at a time may use a folder. {folder} is held by {held_by}. Wait until it ends, or {remedy}."
        ) from exc
    try:
        if lock.lock_counter == 1:
            started = datetime.now(UTC).isoformat(timespec="seconds")
            with suppress(DiskError):  # so that a full disk doesn't keep housekeeping from making room
                write_json(note, {"holder": holder, "pid": os.getpid(), "host": os.uname().nodename, "since": started})
        yield
    finally:
        if lock.lock_counter == 1:
            note.unlink(missing_ok=True)
        lock.release()
