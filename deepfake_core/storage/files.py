"""Files that appear whole or not at all."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepfake_core.errors import DeepfakeError, DiskError

NO_SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT)

MAX_WRITING_SECONDS = 24 * 3600
"""Nobody writes to a file, or adds to what belongs together, for longer; the process may be on another machine."""


@contextmanager
def translate_disk_errors(place: Path) -> Iterator[None]:
    """Raise what a full disk, or a file or folder that can't be written, made fail as an error that says what to do.

    Args:
        place: what is written, for failures that name no file.

    Raises:
        DiskError
    """
    try:
        yield
    except DeepfakeError:
        raise
    except Exception as exc:
        code = find_disk_failure(exc)
        if code is None:
            raise
        name = getattr(exc, "filename", None)
        path = Path(os.fsdecode(name) if isinstance(name, str | bytes) else place).absolute()
        if code in NO_SPACE_ERRORS:
            folder = next(each for each in (path, *path.parents) if each.is_dir())
            message = (
                f"What is written must fit on the disk. Received: {os.strerror(code)} at {path}; "
                f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there. Make room, or use another disk."
            )
        else:
            message = (
                f"This user must be able to read and write {path}. Received: {os.strerror(code)}. Change its "
                "permissions or how its disk is mounted, or use another folder."
            )
        raise DiskError(f"{message} What was finished is kept.") from exc


def find_disk_failure(error: Exception) -> int | None:
    """Return the system's number of a failure of a disk here; None of any other, such as a remote store's."""
    if "database or disk is full" in str(error):  # SQLite has no such numbers
        return errno.ENOSPC
    if not isinstance(error, OSError):
        return None
    denied = error.errno in (errno.EACCES, errno.EPERM) and error.filename is not None
    return error.errno if denied or error.errno in (*NO_SPACE_ERRORS, errno.EROFS) else None


def show_name(name: str | Path) -> str:
    """Return a file's name as text that can be written anywhere: of bytes that are no UTF-8, with a backslash each."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it into place when the body ends, remove it if the body raises.

    What processes left here that were killed while they wrote to `path` is removed first.

    Raises:
        DiskError: if the disk is full, or the folder can't be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with translate_disk_errors(beside):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _hold(beside):
                _remove_abandoned(beside)
                yield beside
                beside.replace(path)  # while it is held: else another process takes it for abandoned
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def _hold(beside: Path) -> Iterator[None]:
    """Create a file and lock it, by which others see that its process lives; the lock ends with the process."""
    while True:
        with beside.open("wb") as file:
            with contextlib.suppress(OSError):  # some network filesystems have no locks
                fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file.fileno()).st_nlink:  # else another process took it for abandoned before it was locked
                yield
                return


def _remove_abandoned(own: Path) -> None:
    """Remove the temporary files for the same path that nobody holds."""
    name = re.compile(re.escape(own.stem) + r"\.\d+")
    for other in own.parent.iterdir():
        if name.fullmatch(other.name) and other != own:
            with contextlib.suppress(OSError), other.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), other.stat()):  # else its writer is at the next one
                    other.unlink()


def is_abandoned(path: Path) -> bool:
    """Whether a file is named as `write_beside` names what is not whole yet, and nobody writes to it any more."""
    try:
        return bool(re.fullmatch(r"\..+\.\d+", path.name)) and path.stat().st_mtime < time.time() - MAX_WRITING_SECONDS
    except FileNotFoundError:  # already renamed into place
        return False


def write_json(path: Path, content: dict[str, Any]) -> None:
    with write_beside(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n")


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there: under another name, since one that is half removed must not look whole."""
    aside = folder if folder.name.endswith(".partial") else folder.with_name(f".{folder.name}.partial")
    if folder.is_dir():
        folder.replace(aside)
        shutil.rmtree(aside)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Refuse to start writing what does not fit on the disk.

    Args:
        folder: an existing folder on that disk.
        needed: bytes.
        what: subject of the message, such as `owner/faces`.
        remedy: what else than making room would help, such as `set XDG_CACHE_HOME to another disk`.

    Raises:
        DiskError: if fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskError(
            f"{what} needs {needed / 1e9:.2f} GB more on the disk of {folder}, which has {free / 1e9:.2f} GB free. "
            f"Make room, or {remedy}."
        )
