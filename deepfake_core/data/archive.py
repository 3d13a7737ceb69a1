"""An archive, a zip or a folder, and its members, which are listed and read. Nothing is ever unpacked by name."""

import contextlib
import hashlib
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from deepfake_core.config import Source
from deepfake_core.detector import MAX_BYTES
from deepfake_core.errors import ArchiveError, SourceError
from deepfake_core.storage.files import hash_file

MAX_EXPANSION_FACTOR = 100
"""Members may add up to this many times the zip's size; images hardly compress, so more is a bomb."""


@dataclass(frozen=True)
class Archive:
    """A source's files on this disk, and where they come from.

    `sha256` is the zip's; of a folder, that of its listing (names, sizes, modification times).
    """

    source: Source
    path: Path
    sha256: str
    bytes: int
    version: int | None = None
    licence: str | None = None
    downloaded_at: str | None = None

    def describe(self) -> dict[str, Any]:
        """Return the provenance as plain values, for `dataset.json`."""
        return {
            "name": self.source.name,
            "drawn": self.source.drawn,
            "kaggle_version": self.version,
            "licence": self.licence,
            "archive_sha256": self.sha256,
            "archive_bytes": self.bytes,
            "downloaded_at": self.downloaded_at,
        }


@dataclass(frozen=True)
class Member:
    """One file of an archive. `problem` is a reason not to read it, or empty."""

    name: str
    size: int
    problem: str = ""
    handle: Any = None


def open_local(source: Source) -> Archive:
    """Return the archive of a source that is a zip, which is verified, or a folder on this disk.

    Raises:
        SourceError: if it does not exist.
        ArchiveError: if it is a zip and damaged.
    """
    path = Path(source.name).expanduser()
    if path.is_dir():
        members = list_folder(path)
        listing = [f"{member.name}\0{member.size}\0{member.handle.lstat().st_mtime_ns}" for member in members]
        digest = hashlib.sha256("\n".join(listing).encode()).hexdigest()
        return Archive(source, path.absolute(), digest, sum(member.size for member in members))
    if not path.is_file():
        raise SourceError(
            f"A local source must be an existing zip or folder. Received: {source.name!r} "
            f"(looked at {path.absolute()}). Correct `data.sources`."
        )
    verify_zip(path)
    return Archive(source, path.absolute(), hash_file(path), path.stat().st_size)


def verify_zip(path: Path) -> None:
    """Read every member and compare its checksum, in bounded memory.

    Raises:
        ArchiveError: if the file is no zip, a member is damaged, or it expands like a bomb.
    """
    with ArchiveReader(path) as reader:
        expanded = sum(member.size for member in reader.members)
        if expanded > MAX_EXPANSION_FACTOR * path.stat().st_size:
            raise ArchiveError(
                f"A zip may expand to {MAX_EXPANSION_FACTOR} times its size. Received: {path}, "
                f"{path.stat().st_size:,} bytes that expand to {expanded:,}."
            )
        for member in reader.members:
            reader.check(member)


class ArchiveReader:
    """List and read the files of a zip or a folder, following no link and no name out of it.

    Reading is safe from several threads at once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._zip: zipfile.ZipFile | None = None
        if path.is_dir():
            self.members = list_folder(path)
            return
        try:
            self._zip = zipfile.ZipFile(path)
            self._descriptor = self._zip.fp.fileno()  # type: ignore[union-attr]
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as exc:
            with path.open("rb") as file:
                begins = file.read(8)
            raise ArchiveError(
                f"An archive must be a whole zip file. Received: {path}, which begins with {begins!r} ({exc})."
            ) from exc
        seen: set[str] = set()
        self.members = [_describe_info(info, seen) for info in self._zip.infolist() if not info.is_dir()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._zip:
            self._zip.close()

    def read(self, member: Member) -> bytes:
        if member.size > MAX_BYTES:
            raise ArchiveError(f"A member may hold {MAX_BYTES:,} bytes. Received: {member.size:,}")
        if self._zip and member.handle.compress_type == zipfile.ZIP_STORED and (data := self._read_stored(member)):
            return data
        with self._open(member) as file:
            return file.read(member.size + 1)

    def _read_stored(self, member: Member) -> bytes | None:
        """Read a member that is not compressed in one call; None if all is not as expected, so that zipfile says why.

        Threads that read through one `zipfile.ZipFile` wait for each other, longer than decoding a small image takes.
        """
        info = member.handle
        start = info.header_offset
        # 30 bytes, the name, and extra fields, whose length here may be other than in the directory
        around = os.pread(self._descriptor, 30 + len(info.orig_filename.encode()) + 64 + info.file_size, start)
        begin = 30 + int.from_bytes(around[26:28], "little") + int.from_bytes(around[28:30], "little")
        data = around[begin : begin + info.file_size]
        is_plain = around[:4] == b"PK\3\4" and not info.flag_bits & 0x1
        return data if is_plain and len(data) == info.file_size and zlib.crc32(data) == info.CRC else None

    def check(self, member: Member) -> None:
        """Read a member to its end, so that zipfile compares its checksum."""
        with self._open(member) as file:
            while file.read(1 << 20):
                pass

    @contextlib.contextmanager
    def _open(self, member: Member) -> Iterator[Any]:
        if not self._zip:
            descriptor = os.open(member.handle, os.O_RDONLY | os.O_NOFOLLOW)
            with os.fdopen(descriptor, "rb") as file:
                yield file
            return
        try:
            with self._zip.open(member.handle) as file:
                yield file
        except RuntimeError as exc:  # also NotImplementedError
            raise ArchiveError(
                f"Every member of a zip must be compressed by Deflate, or stored, and not encrypted. Received: "
                f"{member.name!r} of {self._path} (method {member.handle.compress_type}: {exc}). Unpack it and zip it "
                "again without a password, such as by `zip -r`: Windows Explorer packs large files by Deflate64 (9)."
            ) from exc
        except (zipfile.BadZipFile, EOFError, OSError, zlib.error) as exc:
            raise ArchiveError(
                f"Every member of a zip must match its checksum. {member.name!r} of {self._path} is damaged or "
                f"can't be read ({exc})."
            ) from exc


def _describe_info(info: zipfile.ZipInfo, seen: set[str]) -> Member:
    parts = info.filename.replace("\\", "/").split("/")
    problem = ""
    if not parts[0] or parts[0].endswith(":") or ".." in parts:
        problem = "unsafe_name"
    elif stat.S_ISLNK(info.external_attr >> 16):
        problem = "symlink"
    elif info.file_size > MAX_BYTES:
        problem = "too_large"
    elif info.filename in seen:
        problem = "repeated_name"
    seen.add(info.filename)
    return Member(info.filename, info.file_size, problem, info)


def list_folder(path: Path) -> list[Member]:
    """Return a folder's files in order of names, and what else is there with the reason not to read it."""
    members = []
    for parent, folders, files in os.walk(path, followlinks=False):
        folders.sort()
        linked = [folder for folder in folders if (Path(parent) / folder).is_symlink()]
        for name in sorted([*files, *linked]):
            file = Path(parent) / name
            info = file.lstat()
            problem = ""
            if not stat.S_ISREG(info.st_mode):
                problem = "symlink" if stat.S_ISLNK(info.st_mode) else "not_a_file"
            elif info.st_size > MAX_BYTES:
                problem = "too_large"
            shown = os.fsencode(file.relative_to(path)).decode("utf-8", "backslashreplace")
            members.append(Member(shown, info.st_size, problem, file))
    return members
