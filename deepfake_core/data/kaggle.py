"""Sources become verified archives on this disk: downloaded from Kaggle, fetched from where data is shared, or local.

The one module that imports kaggle. Nothing is ever unpacked by name: members are listed and read.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import requests

from deepfake_core.config import Source
from deepfake_core.detector import MAX_BYTES
from deepfake_core.errors import ArchiveError, CredentialsError, DownloadError, SourceError
from deepfake_core.files import Progress, hash_file, watch_progress, write_json
from deepfake_core.store import Store, open_store

log = logging.getLogger(__name__)

MAX_EXPANSION = 100
"""Members may add up to this many times the zip's size; images hardly compress, so more is a bomb."""

CREDENTIALS_HELP = (
    "Create a token at https://www.kaggle.com/settings (API, Create New Token) and set KAGGLE_API_TOKEN, "
    "or KAGGLE_USERNAME and KAGGLE_KEY, or save it as ~/.kaggle/kaggle.json, or as Prefect's Secret block "
    "kaggle-api-token. "
    "`make demo` and local zips or folders need no credentials."
)


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


PROVENANCE = tuple(field.name for field in fields(Archive) if field.name not in ("source", "path"))
"""What the JSON file beside a downloaded zip holds."""


@dataclass(frozen=True)
class Member:
    """One file of an archive. `problem` is a reason not to read it, or empty."""

    name: str
    size: int
    problem: str = ""
    handle: Any = None


def fetch_archive(source: Source, data_dir: str | Path, on_progress: Progress | None = None) -> Archive:
    """Return the source's archive, verified; download it if Kaggle has a version that is not here yet.

    Where `data_dir` is a URL, a version that another machine has shared is fetched from there instead.

    Raises:
        CredentialsError, SourceError, ArchiveError: a person has to act.
        DownloadError: the network failed; what has come is kept, and another call goes on from there.
    """
    if source.is_local:
        return _find_local(source)
    return _download(source, open_store(data_dir), on_progress)


def share_archive(archive: Archive, data_dir: str | Path, on_progress: Progress | None = None) -> None:
    """Publish a downloaded archive where `data_dir` is a URL, unless it is there. Local sources are not shared.

    Its provenance is written last: without it, the zip doesn't count.
    """
    store = open_store(data_dir)
    if archive.source.is_local or not store.url:
        return
    name = f"{_name_folder(archive.source)}/{archive.version}"
    if store.read(f"{name}.json") is None:
        store.publish(f"{name}.zip", on_progress=on_progress)
        store.publish(f"{name}.json")
        log.info("%s: version %d is published at %s", archive.source.name, archive.version, store.url)


def _find_local(source: Source) -> Archive:
    path = Path(source.name).expanduser()
    if path.is_dir():
        members = _list_folder(path)
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


