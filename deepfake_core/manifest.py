"""Kept images are split and published: whole or not at all, under a name made from their content."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import pandas as pd

from deepfake_core.archive import Archive, ArchiveReader, Progress
from deepfake_core.config import CLASS_NAMES, SPLITS
from deepfake_core.errors import ArchiveError, DatasetError, LockedError
from deepfake_core.files import write_beside, write_json

log = logging.getLogger(__name__)

COLUMNS = [
    "source", "member", "sha256", "label", "width", "height", "split", "kept", "reason", "group", "path",
]  # fmt: skip
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}


@dataclass(frozen=True)
class Dataset:
    """A published split folder: images, `manifest.parquet` and `dataset.json`."""

    path: Path

    @cached_property
    def description(self) -> dict[str, Any]:
        return json.loads((self.path / "dataset.json").read_text())

    @property
    def version(self) -> str:
        return self.description["version"]

    @property
    def is_drawn(self) -> bool:
        """Whether any image is drawn, so that figures say nothing about real faces."""
        return any(source["drawn"] for source in self.description["sources"])

    @property
    def source_names(self) -> list[str]:
        """The sources, each with its Kaggle version, or the SHA-256 of a local one."""
        return [
            f"{source['name']}@{source['kaggle_version'] or source['archive_sha256']}"
            for source in self.description["sources"]
        ]

    @cached_property
    def manifest(self) -> pd.DataFrame:
        return pd.read_parquet(self.path / "manifest.parquet")

    def split(self, name: str) -> pd.DataFrame:
        """Return the rows of one split's images, ordered by SHA-256."""
        manifest = self.manifest
        return manifest[manifest["kept"] & (manifest["split"] == name)].sort_values("sha256", ignore_index=True)


def open_dataset(path: str | Path) -> Dataset:
    """Open a published split folder.

    Raises:
        DatasetError: if it is none.
    """
    path = Path(path)
    if not (path / "dataset.json").is_file() or not (path / "manifest.parquet").is_file():
        raise DatasetError(
            "A data set must be a folder that the prepare flow published, with dataset.json and "
            f"manifest.parquet. Received: {path}. Run `prepare`, or check that this machine shares the data folder."
        )
    return Dataset(path)


def assign_splits(rows: pd.DataFrame, val_fraction: float, test_fraction: float) -> pd.DataFrame:
    """Put each kept image into train, val or test.

    The split is a function of the picture alone: its pixels' SHA-256, read as a number between 0 and 1,
    falls below `test_fraction` (test), below `test_fraction + val_fraction` (val), or above (train). So it
    never changes as data is added, and every source and label is divided by the same fractions,
    up to chance.

    Args:
        rows: with `group`, `kept`, `label`.

    Returns:
        The same rows with `split` and `path` (both empty where not kept).

    Raises:
        DatasetError: if a class has no image in some split.
    """
    position = rows["group"].map(lambda name: int(name[:16] or "0", 16) / 2**64)
    split = pd.Series("train", index=rows.index)
    split[position < test_fraction + val_fraction] = "val"
    split[position < test_fraction] = "test"
    split = split.where(rows["kept"], "")
    suffix = rows["format"].map(SUFFIXES)
    path = (split + "/" + rows["label"] + "/" + rows["sha256"] + suffix).where(rows["kept"], "")
    rows = rows.assign(split=split, path=path)
    for name in SPLITS:
        for label in CLASS_NAMES:
            if not ((split == name) & (rows["label"] == label)).any():
                kept = rows.loc[rows["kept"], "label"].value_counts().to_dict()
                raise DatasetError(
                    f"Each split must hold images of both classes. Received: no {label} image in {name}; kept "
                    f"images in all: {kept}, left out: {_count_reasons(rows)}. Add a source with {label} images, "
                    "or raise `data.test_fraction` or `data.val_fraction`."
                )
    return rows


