"""Small files in a folder or at a URL. Each is written whole under a new name, so that several writers need no lock."""

import os
import re
import shutil
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepfake_core.errors import ArchiveError, ConfigurationError
from deepfake_core.storage.files import translate_disk_errors, write_beside
from deepfake_core.storage.store_errors import translate_errors


@dataclass(frozen=True)
class FolderObjects:
    """Files below a folder. Links don't count.

    Attributes:
        address: the folder.
    """

    address: str

    @property
    def _root(self) -> Path:
        return Path(self.address)

    def list_names(self) -> list[str]:
        """Return the names directly below the folder, in order, without hidden ones; none if it is not there."""
        with translate_disk_errors(self._root):
            try:
                return sorted(name for name in os.listdir(self._root) if not name.startswith("."))  # noqa: PTH208
            except FileNotFoundError:
                return []
            except NotADirectoryError as exc:
                raise ConfigurationError(f"The address must be a folder. Received: {self._root}, a file.") from exc

    def scan(self, below: str = "") -> dict[str, int]:
        """Return the names of all files below the folder, or below one in it, each with its bytes.

        Those that a killed process left half written are among them: their names begin with a dot.
        """
        found: dict[str, int] = {}
        if (self._root / below).is_symlink():
            return found
        with translate_disk_errors(self._root):
            for parent, _, files in os.walk(self._root / below, onerror=_raise_unless_absent):
                for name in files:
                    path = Path(parent, name)
                    if (size := _measure(path)) is not None:
                        found[path.relative_to(self._root).as_posix()] = size
        return dict(sorted(found.items()))

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Return a file's content; None if there is none.

        Raises:
            ArchiveError: if it is larger.
        """
        path = self._root / name
        with translate_disk_errors(path):
            if _measure(path) is None:
                return None
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
        _check_size(path, len(data), max_bytes)
        return data

    def read_all(self, sizes: Mapping[str, int], max_bytes: int) -> dict[str, bytes | None]:
        """Return the content of the files that `scan` found; None for one that is gone or larger than `max_bytes`."""
        return {name: self.read(name, max_bytes) if size <= max_bytes else None for name, size in sizes.items()}

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all.

        Raises:
            DiskError: if the disk is full, or the folder can't be written.
        """
        with write_beside(self._root / name) as beside:
            beside.write_bytes(data)

    def measure_age(self, name: str) -> float:
        """Return how many seconds ago a file was written; 0 if there is none."""
        with suppress(FileNotFoundError), translate_disk_errors(self._root):
            return time.time() - (self._root / name).stat().st_mtime
        return 0

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with translate_disk_errors(self._root):
            (self._root / name).unlink(missing_ok=True)

    def remove_below(self, below: str) -> None:
        """Remove a folder in this one, in any order."""
        with translate_disk_errors(self._root):
            if (self._root / below).is_dir():
                shutil.rmtree(self._root / below)


@dataclass(frozen=True)
class RemoteObjects:
    """Objects below a URL that fsspec knows; the methods are those of `FolderObjects`.

    Raises:
        ConfigurationError, CredentialsError, DownloadError: from every method, if the store refuses it or can't be
            reached.
    """

    address: str
    _files: Any
    _root: str

    def list_names(self) -> list[str]:
        with suppress(FileNotFoundError), translate_errors(self.address):
            found = self._files.ls(self._root, detail=False)
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)
        return []

    def scan(self, below: str = "") -> dict[str, int]:
        with suppress(FileNotFoundError), translate_errors(self.address):
            found = self._files.find(f"{self._root}/{below}".rstrip("/"), detail=True)
            return {path.removeprefix(f"{self._root}/"): info["size"] for path, info in sorted(found.items())}
        return {}

    def read(self, name: str, max_bytes: int) -> bytes | None:
        path = f"{self._root}/{name}"
        with suppress(FileNotFoundError), translate_errors(self.address):
            size = self._files.info(path)["size"]
            _check_size(f"{self.address}/{name}", size, max_bytes)
            return self._files.cat_file(path, start=0, end=size) if size else b""
        return None

    def read_all(self, sizes: Mapping[str, int], max_bytes: int) -> dict[str, bytes | None]:
        asked = {name: size for name, size in sizes.items() if 0 < size <= max_bytes}
        paths = [f"{self._root}/{name}" for name in asked]
        read: dict[str, bytes | None] = dict.fromkeys(sizes)
        with translate_errors(self.address):
            contents = self._files.cat_ranges(paths, [0] * len(paths), list(asked.values()), on_error="return")
            for name, content in zip(asked, contents, strict=True):
                if isinstance(content, bytes):
                    read[name] = content
                elif not isinstance(content, FileNotFoundError):
                    raise content
        return read

    def write(self, name: str, data: bytes) -> None:
        with translate_errors(self.address):
            self._files.pipe_file(f"{self._root}/{name}", data)

    def measure_age(self, name: str) -> float:
        with suppress(FileNotFoundError), translate_errors(self.address):
            return time.time() - self._files.modified(f"{self._root}/{name}").timestamp()
        return 0

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError), translate_errors(self.address):
            self._files.rm_file(f"{self._root}/{name}")

    def remove_below(self, below: str) -> None:
        for name in self.scan(below):
            self.remove(name)


Objects = FolderObjects | RemoteObjects


def open_objects(address: str | Path) -> Objects:
    """Return the files below a folder or a URL. Nothing is asked of the network yet.

    Raises:
        ConfigurationError: for a malformed URL, one that holds a user name or password, or one that needs a package
            that is not installed.
    """
    if not re.match(r"[\w+.:-]+:/", str(address)):
        return FolderObjects(str(Path(address).expanduser().resolve()))
    try:
        from deepfake_core.storage.store import open_filesystem, open_store
    except ImportError as exc:
        raise ConfigurationError(
            f"A URL needs packages that are not installed ({exc}). Received: {address}. Install the extra `remote`: "
            "pip install 'deepfake-retraining[remote]'."
        ) from exc
    url = open_store(address).url
    return RemoteObjects(url, *open_filesystem(url))


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _measure(path: Path) -> int | None:
    """Return the bytes of a file; None if it is absent, or not a regular file."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _check_size(place: object, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ArchiveError(f"This file may hold {max_bytes:,} bytes at most. Received: {place}, which holds more.")
