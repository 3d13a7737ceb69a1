"""Where data is shared: a place at an fsspec URL, and the folder on this disk in which the work on it goes on.

What is fetched gets its name on this disk once its SHA-256 is the expected one. Of a folder, `SHA256SUMS` is published
last: without it, nothing counts as published. `lock_folder` holds for this machine alone. Across machines, Prefect's
limit of one retrain at a time keeps runs apart; what must never be lost is added under new names, never overwritten.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from errno import EINVAL
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import fsspec
from fsspec.callbacks import Callback

from deepfake_core.detector import MAX_BYTES
from deepfake_core.errors import ArchiveError, ConfigurationError, CredentialsError, DownloadError
from deepfake_core.files import Progress, hash_file, watch_progress, write_beside

log = logging.getLogger(__name__)

SUMS, PACKED = "SHA256SUMS", "images.zip"
PARTS_AT_ONCE = 4
"""Parts of one object that s3fs holds in memory; each has 50 MB, or more in objects of 500 GB and above."""

CREDENTIALS_HELP = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; they need to list, read, write and delete there."
)


@dataclass(frozen=True)
class Store:
    """What `data.data_dir` names.

    Attributes:
        folder: the folder itself; of a URL, this machine's cache of it.
        url: empty where nothing is shared.
    """

    folder: Path
    url: str = ""

    @property
    def address(self) -> str:
        return self.url or str(self.folder)

    @cached_property
    def _place(self) -> tuple[Any, str]:
        scheme = self.url.partition("://")[0]
        options = {"max_concurrency": PARTS_AT_ONCE} if scheme in ("s3", "s3a") else {}
        try:
            return fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)
        except ImportError as exc:
            raise ConfigurationError(
                f"{self.url} needs a package that is not installed ({exc}). For s3://, install the extra `remote`: "
                "pip install 'deepfake-retraining[remote]'."
            ) from exc
        except ValueError as exc:
            raise ConfigurationError(
                f"`data.data_dir` must be a folder, or a URL of a kind that fsspec knows. Received: {self.url} ({exc})."
            ) from exc

    def check(self) -> None:
        """Refuse a store that can't be used, before any work is done.

        Raises:
            ConfigurationError, CredentialsError: a person has to act.
            DownloadError: it can't be reached.
        """
        if self.url:
            self.list_names("")

    def list_names(self, name: str) -> list[str]:
        """Return the last parts of the names that begin with `name/`, in order; none if there are none."""
        files, root = self._place
        with contextlib.suppress(FileNotFoundError), self._translate_errors():
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in files.ls(f"{root}/{name}", detail=False))
        return []

    def read(self, name: str) -> bytes | None:
        """Return a small object; None if there is none."""
        files, root = self._place
        with contextlib.suppress(FileNotFoundError), self._translate_errors():
            return files.cat_file(f"{root}/{name}")
        return None

    def fetch(self, name: str, target: Path, sha256: str, marker: str, on_progress: Progress | None = None) -> None:
        """Write an object to a path, whole and with the SHA-256 that is expected, or not at all.

        Args:
            marker: the object without which this one does not count as published.

        Raises:
            ArchiveError: if it is absent, differs, or does not fit on the disk.
        """
        files, root = self._place
        rule = f"{self.url}/{name} must be there with the SHA-256 {sha256}"
        way_out = f"Delete {self.url}/{marker} and run `prepare` again: what is missing there is published anew."
        with write_beside(target) as beside:
            try:
                with self._translate_errors():
                    size = files.info(f"{root}/{name}")["size"]
                    _check_free_space(target.parent, size, self.url)
                    count = Callback()
                    with watch_progress(lambda: count.value, size, on_progress):
                        files.get_file(f"{root}/{name}", str(beside), callback=count)
            except FileNotFoundError as exc:
                raise ArchiveError(f"{rule}. Received: nothing. {way_out}") from exc
            received = hash_file(beside)
            if received != sha256:
                raise ArchiveError(f"{rule}. Received: {received}. {way_out}")

    def publish(self, name: str, file: Path | None = None, on_progress: Progress | None = None) -> None:
        """Write a file of the folder, or another one, to the store under its name. It appears there whole."""
        files, root = self._place
        file = file or self.folder / name
        count = Callback()
        with self._translate_errors(), watch_progress(lambda: count.value, file.stat().st_size, on_progress):
            files.put_file(str(file), f"{root}/{name}", callback=count)

    def publish_folder(self, name: str, members: Mapping[str, str], on_progress: Progress | None = None) -> None:
        """Publish a folder: its members in one zip, the files beside them each on its own, `SHA256SUMS` last.

        What is there already is not written again.

        Args:
            members: the folder's files below it, each with its SHA-256, or "" if it is not known.

        Raises:
            ArchiveError: if a member has other bytes.
        """
        folder = self.folder / name
        beside = sorted(file.name for file in folder.iterdir() if file.is_file() and _is_plain(file.name))
        sums = {file: hash_file(folder / file) for file in beside}
        published = _parse_sums(self.read(f"{name}/{SUMS}") or b"")
        if published == sums | {PACKED: published.get(PACKED, "")}:
            log.info("%s/%s is published already", self.url, name)
            _write_sums(folder, published)
            return
        if published:  # whoever fetches it meanwhile shall not take old and new together for whole
            files, root = self._place
            with self._translate_errors():
                files.rm_file(f"{root}/{name}/{SUMS}")
        for file in beside:
            self.publish(f"{name}/{file}")
        if PACKED not in published:
            packed = folder.with_name(f".{folder.name}.{PACKED}")
            try:
                _pack(folder, members, packed)
                published[PACKED] = hash_file(packed)
                self.publish(f"{name}/{PACKED}", packed, on_progress)
            finally:
                packed.unlink(missing_ok=True)
        _write_sums(folder, sums | {PACKED: published[PACKED]})
        self.publish(f"{name}/{SUMS}")
        log.info("%s/%s is published: %d images", self.url, name, len(members))

    def fetch_folder(
        self, name: str, list_members: Callable[[Path], Mapping[str, str]], on_progress: Progress | None = None
    ) -> bool:
        """Bring a published folder to this disk, whole or not at all; return whether it was published.

        What is here already is not fetched again.

        Args:
            list_members: called with a folder that holds the files beside the members, verified; returns the members
                that belong there, each with its SHA-256, or "" if it is not known. No name that the store tells is
                written to unless it is among these.

        Raises:
            ArchiveError: if an object or a member is damaged, or a member has a name that does not belong there.
        """
        folder, content = self.folder / name, self.read(f"{name}/{SUMS}")
        if content is None:
            return False
        here = folder / SUMS
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):  # of two trainings, one fetches
            if here.exists() and here.read_bytes() == content:
                return True
            sums = _parse_sums(content)
            if PACKED not in sums:
                raise ArchiveError(
                    f"{self.url}/{name}/{SUMS} must list {PACKED}. Received: {sorted(sums)}. Publish it anew."
                )
            beside = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(beside, ignore_errors=True)  # left by a run that was killed: the lock is ours
            try:
                for file in sorted(set(sums) - {PACKED}):
                    self.fetch(f"{name}/{file}", beside / file, sums[file], f"{name}/{SUMS}")
                members = list_members(beside)
                if folder.is_dir():  # the same members, and something new about them
                    here.unlink(missing_ok=True)
                    for file in sorted(set(sums) - {PACKED}):
                        (beside / file).replace(folder / file)
                    _write_sums(folder, sums)
                    return True
                self.fetch(f"{name}/{PACKED}", beside / PACKED, sums[PACKED], f"{name}/{SUMS}", on_progress)
                _unpack(beside / PACKED, members, beside)
                (beside / PACKED).unlink()
                _write_sums(beside, sums)
                beside.replace(folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        log.info("%s/%s is here and verified: %d images", self.url, name, len(members))
        return True

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Say what a person can do; an absent object stays a FileNotFoundError."""
        try:
            yield
        except FileNotFoundError as exc:
            if "NoSuchBucket" not in str(exc.__cause__):
                raise
            raise ConfigurationError(
                f"The bucket of `data.data_dir` must exist. Received: {self.url}{_name_endpoint()} ({exc}). Create the "
                "bucket, or correct `data.data_dir` or AWS_ENDPOINT_URL."
            ) from exc
        except PermissionError as exc:
            raise CredentialsError(
                f"The store must let this account in. {self.url}{_name_endpoint()} refused it ({exc}). "
                f"{CREDENTIALS_HELP}"
            ) from exc
        except _list_failures() as exc:
            kind = type(exc).__name__
            if "Credential" in kind or "Profile" in kind:
                raise CredentialsError(
                    f"The store needs credentials. Received for {self.url}: {exc}. {CREDENTIALS_HELP}"
                ) from exc
            if (isinstance(exc, OSError) and exc.errno == EINVAL) or "Validation" in kind:
                raise ConfigurationError(
                    f"The store must understand what it is asked. {self.url}{_name_endpoint()} answered: {exc}. "
                    "Correct `data.data_dir`, AWS_ENDPOINT_URL or AWS_DEFAULT_REGION."
                ) from exc
            raise DownloadError(
                f"The store must answer. {self.url}{_name_endpoint()} failed ({kind}: {exc}). Check the network and "
                "AWS_ENDPOINT_URL, and run again: what was published stays."
            ) from exc