def publish_dataset(
    rows: pd.DataFrame,
    archives: Sequence[Archive],
    data_dir: Path,
    parameters: dict[str, Any],
    on_progress: Progress | None = None,
) -> Dataset:
    """Write the split folders; a version that is there already is not copied again.

    The version is a hash of every kept image's bytes, label and split: same images, same version,
    in whatever order they came. The folder is written beside and renamed into place.
    """
    manifest = rows[COLUMNS].sort_values(["source", "member", "sha256"], ignore_index=True)
    version = _hash_content(manifest)
    description: dict[str, Any] = {
        "version": version,
        "parameters": parameters,
        "sources": [archive.describe() for archive in archives],
        "counts": _count(manifest, [archive.source.short_name for archive in archives]),
    }
    target = data_dir / "splits" / version
    if target.is_dir():
        log.info("data set %s is published already, nothing to copy", version)
        if description != Dataset(target).description:  # same images, found in other archives or places
            _write_manifest(target, manifest, description)
        return Dataset(target)
    beside = target.with_name(f".{version}.partial")
    shutil.rmtree(beside, ignore_errors=True)  # left by a run that was killed: the lock is ours
    try:
        _copy_images(manifest, archives, beside, on_progress)
        _write_manifest(beside, manifest, description)
        beside.replace(target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    log.info("data set %s published: %s", version, description["counts"]["splits"])
    return Dataset(target)


def _hash_content(manifest: pd.DataFrame) -> str:
    kept = manifest.loc[manifest["kept"], ["sha256", "label", "split"]]
    lines = sorted(" ".join(row) for row in kept.itertuples(index=False))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _count(manifest: pd.DataFrame, sources: Sequence[str]) -> dict[str, Any]:
    kept = manifest[manifest["kept"]]
    splits = kept.value_counts(["split", "label"])
    return {
        "files": len(manifest),
        "kept": len(kept),
        "reasons": _count_reasons(manifest),
        "sources": {
            source: {"files": int((manifest["source"] == source).sum())}
            | _count_reasons(manifest[manifest["source"] == source])
            for source in sources
        },
        "splits": {split: {label: int(splits.get((split, label), 0)) for label in CLASS_NAMES} for split in SPLITS},
    }


def _count_reasons(rows: pd.DataFrame) -> dict[str, int]:
    return {str(reason): int(count) for reason, count in rows["reason"].value_counts().sort_index().items()}


def _copy_images(
    manifest: pd.DataFrame, archives: Sequence[Archive], folder: Path, on_progress: Progress | None
) -> None:
    for split in SPLITS:
        for label in CLASS_NAMES:
            (folder / split / label).mkdir(parents=True)
    total, done = int(manifest["kept"].sum()), 0
    for archive in archives:
        mine = manifest[manifest["kept"] & (manifest["source"] == archive.source.short_name)]
        with ArchiveReader(archive.path) as reader, ThreadPoolExecutor(os.cpu_count()) as pool:
            members = {member.name: member for member in reader.members}

            def copy(row: Any, reader: ArchiveReader = reader, members: dict = members) -> None:
                data = reader.read(members[row.member])
                if hashlib.sha256(data).hexdigest() != row.sha256:
                    raise ArchiveError(
                        f"An archive must not change during a run. {row.member!r} of {row.source} has other "
                        "bytes than when it was indexed. Nothing was published; run again."
                    )
                (folder / row.path).write_bytes(data)

            for _ in pool.map(copy, mine.itertuples(index=False)):
                done += 1
                if on_progress and (done % 500 == 0 or done == total):
                    on_progress(done, total)


def _write_manifest(folder: Path, manifest: pd.DataFrame, description: dict[str, Any]) -> None:
    with write_beside(folder / "manifest.parquet") as beside:
        manifest.to_parquet(beside, index=False)
    write_json(folder / "dataset.json", description)


@contextmanager
def lock_data(data_dir: Path, holder: str) -> Iterator[None]:
    """Hold the data folder for one run; nested use in one process is one lock.

    The operating system lets go of the lock when the process ends, however it ends.

    Raises:
        LockedError: at once, if another process holds it; says which.
    """
    data_dir = data_dir.expanduser().resolve()
    data_dir.mkdir(parents=True, exist_ok=True)
    note = data_dir / ".lock.json"
    lock = filelock.FileLock(data_dir / ".lock", timeout=0, is_singleton=True, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout as exc:
        held_by = json.loads(note.read_text()) if note.exists() else {"holder": "unknown"}
        raise LockedError(
            f"One run at a time may use a data folder. {data_dir} is held by {held_by}. "
            "Wait until it ends, or set `data.data_dir` to another folder."
        ) from exc
    try:
        if lock.lock_counter == 1:
            started = pd.Timestamp.now("UTC").isoformat(timespec="seconds")
            write_json(note, {"holder": holder, "pid": os.getpid(), "host": os.uname().nodename, "since": started})
        yield
    finally:
        if lock.lock_counter == 1:
            note.unlink(missing_ok=True)
        lock.release()
