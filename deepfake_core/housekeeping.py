"""What years of retrains leave behind goes, save what production, a rollback or a run in progress needs.

`memory.parquet` never goes: images stay in their split for ever. Of a version whose model files go, MLflow keeps run,
parameters, figures, reports and tags.
"""

import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepfake_core import registry
from deepfake_core.errors import ConfigurationError
from deepfake_core.manifest import Dataset, lock_folder
from deepfake_core.store import open_store

log = logging.getLogger(__name__)

KEEP = 3

DATASET = re.compile(r"[0-9a-f]{16}")
ARCHIVE = re.compile(r"(?P<version>\d+)\.(zip|json).*")
INDEX = re.compile(r"(?P<source>.+)-v\d+-[0-9a-f]{16}\.parquet")
WRITTEN_BESIDE = re.compile(r"\..+\.\d+")
"""How `files.write_beside` names a file that is not whole yet; the number is its process."""

ABANDONED_SECONDS = 24 * 3600
"""After which nobody writes to such a file any more; its process may be on another machine."""


@dataclass(frozen=True)
class Removal:
    """What goes together, why, and how many bytes that frees: paths of the data folder, or a run's files in MLflow."""

    what: str
    why: str
    bytes: int
    paths: tuple[Path, ...] = ()
    model_files: registry.ModelFiles | None = None


def clean(
    data_dir: str | Path,
    model_name: str = registry.DEFAULT_MODEL,
    keep: int = KEEP,
    dry_run: bool = False,
    agreed: Sequence[Removal] | None = None,
) -> list[Removal]:
    """Remove what is not needed any more; return what went.

    Killed half way, it leaves nothing that looks whole, and the next call removes the rest.

    Args:
        data_dir: of a URL, this machine's cache is cleaned; nothing goes from the store.
        keep: number of newest data sets, archives and indexes per source, and versions' model files, that stay.
        dry_run: remove nothing; return what would go.
        agreed: from an earlier call; nothing else goes.

    Raises:
        ConfigurationError: if `keep` is less than 1.
        LockedError: if a run holds the data folder.
        ServiceError: if MLflow or its artifacts can't be reached.
    """
    folder = open_store(data_dir).folder
    with lock_folder(folder, "housekeeping", way_out="stop that process"):
        goes = plan_removals(folder, model_name, keep)
        if agreed is not None:
            goes = [removal for removal in goes if removal in agreed]
        if not dry_run:
            goes = [removal for removal in goes if _remove(removal, model_name)]
            log.info("%d things removed, %.1f MB", len(goes), sum(removal.bytes for removal in goes) / 1e6)
    return goes


def plan_removals(data_dir: Path, model_name: str, keep: int) -> list[Removal]:
    """Return what is not needed any more; whoever calls holds the data folder.

    Data sets stay if they are among the newest, if a version with an alias was trained on them, or if a run in MLflow
    is at them. What was made from a data set goes with it; archives stay where a data set that stays came from them.
    Where MLflow knows no version at all, nothing goes, since it can't tell what production needs.
    """
    if keep < 1:
        raise ConfigurationError(f"At least 1 of each must be kept: the newest is in use. Received: {keep}")
    registry.connect()
    if not registry.has_versions(model_name):
        log.warning("%s has no version in this MLflow, which so can't tell what is needed: nothing goes", model_name)
        return []
    datasets = _list_datasets(data_dir)
    newest = {dataset.version for dataset in datasets[-keep:]}
    stays = newest | registry.find_needed_datasets(model_name)
    removals = [
        *_plan_datasets([dataset for dataset in datasets if dataset.version not in stays], keep),
        *_plan_derived(data_dir, stays),
        *_plan_archives(data_dir, [dataset for dataset in datasets if dataset.version in stays], keep),
        *_plan_indexes(data_dir, keep),
    ]
    goes = {path for removal in removals for path in removal.paths}
    return [
        *_plan_leftovers(data_dir, goes),
        *removals,
        *_plan_model_files(model_name, keep),
    ]


def _list_datasets(data_dir: Path) -> list[Dataset]:
    """Return the published data sets, the one that was last asked for at the end."""
    folders = [path.parent for path in data_dir.glob("splits/*/dataset.json") if DATASET.fullmatch(path.parent.name)]
    return [Dataset(folder) for folder in sorted(folders, key=lambda folder: (folder.stat().st_mtime_ns, folder.name))]