def open_store(data_dir: str | Path) -> Store:
    """Return where data lies. A URL's cache is a folder in ~/.cache/deepfake (XDG_CACHE_HOME). Nothing is asked yet.

    Raises:
        ConfigurationError: for a URL that is none, or that holds a user name or password.
    """
    address = str(data_dir)
    if not re.match(r"[\w+.:-]+:/", address):
        return Store(Path(address).expanduser().resolve())
    rule = "`data.data_dir` must be a folder, or a URL such as s3://bucket/deepfake"
    if "@" in address or "?" in address:
        shown = re.sub(r"/[^/].*@", "/...@", address).partition("?")[0]
        raise ConfigurationError(
            f"{rule}, without user name, password or options: they would be logged. Received: {shown}. "
            f"{CREDENTIALS_HELP}"
        )
    url = address.rstrip("/")
    found = re.fullmatch(r"[a-z][a-z0-9+.-]*://(/?[^/].*)", url)
    if not found:
        raise ConfigurationError(f"{rule}. Received: {address}")
    readable = re.sub(r"[^\w.-]+", "-", url)[:80]
    digest = hashlib.sha256(f"{url} {_name_endpoint()}".encode()).hexdigest()[:8]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Store(caches / "deepfake" / f"{readable}-{digest}", url)