def _download(source: Source, store: Store, on_progress: Progress | None) -> Archive:
    owner, name = source.name.split("/")
    folder = store.folder / _name_folder(source)
    if source.version and (here := _find_version(source, store, source.version, on_progress)):
        return here
    with _translate_kaggle_errors(source):
        api = _log_in()
        with api.build_kaggle_client() as kaggle:
            from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest

            dataset = _describe_dataset(kaggle, source)
            version = source.version or dataset.current_version_number
            if here := _find_version(source, store, version, on_progress):
                return here

            wanted = ApiDownloadDatasetRequest()
            wanted.owner_slug, wanted.dataset_slug, wanted.dataset_version_number = owner, name, version
            response = kaggle.datasets.dataset_api_client.download_dataset(wanted)
            total = int(response.headers.get("Content-Length") or 0)
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f"{version}.zip.partial"
            _check_free_space(folder, total - (partial.stat().st_size if partial.exists() else 0), source)
            log.info("%s: downloading version %d, %.1f MB", source.name, version, total / 1e6)
            with watch_progress(lambda: partial.stat().st_size if partial.exists() else 0, total, on_progress):
                client = kaggle.http_client()
                # One retry at once; the task that calls this decides on further ones and their delays.
                try:
                    api.download_file(response, str(partial), client, quiet=True, resume=True, max_retries=1)
                except ValueError as exc:  # it checks no status when it resumes, and wrote an error's body instead
                    partial.unlink(missing_ok=True)
                    partial.with_name(f"{partial.name}.kaggle-partial").unlink(missing_ok=True)
                    raise DownloadError(
                        f"Kaggle's storage must send the rest of {source.name} when a download is resumed. Received: "
                        f"something else ({exc}). What had come was deleted; run again to download it anew."
                    ) from exc
    try:
        verify_zip(partial)
    except ArchiveError as exc:
        partial.unlink()
        raise ArchiveError(f"{source.name}: {exc} It was deleted; run again to download it anew.") from exc
    archive = Archive(
        source=source,
        path=folder / f"{version}.zip",
        sha256=hash_file(partial),
        bytes=partial.stat().st_size,
        version=version,
        licence=dataset.license_name or None,
        downloaded_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_json(folder / f"{version}.json", {name: getattr(archive, name) for name in PROVENANCE})
    partial.replace(archive.path)
    log.info("%s: version %d is here and verified, %.1f MB", source.name, version, archive.bytes / 1e6)
    return archive


def find_new_version(source: Source, data_dir: str | Path) -> int | None:
    """Return the version that Kaggle has of a source and `data_dir` has not; None if there is none.

    Only the version is asked for. A local source, or one whose version is fixed, has no news.

    Raises:
        CredentialsError, SourceError: a person has to act.
        DownloadError: the network failed.
    """
    if source.is_local or source.version:
        return None
    with _translate_kaggle_errors(source), _log_in().build_kaggle_client() as kaggle:
        version = int(_describe_dataset(kaggle, source).current_version_number)
    store = open_store(data_dir)
    if store.url:
        return None if store.read(f"{_name_folder(source)}/{version}.json") else version
    return None if _read_download(source, store, version) else version


def _describe_dataset(kaggle: Any, source: Source) -> Any:
    from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest

    request = ApiGetDatasetRequest()
    request.owner_slug, request.dataset_slug = source.name.split("/")
    return kaggle.datasets.dataset_api_client.get_dataset(request)


def _name_folder(source: Source) -> str:
    return f"archives/{source.name}"


def _find_version(source: Source, store: Store, version: int, on_progress: Progress | None) -> Archive | None:
    """Return a version that is on this disk, or that is shared; fetch it then."""
    if here := _read_download(source, store, version):
        return here
    name = f"{_name_folder(source)}/{version}"
    content = store.read(f"{name}.json") if store.url else None
    if content is None:
        return None
    try:
        provenance = json.loads(content)
        if set(provenance) != set(PROVENANCE):
            raise ValueError(f"it holds {sorted(provenance)}")
    except (ValueError, TypeError) as exc:
        raise ArchiveError(
            f"{store.url}/{name}.json must hold {', '.join(PROVENANCE)}. Received: {content[:80]!r} ({exc}). "
            "Delete it: the next download publishes it anew."
        ) from exc
    path = store.folder / f"{name}.zip"
    store.fetch(f"{name}.zip", path, provenance["sha256"], f"{name}.json", on_progress)
    try:
        verify_zip(path)
    except ArchiveError:
        path.unlink()
        raise
    write_json(path.with_suffix(".json"), provenance)
    log.info("%s: version %d was fetched from %s", source.name, version, store.url)
    return _read_download(source, store, version)


def _read_download(source: Source, store: Store, version: int) -> Archive | None:
    path, provenance = (store.folder / _name_folder(source) / f"{version}.{end}" for end in ("zip", "json"))
    if not (path.exists() and provenance.exists()):
        return None
    log.info("%s: version %d is on disk already, nothing to download", source.name, version)
    return Archive(source, path, **json.loads(provenance.read_text()))


def _log_in() -> Any:
    from kaggle.api.kaggle_api_extended import KaggleApi
    from kagglesdk import get_access_token_from_env

    api = KaggleApi()
    try:
        api.authenticate()
    except SystemExit as exc:  # the client's way to say that it found no credentials, or an expired token
        token, place = get_access_token_from_env()
        found = f"the token in {place} is refused: wrong, revoked or expired" if token else "none were found"
        raise CredentialsError(f"Kaggle needs credentials, and {found}. {CREDENTIALS_HELP}") from exc
    return api


@contextlib.contextmanager
def _translate_kaggle_errors(source: Source) -> Iterator[None]:
    try:
        yield
    except requests.HTTPError as exc:
        status = exc.response.status_code if exc.response is not None else None
        if status == 401:
            raise CredentialsError(
                f"Kaggle refused the credentials (401) for {source.name}. {CREDENTIALS_HELP}"
            ) from exc
        if status == 403:
            raise SourceError(
                f"Kaggle does not let this account read {source.name} (403). Open "
                f"https://www.kaggle.com/datasets/{source.name} while logged in and accept its terms, "
                "or use another account's token."
            ) from exc
        if status == 404:
            version = f" in version {source.version}" if source.version else ""
            raise SourceError(
                f"Kaggle knows no data set {source.name}{version} (404). Correct `data.sources`."
            ) from exc
        raise DownloadError(
            f"Kaggle answered {status or exc} for {source.name}; what has come is kept. Run again later."
        ) from exc
    except requests.RequestException as exc:
        raise DownloadError(
            f"The connection to Kaggle failed for {source.name} ({type(exc).__name__}: {exc}); what has come "
            "is kept. Check the network or HTTPS_PROXY and run again: the download goes on from there."
        ) from exc


def _check_free_space(folder: Path, needed: int, source: Source) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ArchiveError(
            f"{source.name} needs {needed / 1e9:.2f} GB more on the disk of {folder}, which has "
            f"{free / 1e9:.2f} GB free. Make room, or set `data.data_dir` to another disk."
        )


def verify_zip(path: Path) -> None:
    """Read every member and compare its checksum, in bounded memory.

    Raises:
        ArchiveError: if the file is no zip, a member is damaged, or it expands like a bomb.
    """
    with ArchiveReader(path) as reader:
        expanded = sum(member.size for member in reader.members)
        if expanded > MAX_EXPANSION * path.stat().st_size:
            raise ArchiveError(
                f"A zip may expand to {MAX_EXPANSION} times its size. Received: {path}, "
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
            self.members = _list_folder(path)
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
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError, zlib.error) as exc:
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


def _list_folder(path: Path) -> list[Member]:
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
