"""An archive, a zip or a folder, and its members, which are listed and read. Nothing is ever unpacked by name."""

import contextlib
import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from deepfake_core.config import Source
from deepfake_core.data.members import Member, list_folder, list_zip
from deepfake_core.decoding import MAX_BYTES
from deepfake_core.errors import ArchiveError
from deepfake_core.storage.ranges import RangeFile

MAX_EXPANSION_FACTOR = 100
"""Members may add up to this many times the zip's size; images hardly compress, so more is a bomb."""

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
IS_ENCRYPTED, NAME_IS_UTF8 = 0x1, 0x800
"""Flags of a zip's member."""

READ_AHEAD = 1 << 16
"""Bytes that are asked for at once where zipfile reads by small steps from a URL."""


@dataclass(frozen=True)
class Archive:
    """A source's files on this disk, and where they come from.

    Attributes:
        sha256: the zip's; of a folder, that of its listing (names, sizes, modification times).
        modified: of a local zip, when it was before it was hashed, in nanoseconds.
    """

    source: Source
    path: Path
    sha256: str
    bytes: int
    version: int | None = None
    licence: str | None = None
    downloaded_at: str | None = None
    modified: int | None = None

    def require_unchanged(self) -> None:
        """Raise an ArchiveError if a local zip was replaced since it was hashed."""
        if self.modified is not None and self.path.stat().st_mtime_ns != self.modified:
            raise ArchiveError(
                f"An archive must not change during a run. {self.path} has been written to since it was hashed. Run "
                "again: it is indexed anew."
            )

    def open(self) -> "ArchiveReader":
        return ArchiveReader(self.path, self.source.follow_links)

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
    """List and read the files of a zip or a folder, following no name out of it, and no link unless that is asked for.

    Reading is safe from several threads at once.

    Attributes:
        place: path of the zip or the folder; of a zip at a URL, the file that reads it by range.
        members: the files, of a zip as its directory lists them.
    """

    def __init__(self, place: Path | RangeFile, follow_links: bool = False) -> None:
        self.place = place
        self._zip: zipfile.ZipFile | None = None
        if isinstance(place, Path) and place.is_dir():
            self.members = list_folder(place, follow_links)
            return
        try:
            self._zip = zipfile.ZipFile(io.BufferedReader(place, READ_AHEAD) if isinstance(place, RangeFile) else place)
        except UnicodeDecodeError as exc:
            raise ArchiveError(
                f"Names in a zip that are marked as UTF-8 must be that. Received: {place}, which names {exc.object!r}. "
                "Unpack it and zip it again, such as by `zip -r`."
            ) from exc
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as exc:
            if isinstance(place, RangeFile):
                begins = place.read_range(0, 8)
            else:
                with place.open("rb") as file:
                    begins = file.read(8)
            raise ArchiveError(
                f"An archive must be a whole zip file. Received: {place}, which begins with {begins!r} ({exc})."
            ) from exc
        self.members = list_zip(self._zip.infolist())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._zip:
            self._zip.close()

    def read_again(self, name: str, sha256: str) -> bytes:
        """Read a member that was read before.

        Raises:
            ArchiveError: if it is gone, or has other bytes.
        """
        try:
            data = self.read(self._by_name[name])
        except (KeyError, OSError):
            data = b""
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ArchiveError(
                f"An archive must not change during a run. {name!r} of {self.place} is gone, or has other bytes than "
                "when it was indexed. Run again: it is indexed anew."
            )
        return data

    @cached_property
    def _by_name(self) -> dict[str, Member]:
        return {member.name: member for member in self.members}

    def read(self, member: Member) -> bytes:
        """Return a member's bytes.

        Raises:
            ArchiveError: if it is damaged, or too large.
            OSError: if a file of a folder is gone, or can't be read.
        """
        if member.size > MAX_BYTES:
            raise ArchiveError(f"A member may hold {MAX_BYTES:,} bytes. Received: {member.size:,}")
        if self._zip and (data := self._read_at_once(self._zip, member)) is not None:
            return data
        with self._open(member) as file:
            return file.read(member.size + 1)

    def _read_at_once(self, opened: zipfile.ZipFile, member: Member) -> bytes | None:
        """Read a member in one call; None if all is not as expected, so that zipfile says why.

        Threads that read through one `zipfile.ZipFile` wait for each other, longer than decoding a small image takes.
        At a URL, it would ask for a member in several requests.
        """
        info = member.handle
        if info.compress_type not in METHODS or info.compress_size > MAX_BYTES or info.flag_bits & IS_ENCRYPTED:
            return None
        name = info.orig_filename.encode("utf-8" if info.flag_bits & NAME_IS_UTF8 else "cp437")
        # 30 bytes, the name, and extra fields, whose length here may be other than in the directory
        size, start = 30 + len(name) + 64 + info.compress_size, info.header_offset
        if isinstance(self.place, RangeFile):
            around = self.place.read_range(start, size)
        else:
            around = os.pread(opened.fp.fileno(), size, start)  # type: ignore[union-attr]
        begin = 30 + int.from_bytes(around[26:28], "little") + int.from_bytes(around[28:30], "little")
        data = around[begin : begin + info.compress_size]
        if info.compress_type == zipfile.ZIP_DEFLATED:
            with contextlib.suppress(zlib.error):
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, info.file_size + 1)
        is_named = around[:4] == b"PK\3\4" and around[30 : 30 + len(name)] == name
        is_whole = is_named and len(data) == info.file_size and zlib.crc32(data) == info.CRC
        return data if is_whole else None

    def check(self, member: Member) -> None:
        """Read a member to its end, so that its checksum is compared."""
        if self._zip and member.size <= MAX_BYTES and self._read_at_once(self._zip, member) is not None:
            return
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
                f"{member.name!r} of {self.place} (method {member.handle.compress_type}: {exc}). Unpack it and zip it "
                "again without a password, such as by `zip -r`: Windows Explorer packs large files by Deflate64 (9)."
            ) from exc
        except (zipfile.BadZipFile, EOFError, OSError, UnicodeDecodeError, zlib.error) as exc:
            raise ArchiveError(
                f"Every member of a zip must match its checksum. {member.name!r} of {self.place} is damaged or "
                f"can't be read ({exc})."
            ) from exc