def _name_endpoint() -> str:
    """The same bucket name at another endpoint is another bucket."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return f" at {endpoint}" if endpoint else ""


def _list_failures() -> tuple[type[Exception], ...]:
    """Return what filesystems raise when a store fails; s3fs lets some of its libraries' errors through."""
    try:
        from aiohttp import ClientError
        from botocore.exceptions import BotoCoreError
    except ImportError:
        return (OSError,)
    return OSError, BotoCoreError, ClientError


def _check_free_space(folder: Path, needed: int, url: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ArchiveError(
            f"What is fetched from {url} needs {needed / 1e9:.2f} GB on the disk of {folder}, which has "
            f"{free / 1e9:.2f} GB free. Make room, or set XDG_CACHE_HOME to another disk."
        )


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*", name) is not None and name not in (SUMS, PACKED)


def _parse_sums(content: bytes) -> dict[str, str]:
    """Read what `sha256sum` writes; lines of another form, or with a name that leads elsewhere, don't count."""
    lines = re.findall(r"^([0-9a-f]{64})  (\w[\w.-]*)$", content.decode(errors="replace"), re.MULTILINE | re.ASCII)
    return {name: sha256 for sha256, name in lines if name == PACKED or _is_plain(name)}


def _write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    with write_beside(folder / SUMS) as beside:
        beside.write_text("".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items())))


def _pack(folder: Path, members: Mapping[str, str], file: Path) -> None:
    with zipfile.ZipFile(file, "w") as packed:
        for name in sorted(members):
            data = (folder / name).read_bytes()
            _check_member(name, data, members[name], folder)
            packed.writestr(zipfile.ZipInfo(name), data)  # a fixed date, no compression: same images, same bytes


def _unpack(file: Path, members: Mapping[str, str], folder: Path) -> None:
    """Write the members of a zip; their names must be exactly those of `members`."""
    with _open_zip(file) as packed:
        infos = packed.infolist()
        names = [info.filename for info in infos]
        if sorted(names) != sorted(members):
            odd = sorted(set(names) ^ set(members)) or "repeated names"
            raise ArchiveError(
                f"The images of a published data set must be those of its manifest, each once. Received: {odd[:3]} in "
                f"one alone, {len(names)} images instead of {len(members)}. Nothing was written; publish it anew."
            )
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > MAX_BYTES:
                raise ArchiveError(
                    f"An image must be stored as it is, in at most {MAX_BYTES:,} bytes. Received: {info.filename!r} of "
                    f"{info.file_size:,} bytes. Nothing was written; publish the data set anew."
                )
            data = packed.read(info)
            _check_member(info.filename, data, members[info.filename], file)
            target = folder / info.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)


@contextlib.contextmanager
def _open_zip(file: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(file) as packed:
            yield packed
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as exc:
        raise ArchiveError(f"{PACKED} must be a whole zip. Received: one that can't be read ({exc}).") from exc


def _check_member(name: str, data: bytes, sha256: str, place: Path) -> None:
    received = hashlib.sha256(data).hexdigest()
    if sha256 and received != sha256:
        raise ArchiveError(
            f"An image must have the bytes that the manifest names. Received: {name} in {place} with the SHA-256 "
            f"{received}. Remove the data set and run `prepare` again."
        )
