"""Files that appear whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepfake_core.errors import DiskSpaceError


@contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it into place when the body ends, remove it if the body raises."""
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
        DiskSpaceError: if fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskSpaceError(
            f"{what} needs {needed / 1e9:.2f} GB more on the disk of {folder}, which has {free / 1e9:.2f} GB free. "
            f"Make room, or {remedy}."
        )