def _plan_datasets(datasets: Sequence[Dataset], keep: int) -> Iterator[Removal]:
    why = f"not among the newest {keep}, and neither production, a rollback nor a run needs it"
    for dataset in datasets:
        yield _remove_paths(f"data set {dataset.version}", why, dataset.path)


def _plan_derived(data_dir: Path, stays: Collection[str]) -> Iterator[Removal]:
    for folder, what in (("batches", "batches"), ("training", "state of a training")):
        for path in sorted(data_dir.glob(f"{folder}/*")):
            version = path.name.partition("-")[0]
            if DATASET.fullmatch(version) and version not in stays:
                yield _remove_paths(f"{what} {path.name}", "its data set is not kept", path)


def _plan_archives(data_dir: Path, datasets: Sequence[Dataset], keep: int) -> Iterator[Removal]:
    """Plan by source; of versions newer than the last whole one, downloads that can go on may be there."""
    used = {(one["name"], one["kaggle_version"]) for dataset in datasets for one in dataset.description["sources"]}
    for folder in sorted(data_dir.glob("archives/*/*")):
        source = f"{folder.parent.name}/{folder.name}"
        files: dict[int, list[Path]] = {}
        for path in folder.glob("*.*"):
            if match := ARCHIVE.fullmatch(path.name):
                files.setdefault(int(match["version"]), []).append(path)
        whole = sorted(version for version in files if (folder / f"{version}.zip").exists())
        for version in sorted(files):
            if whole and version < whole[-1] and version not in whole[-keep:] and (source, version) not in used:
                why = f"not among the newest {keep}, and no data set that is kept came from it"
                yield _remove_paths(f"archive {source} version {version}", why, *files[version])


def _plan_indexes(data_dir: Path, keep: int) -> Iterator[Removal]:
    """Plan by source; an index is a cache, made again from its archive in seconds."""
    by_source: dict[str, list[Path]] = {}
    for path in sorted(data_dir.glob("indexes/*.parquet"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        if match := INDEX.fullmatch(path.name):
            by_source.setdefault(match["source"], []).append(path)
    for source, paths in sorted(by_source.items()):
        for path in paths[:-keep]:
            yield _remove_paths(f"index {path.stem}", f"not among the newest {keep} of {source}", path)


def _plan_leftovers(data_dir: Path, goes: Collection[Path]) -> Iterator[Removal]:
    for folder in ("splits", "batches", "training"):
        for path in sorted(data_dir.glob(f"{folder}/.*.partial")):
            yield _remove_paths(f"unfinished {path.relative_to(data_dir)}", "its process was killed", path)
    for pattern in (".*", "*/.*", "*/*/.*", "archives/*/*/.*"):
        for path in sorted(data_dir.glob(pattern)):
            if path.parent in goes or path.parent.suffix == ".partial":
                continue
            if WRITTEN_BESIDE.fullmatch(path.name) and _is_abandoned(path):
                yield _remove_paths(f"unfinished {path.relative_to(data_dir)}", "its process was killed", path)


def _is_abandoned(path: Path) -> bool:
    try:
        return path.stat().st_mtime < time.time() - ABANDONED_SECONDS
    except FileNotFoundError:  # whole, and in place, by now
        return False


def _plan_model_files(model_name: str, keep: int) -> Iterator[Removal]:
    for files in registry.find_unneeded_files(model_name, keep):
        if files.versions:
            what = f"model files of {model_name} version {', '.join(files.versions)}"
            why = f"not among the newest {keep}, and without an alias"
        else:
            what, why = f"checkpoint of run {files.run_name} ({files.run_id[:8]})", "a candidate that did not win"
        yield Removal(what, why, files.bytes, model_files=files)


def _remove_paths(what: str, why: str, *paths: Path) -> Removal:
    return Removal(what, why, sum(_measure(path) for path in paths), tuple(sorted(paths)))


def _measure(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum((Path(parent) / file).stat().st_size for parent, _, files in os.walk(path) for file in files)


def _remove(removal: Removal, model_name: str) -> bool:
    if removal.model_files and not registry.remove_model_files(model_name, removal.model_files):
        log.info("%s: kept, as it has an alias by now", removal.what)
        return False
    for path in removal.paths:
        if path.is_dir():
            aside = path if path.name.endswith(".partial") else path.with_name(f".{path.name}.partial")
            path.replace(aside)  # a folder that is half removed must not look whole
            shutil.rmtree(aside)
        else:
            path.unlink()
    log.info("%s: removed, %.1f MB (%s)", removal.what, removal.bytes / 1e6, removal.why)
    return True
