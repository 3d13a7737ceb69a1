"""The data folder on this disk, the paths below it, and the URL at which machines share it.

Nothing else in the project writes out a path below the data folder. What is fetched gets its name on this disk once its
SHA-256 is the expected one. `lock_folder` holds for this machine alone. Across machines, runs of different deployments
may meet; what must never be lost is added under new names, never overwritten.
"""

import contextlib
import hashlib
import os
import re
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import platformdirs

from deepfake_core.config import FEEDBACK, URL, check_address
from deepfake_core.errors import ArchiveError, ConfigurationError
from deepfake_core.storage.files import hash_file, require_space, write_beside
from deepfake_core.storage.progress import Progress, count_bytes
from deepfake_core.storage.store_errors import name_endpoint, translate_errors

MAX_CONCURRENT_PARTS = 4
"""Parts of one object that s3fs holds in memory; each has 50 MB, or more in objects of 500 GB and above."""


@dataclass(frozen=True)
class Store:
    """What `data.data_dir` names.

    Attributes:
        folder: the folder itself; of a URL, this machine's cache of it.
        url: empty where nothing is shared.
    """

    folder: Path
    url: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another machine as the URL alone, if there is one: the folder is of this machine, there is none."""
        return Store, (Path(os.devnull) if self.url else self.folder, self.url)

    @property
    def address(self) -> str:
        return self.url or str(self.folder)

    def identify(self) -> str:
        """Return what tells this data folder from others, on whatever machine: its URL, or an id that it holds."""
        file = self.folder / ".id"
        if not self.url and not file.exists():
            with write_beside(file) as beside:
                beside.write_text(uuid.uuid4().hex)
        return self.url or file.read_text()

    # The paths below the folder. Where it is shared, the same names stand below the URL.

    def archives(self, source: str = "") -> Path:
        """Return the folder of a Kaggle source's zips, each with its provenance as JSON; without a name, of all."""
        return self.folder / "archives" / source

    def indexes(self) -> Path:
        """Return the folder of image indexes, a Parquet file per archive, and of near copies: a cache."""
        return self.folder / "indexes"

    def shards(self, index: str) -> Path:
        """Return the folder of the finished parts of an index that is not whole yet: a cache."""
        return self.indexes() / f".{index}.partial"

    def local_archive(self, path: Path) -> Path:
        """Return the JSON file that remembers the SHA-256 of a zip on this disk: a cache."""
        return self.indexes() / f"zip-{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]}.json"

    def splits(self, version: str = "") -> Path:
        """Return the folder of a data set; without a version, of all."""
        return self.folder / "splits" / version

    def split_memory(self) -> Path:
        """Return the Parquet file that remembers the split of every image; never removed."""
        return self.folder / "splits" / "memory.parquet"

    def shared_memory(self) -> Path:
        """Return the folder of the Parquet files by which machines share what they remember."""
        return self.folder / "memory"

    def batches(self, version: str = "", image_size: int = 0) -> Path:
        """Return the folder of a data set's decoded images at one size in pixels; without a version, of all: a cache.

        Its name begins with the data set's version, so that housekeeping removes both together.
        """
        return self.folder / "batches" / (f"{version}-{image_size}px" if version else "")

    def training(self, version: str = "", name: str = "") -> Path:
        """Return the folder of an unfinished training's state, named as `batches` are; without a version, of all."""
        return self.folder / "training" / (f"{version}-{name}" if version else "")

    def feedback(self) -> Path:
        """Return the folder of reports on wrong verdicts; `deepfake_core.feedback` knows what is below it."""
        return self.folder / "feedback"

    def confirmed(self) -> Path:
        """Return the folder of the confirmed reports' images, in real/ and fake/: a source, and made of the reports."""
        return self.folder / "confirmed" / FEEDBACK

    def sample(self) -> Path:
        """Return the folder of the archives that `--sample` draws."""
        return self.folder / "sample"

    def name(self, path: Path) -> str:
        """Return the name below the URL of a path below the folder."""
        return path.relative_to(self.folder).as_posix()

    def address_of(self, path: Path) -> str:
        """Return where others find a path below the folder: its URL, or the path itself where nothing is shared."""
        return f"{self.url}/{self.name(path)}" if self.url else str(path)

    # What is at the URL

    @cached_property
    def _place(self) -> tuple[Any, str]:
        return open_filesystem(self.url)

    def check(self) -> None:
        """Refuse a store that can't be used, before any work is done.

        Raises:
            ConfigurationError, CredentialsError: a person has to act.
            DownloadError: it can't be reached.
        """
        if self.url:
            self.list_names(self.folder)

    def list_names(self, folder: Path) -> list[str]:
        """Return the names directly below a shared folder, in order; none if it is not there."""
        files, root = self._place
        with contextlib.suppress(FileNotFoundError), translate_errors(self.url):
            found = files.ls(f"{root}/{self.name(folder)}".removesuffix("/."), detail=False)
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)
        return []

    def read(self, path: Path) -> bytes | None:
        """Return a small object by its path on this disk; None if there is none at the URL."""
        files, root = self._place
        with contextlib.suppress(FileNotFoundError), translate_errors(self.url):
            return files.cat_file(f"{root}/{self.name(path)}")
        return None

    def write(self, path: Path, data: bytes) -> None:
        """Write a small object to the URL by its path on this disk; it appears whole."""
        files, root = self._place
        with translate_errors(self.url):
            files.pipe_file(f"{root}/{self.name(path)}", data)

    def remove(self, path: Path) -> None:
        """Remove an object."""
        files, root = self._place
        with translate_errors(self.url):
            files.rm_file(f"{root}/{self.name(path)}")

    def fetch(
        self, path: Path, sha256: str, marker: Path, on_progress: Progress | None = None, target: Path | None = None
    ) -> None:
        """Write an object to its path on this disk, whole and with the SHA-256 that is expected, or not at all.

        Args:
            marker: the object without which this one does not count as published.
            target: another path on this disk to write to.

        Raises:
            ArchiveError: if it is absent or differs.
            DiskError: if it does not fit on the disk.
        """
        files, root = self._place
        rule = f"{self.url}/{self.name(path)} must be there with the SHA-256 {sha256}"
        remedy = (
            f"Delete {self.url}/{self.name(marker)} and run `prepare` again: what is missing there is published again."
        )
        with write_beside(target or path) as beside:
            try:
                with translate_errors(self.url):
                    size = files.info(f"{root}/{self.name(path)}")["size"]
                    what = f"What is fetched from {self.url}"
                    require_space(beside.parent, size, what, "set XDG_CACHE_HOME to another disk")
                    with count_bytes(size, on_progress) as callback:
                        files.get_file(f"{root}/{self.name(path)}", str(beside), callback=callback)
            except FileNotFoundError as exc:
                raise ArchiveError(f"{rule}. Received: nothing. {remedy}") from exc
            received = hash_file(beside)
            if received != sha256:
                raise ArchiveError(f"{rule}. Received: {received}. {remedy}")

    def publish(self, path: Path, file: Path | None = None, on_progress: Progress | None = None) -> None:
        """Write a file to the URL under its name below the folder, or another `file` under that name; it appears whole.

        Raises:
            ConfigurationError, CredentialsError, DownloadError: if the store refuses it or can't be reached.
        """
        files, root = self._place
        file = file or path
        with translate_errors(self.url), count_bytes(file.stat().st_size, on_progress) as callback:
            files.put_file(str(file), f"{root}/{self.name(path)}", callback=callback)


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's filesystem of a URL, and the URL's path in it. Nothing is asked of the network yet.

    Raises:
        ConfigurationError: if fsspec does not know the URL's kind, or the package for it is not installed.
    """
    options = {"max_concurrency": MAX_CONCURRENT_PARTS} if url.partition("://")[0] in ("s3", "s3a") else {}
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as exc:
        raise ConfigurationError(
            f"{url} needs a package that is not installed ({exc}). For s3://, install the extra `remote`: "
            "pip install 'deepfake-retraining[remote]'."
        ) from exc
    except ValueError as exc:
        raise ConfigurationError(
            f"An address must be a folder, or a URL of a kind that fsspec knows. Received: {url} ({exc})."
        ) from exc


def open_store(data_dir: str | Path) -> Store:
    """Return the store that `data.data_dir` names. A URL's cache is below the user's cache folder (XDG_CACHE_HOME).

    Nothing is asked of the network yet.

    Raises:
        ConfigurationError: for a malformed URL, or one that holds a user name or password.
    """
    address = str(data_dir)
    if not re.match(URL, address):
        return Store(Path(address).expanduser().resolve())
    try:
        url = check_address(address).rstrip("/")
    except ValueError as exc:
        raise ConfigurationError(str(exc)) from None
    readable = re.sub(r"[^\w.-]+", "-", url)[:80]
    digest = hashlib.sha256(f"{url} {name_endpoint()}".encode()).hexdigest()[:8]
    return Store(platformdirs.user_cache_path("deepfake", appauthor=False) / f"{readable}-{digest}", url)


def locate_dataset(address: str | Path) -> tuple[Store, Path]:
    """Return the store that a data set's folder or URL belongs to, and the data set's folder on this disk.

    Args:
        address: as `Store.address_of(store.splits(version))` gave it, perhaps on another machine.
    """
    root, _, version = str(address).rpartition("/splits/")
    store = open_store(root or address)
    if store.url:
        return store, store.splits(version)
    folder = Path(address).expanduser().resolve()
    return Store(folder.parent.parent), folder
