"""Removes what years of retrains leave behind, except what production, a rollback or a run in progress needs.

`memory.parquet` is never removed: images stay in their split permanently. Of a version whose model files are removed,
MLflow keeps run, parameters, metrics, figures, reports and tags.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from deepfake_core.config import (
    DEFAULT_KEEP,
    DEFAULT_KEEP_OBSERVATIONS_DAYS,
    DEFAULT_KEEP_REJECTED_DAYS,
    DEFAULT_MODEL,
)
from deepfake_core.data.dataset import VERSION, Dataset, list_datasets
from deepfake_core.data.shards import list_abandoned, remove_shards
from deepfake_core.errors import ConfigurationError
from deepfake_core.feedback.reports import Feedback, open_feedback
from deepfake_core.monitoring.observations import list_day, list_old_days, remove_day
from deepfake_core.registry.connection import connect
from deepfake_core.registry.model_files import ModelFiles, find_needed_datasets, find_unneeded_files, remove_model_files
from deepfake_core.registry.versions import has_versions
from deepfake_core.storage.files import is_abandoned, remove_folder
from deepfake_core.storage.locks import lock_folder
from deepfake_core.storage.store import Store, open_store

log = logging.getLogger(__name__)

ARCHIVE_NAME = re.compile(r"(?P<version>\d+)\.(zip|json).*")
INDEX_NAME = re.compile(r"(?P<source>.+)-v\d+-[0-9a-f]{16}\.parquet")
MAX_DAYS = 36_500


@dataclass(frozen=True)
class Removal:
    """What is removed together, why, and how many bytes that frees (0 of what is at a URL)."""

    what: str
    why: str
    bytes: int
    paths: tuple[Path, ...] = ()
    model_files: ModelFiles | None = None
    rejected: str = ""
    day: tuple[Store, str] | None = None
    shards: tuple[Store, str] | None = None


def sum_up(removals: Sequence[Removal]) -> str:
    return f"{len(removals)} items, {sum(one.bytes for one in removals) / 1e6:,.1f} MB"


def clean(
    store: Store,
    model_name: str = DEFAULT_MODEL,
    keep: int = DEFAULT_KEEP,
    dry_run: bool = False,
    agreed: Sequence[Removal] | None = None,
    feedback: str = "",
    keep_rejected_days: int = DEFAULT_KEEP_REJECTED_DAYS,
    observations: str = "",
    keep_observations_days: int = DEFAULT_KEEP_OBSERVATIONS_DAYS,
) -> list[Removal]:
    """Remove what is not needed any more; return what was removed.

    Killed half way, it leaves nothing that looks whole, and the next call removes the rest.

    Args:
        store: of one at a URL, this machine's cache is cleaned; at the URL only rejected reports are removed, and
            shards to which no node has added for a day.
        keep: number of newest data sets, archives and indexes per source, and versions' model files, that stay.
        dry_run: remove nothing; return what would be removed.
        agreed: from an earlier call; nothing else is removed.
        feedback: folder or URL that keeps reports; by default that in the data folder, or at its URL.
        keep_rejected_days: how long the image and the notes of a rejected report stay.
        observations: folder or URL of observations, of which the last `keep_observations_days` stay. Empty: all stay.

    Raises:
        ConfigurationError: if a number is out of range, or `feedback` holds other things.
        LockedError: if a run holds the data folder.
        ServiceError: if MLflow or its artifacts can't be reached.
    """
    with lock_folder(store.folder, "housekeeping", remedy="stop that process"):
        reports = open_feedback(feedback or store.address_of(store.feedback()))
        removals = [
            *plan_removals(store, model_name, keep),
            *_plan_rejected(reports, keep_rejected_days),
            *_plan_observations(observations, keep_observations_days),
        ]
        if agreed is not None:
            removals = [removal for removal in removals if removal in agreed]
        if not dry_run:
            removals = [removal for removal in removals if _remove(removal, model_name, reports)]
            log.info("%d items removed, %.1f MB", len(removals), sum(removal.bytes for removal in removals) / 1e6)
    return removals


def plan_removals(store: Store, model_name: str, keep: int) -> list[Removal]:
    """Return what is not needed any more; the caller holds the data folder.

    Data sets stay if they are among the newest, if a version with an alias was trained on them, or if a run in MLflow
    uses them. What was made from a data set is removed with it; archives of data sets that stay are kept.
    Where MLflow knows no version, what production needs is unknown, and none of these is removed.
    """
    if keep < 1:
        raise ConfigurationError(f"At least 1 of each must be kept: the newest is in use. Received: {keep}")
    connect()
    if not has_versions(model_name):
        log.warning("%s has no version, so what production needs is unknown: data sets and archives stay", model_name)
        return []
    datasets = list_datasets(store)
    newest = {dataset.version for dataset in datasets[-keep:]}
    stays = newest | find_needed_datasets(model_name)
    removals = [
        *_plan_datasets([dataset for dataset in datasets if dataset.version not in stays], keep),
        *_plan_derived(store, stays),
        *_plan_archives(store, [dataset for dataset in datasets if dataset.version in stays], keep),
        *_plan_indexes(store, keep),
    ]
    removed = {path for removal in removals for path in removal.paths}
    return [
        *_plan_leftovers(store, removed),
        *removals,
        *_plan_model_files(model_name, keep),
    ]


def _plan_datasets(datasets: Sequence[Dataset], keep: int) -> Iterator[Removal]:
    why = f"not among the newest {keep}, and neither production, a rollback nor a run needs it"
    seen = Counter[int]()
    for dataset in datasets:
        yield _remove_paths(f"data set {dataset.version}", why, dataset.path, seen=seen)


def _plan_derived(store: Store, stays: Collection[str]) -> Iterator[Removal]:
    for folder, what in ((store.batches(), "batches"), (store.training(), "state of a training")):
        for path in sorted(folder.glob("*")):
            version = path.name.partition("-")[0]
            if VERSION.fullmatch(version) and version not in stays:
                yield _remove_paths(f"{what} {path.name}", "its data set is not kept", path)


def _plan_archives(store: Store, datasets: Sequence[Dataset], keep: int) -> Iterator[Removal]:
    """Plan by source; of versions newer than the last whole one, there may be downloads that can continue."""
    used = {(one["name"], one["kaggle_version"]) for dataset in datasets for one in dataset.description["sources"]}
    for folder in sorted(store.archives().glob("*/*")):
        source = f"{folder.parent.name}/{folder.name}"
        files: dict[int, list[Path]] = {}
        for path in folder.glob("*.*"):
            if match := ARCHIVE_NAME.fullmatch(path.name):
                files.setdefault(int(match["version"]), []).append(path)
        whole = sorted(version for version in files if (folder / f"{version}.zip").exists())
        for version in sorted(files):
            if whole and version < whole[-1] and version not in whole[-keep:] and (source, version) not in used:
                why = f"not among the newest {keep}, and no data set that is kept came from it"
                paths = [*files[version], *filter(Path.exists, map(store.local_archive, files[version]))]
                yield _remove_paths(f"archive {source} version {version}", why, *paths)


def _plan_indexes(store: Store, keep: int) -> Iterator[Removal]:
    """Plan by source; an index is a cache, made again from its archive in seconds."""
    by_source: dict[str, list[Path]] = {}
    for path in sorted(store.indexes().glob("*.parquet"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        if match := INDEX_NAME.fullmatch(path.name):
            by_source.setdefault(match["source"], []).append(path)
    for source, paths in sorted(by_source.items()):
        for path in paths[:-keep]:
            yield _remove_paths(f"index {path.stem}", f"not among the newest {keep} of {source}", path)


def _plan_leftovers(store: Store, removed: Collection[Path]) -> Iterator[Removal]:
    why = "its process was killed"
    for folder in (store.indexes(), store.splits(), store.batches(), store.training()):
        for path in sorted(folder.glob(".*.partial")):
            yield _remove_paths(f"unfinished {store.name(path)}", why, path)
    hidden = [path for pattern in (".*", "*/.*", "*/*/.*") for path in sorted(store.folder.glob(pattern))]
    for path in [*hidden, *sorted(store.archives().glob("*/*/.*"))]:
        goes_anyway = path.parent in removed or path.parent.suffix == ".partial"
        if not goes_anyway and is_abandoned(path):
            yield _remove_paths(f"unfinished {store.name(path)}", why, path)
    for index in list_abandoned(store) if store.url else ():
        yield Removal(f"shards of {index} at {store.url}", why, 0, shards=(store, index))


def _plan_model_files(model_name: str, keep: int) -> Iterator[Removal]:
    for files in find_unneeded_files(model_name, keep):
        if files.versions:
            what = f"model files of {model_name} version {', '.join(files.versions)}"
            why = f"not among the newest {keep}, and without an alias"
        else:
            what, why = f"checkpoint of run {files.run_name} ({files.run_id[:8]})", "a candidate that did not win"
        yield Removal(what, why, files.bytes, model_files=files)


def _plan_observations(address: str, keep_days: int) -> Iterator[Removal]:
    if keep_days < 1:
        raise ConfigurationError(f"Observations must be kept for at least 1 day. Received: {keep_days}")
    if not address:
        return
    place = open_store(address)
    for day in list_old_days(place, keep_days):
        size = 0 if place.url else sum(path.stat().st_size for path in list_day(place, day))
        yield Removal(f"observations of {day}", f"older than {keep_days} days", size, day=(place, day))


def _remove_paths(what: str, why: str, *paths: Path, seen: Counter[int] | None = None) -> Removal:
    seen = Counter() if seen is None else seen
    return Removal(what, why, sum(_measure(path, seen) for path in paths), tuple(sorted(paths)))


def _measure(path: Path, seen: Counter[int]) -> int:
    """Return the bytes that are free once a file or a folder is removed: an image's with the last data set that has it.

    Args:
        seen: how often each inode was removed before; is added to.
    """
    files = [Path(parent, name) for parent, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    freed = 0
    for found in map(Path.stat, files):
        seen[found.st_ino] += 1
        freed += found.st_size * (seen[found.st_ino] == found.st_nlink)
    return freed


def _plan_rejected(feedback: Feedback, days: int) -> Iterator[Removal]:
    if not 0 <= days <= MAX_DAYS:
        raise ConfigurationError(f"keep_rejected_days must be from 0 to {MAX_DAYS:,}. Received: {days}")
    for entry in feedback.list_entries("rejected"):
        if (entry.size or entry.count) and entry.decisions[-1].time <= datetime.now(UTC) - timedelta(days=days):
            why = f"rejected {days} days ago or more; its hash and the decision stay"
            yield Removal(f"report {entry.sha256[:12]}", why, entry.size, rejected=entry.sha256)


def _remove(removal: Removal, model_name: str, feedback: Feedback) -> bool:
    if removal.rejected and not feedback.expire(removal.rejected):
        log.info("%s: kept, since it is rejected no more", removal.what)
        return False
    if removal.model_files and not remove_model_files(model_name, removal.model_files):
        log.info("%s: kept, since it has an alias by now", removal.what)
        return False
    if removal.day:
        remove_day(*removal.day)
    if removal.shards:
        remove_shards(*removal.shards)
    for path in removal.paths:
        remove_folder(path) if path.is_dir() else path.unlink()
    log.info("%s: removed, %.1f MB (%s)", removal.what, removal.bytes / 1e6, removal.why)
    return True
