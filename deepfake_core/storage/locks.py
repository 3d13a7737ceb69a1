"""Kept images are split and published: whole or not at all, under a name made from their content."""

import hashlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd
from PIL import Image

from deepfake_core.archive import Archive, ArchiveReader, Progress
from deepfake_core.config import CLASS_NAMES, SPLITS, DataParameters, Normalisation
from deepfake_core.detector import decode_image
from deepfake_core.duplicates import connect, find_ends
from deepfake_core.errors import ArchiveError, DatasetError, LockedError
from deepfake_core.files import hash_file, write_beside, write_json
from deepfake_core.store import Store, open_store

log = logging.getLogger(__name__)

COLUMNS = [
    "source", "member", "sha256", "label", "width", "height", "split", "kept", "reason", "group", "path",
    "copy_of", "bytes", "format", "jpeg_table",
]  # fmt: skip
NORMAL_SIZE, NORMAL_QUALITY = 256, 90
"""Side in pixels and JPEG quality of all images where `normalise` is `reencode`."""

SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}


@dataclass(frozen=True)
class Dataset:
    """A published split folder: images, `manifest.parquet` and `dataset.json`.

    Attributes:
        path: the folder on this disk.
        url: where other machines find it; empty where nothing is shared.
    """

    path: Path
    url: str = ""

    @property
    def address(self) -> str:
        return self.url or str(self.path)

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


def open_dataset(address: str | Path, on_progress: Progress | None = None) -> Dataset:
    """Open a published split folder; of a URL, fetch it to this disk unless it is here.

    Raises:
        DatasetError: if it is none.
        ArchiveError: if what is fetched is damaged.
    """
    root, _, version = str(address).rpartition("/splits/")
    store = open_store(root or address)
    if not store.url:
        path = Path(address)
        if not (path / "dataset.json").is_file() or not (path / "manifest.parquet").is_file():
            raise DatasetError(
                "A data set must be a folder that the prepare flow published, with dataset.json and manifest.parquet. "
                f"Received: {path}. Run `prepare`, or check that this machine shares the data folder."
            )
        return Dataset(path)
    name = f"splits/{version}"
    if not re.fullmatch(r"[0-9a-f]{16}", version) or not store.fetch_folder(
        name, lambda folder: _list_images(folder, version), on_progress
    ):
        raise DatasetError(
            "A data set must be one that the prepare flow published whole, at <data_dir>/splits/<dataset version>. "
            f"Received: {address}. Run `prepare` again: it publishes what is missing."
        )
    return Dataset(store.folder / name, f"{store.url}/{name}")


def share_dataset(dataset: Dataset, data_dir: str | Path, on_progress: Progress | None = None) -> None:
    """Publish a data set, and what was remembered with it, for other machines. `data_dir` is a URL."""
    store = open_store(data_dir)
    _share_memory(store)
    members = _list_images(dataset.path, dataset.version)
    store.publish_folder(f"splits/{dataset.version}", members, on_progress)


def _list_images(folder: Path, version: str) -> dict[str, str]:
    """Return a data set's images: path, and SHA-256 of the bytes, or "" where they were encoded anew.

    Raises:
        ArchiveError: if the manifest does not hold the images that the version is the hash of, or leads elsewhere.
    """
    dataset = Dataset(folder)
    try:
        normalise = dataset.description["parameters"]["normalise"]
        kept = dataset.manifest[dataset.manifest["kept"]]
        stem = kept["split"] + "/" + kept["label"] + "/" + kept["sha256"]
        pattern = rf"({'|'.join(SPLITS)})/({'|'.join(CLASS_NAMES)})/[0-9a-f]{{64}}({'|'.join(SUFFIXES.values())})"
        in_place = kept["path"].str.fullmatch(pattern) & (kept["path"].str.rsplit(".", n=1).str[0] == stem)
        is_right = _hash_content(kept, normalise) == dataset.version == version and bool(in_place.all())
    except (KeyError, TypeError, ValueError) as exc:
        raise ArchiveError(f"A data set must have a readable manifest. Received: {version} ({exc!r}).") from exc
    if not is_right:
        raise ArchiveError(
            "A manifest must list the images that its version is the hash of, as split/label/SHA-256. Received: "
            f"another one for {version}. Nothing was taken over; remove that data set and run `prepare` again."
        )
    return dict(zip(kept["path"], kept["sha256"] if normalise == "none" else [""] * len(kept), strict=True))


def find_trained_on(rows: pd.DataFrame, manifest: pd.DataFrame, other: pd.DataFrame) -> np.ndarray:
    """Find images that a model which was trained on another data set has seen, or seen near copies of.

    Args:
        rows: the images in question, of `manifest`.
        manifest: of the data set that holds them.
        other: of the data set that the model was trained on; its validation images chose its checkpoint.

    Returns:
        Mask of shape (len(rows),).
    """
    learned = set(other.loc[other["split"].isin(("train", "val")), "group"]) - {""}
    seen = set(other.loc[other["group"].isin(learned), "sha256"])
    groups = set(manifest.loc[manifest["sha256"].isin(seen), "group"]) - {""}
    return (rows["group"].isin(groups) | rows["sha256"].isin(seen)).to_numpy()


def assign_splits(
    rows: pd.DataFrame, links: pd.DataFrame, memory: Mapping[str, str], val_fraction: float, test_fraction: float
) -> pd.DataFrame:
    """Put each kept image into train, val or test; all of a group go to one split.

    A group whose images an earlier version held stays in that version's split. A new group's split is a function
    of the group alone: the hash of its name, read as a number between 0 and 1, falls below `test_fraction` (test),
    below `test_fraction + val_fraction` (val), or above (train). So every source and label is divided by the same
    fractions, up to chance.

    Where new images join groups that lie in different splits, those images are left out; where old ones do, the smaller
    part is. The reason is then `split_conflict`.

    Args:
        rows: from `mark_duplicates`.
        links: from `find_links`.
        memory: splits of images that earlier versions held, by SHA-256; see `read_memory`.

    Returns:
        The same rows with `split` and `path` (both empty where not kept), and `group` of what is left together.

    Raises:
        DatasetError: if a class has no image in some split.
    """
    rows = _resolve_conflicts(rows, links, memory)
    remembered = rows["sha256"].map(memory).groupby(rows["group"]).transform("first")
    position = rows["group"].map(
        {name: int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 2**64 for name in set(rows["group"])}
    )
    split = pd.Series("train", index=rows.index)
    split[position < test_fraction + val_fraction] = "val"
    split[position < test_fraction] = "test"
    split = remembered.where(remembered.notna(), split).where(rows["kept"], "")
    path = (split + "/" + rows["label"] + "/" + rows["sha256"] + rows["format"].map(SUFFIXES)).where(rows["kept"], "")
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


def _resolve_conflicts(rows: pd.DataFrame, links: pd.DataFrame, memory: Mapping[str, str]) -> pd.DataFrame:
    """Leave out what joins images of different splits, and name the groups of the others anew."""
    grouped = rows[rows["group"] != ""]
    remembered = grouped["sha256"].map(memory)
    torn = set(grouped["group"][remembered.groupby(grouped["group"]).transform("nunique") > 1])
    if not torn:
        return rows
    images = grouped[grouped["group"].isin(torn)].drop_duplicates("sha256").set_index("sha256")
    names = images.index.sort_values()
    split = names.map(lambda name: memory.get(name, "")).to_numpy(object)
    inside = links[links["image"].isin(names) & links["other"].isin(names)]
    ends = find_ends(names, inside)

    # Parts are linked images of one split, or linked new ones. The largest are kept, old ones first.
    part = connect(names, inside[split[ends[0]] == split[ends[1]]])
    sides = pd.Series(split).groupby(part).first()
    beside: dict[int, set[int]] = {number: set() for number in sides.index}
    for one, other in zip(part[ends[0]], part[ends[1]], strict=True):
        beside[one].add(other)
        beside[other].add(one)
    side: dict[int, str] = {}
    for number in sorted(beside, key=lambda number: (not sides[number], -(part == number).sum(), number)):
        allowed = {side[other] for other in beside[number] if other in side} | ({sides[number]} - {""})
        if len(allowed) == 1:
            (side[number],) = allowed
    kept = np.isin(part, list(side))
    together = connect(names, inside[kept[ends[0]] & kept[ends[1]]])
    group = pd.Series(names, index=names).groupby(together).transform("first")
    left_out = set(names[~kept])

    rows = rows.copy()
    rows["group"] = rows["sha256"].map(group).where(rows["group"] != "").fillna(rows["group"])
    conflict = rows["sha256"].isin(left_out) & rows["kept"]
    rows.loc[conflict, "reason"] = "split_conflict"
    instead = rows[rows["copy_of"].isin(left_out) & ~rows["sha256"].isin(left_out)]  # a smaller copy takes its place
    instead = instead.sort_values(["width", "bytes"], ascending=False, kind="stable").drop_duplicates("copy_of")
    rows.loc[instead.index, "reason"] = "kept"
    rows.loc[instead.index, "copy_of"] = ""
    rows["kept"] = rows["reason"] == "kept"
    log.warning("%d images left out, which join groups of different splits", int(conflict.sum()))
    return rows


def read_memory(data_dir: str | Path) -> dict[str, str]:
    """Return the split of every image that any version in this data folder held, by SHA-256.

    Images of a group that were left out as copies are remembered too: should the kept one go, they take its place.
    Of a URL, what other machines remembered is fetched first.
    """
    store = open_store(data_dir)
    memory = _read_table(store.folder / "splits" / "memory.parquet")
    return memory | _fetch_memory(store) if store.url else memory


def _read_table(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    memory = pd.read_parquet(path)
    return dict(zip(memory["sha256"], memory["split"], strict=True))


def _write_table(memory: Mapping[str, str], path: Path) -> None:
    pd.DataFrame(sorted(memory.items()), columns=["sha256", "split"]).to_parquet(path, index=False)


def _fetch_memory(store: Store) -> dict[str, str]:
    """Return what all machines remember.

    Each adds files, named by time and SHA-256. Of two splits of an image, the earlier counts.
    """
    memory: dict[str, str] = {}
    for name in store.list_names("memory"):
        if found := re.fullmatch(r"\d{8}T\d{6}Z-([0-9a-f]{64})\.parquet", name, re.ASCII):
            file = store.folder / "memory" / name
            if not file.exists():
                store.fetch(f"memory/{name}", file, found[1], marker=f"memory/{name}")
            memory = _read_table(file) | memory
    return memory


def _share_memory(store: Store) -> None:
    """Add what this machine remembers and the store does not. Nothing is overwritten, so nothing can be lost."""
    known = _fetch_memory(store)
    new = {image: split for image, split in read_memory(store.folder).items() if image not in known}
    if not new:
        return
    folder = store.folder / "memory"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        path = Path(file.name)
        _write_table(new, path)
        store.publish(f"memory/{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{hash_file(path)}.parquet", path)
    log.info("the splits of %d new images are published at %s", len(new), store.url)


def _remember(rows: pd.DataFrame, data_dir: Path) -> None:
    splits = rows[rows["kept"]].drop_duplicates("group").set_index("group")["split"]
    now = rows["group"].map(splits)
    memory = read_memory(data_dir)
    known = len(memory)
    memory = dict(zip(rows["sha256"][now.notna()], now.dropna(), strict=True)) | memory
    if len(memory) > known:
        with write_beside(data_dir / "splits" / "memory.parquet") as beside:
            _write_table(memory, beside)


def publish_dataset(
    rows: pd.DataFrame,
    archives: Sequence[Archive],
    parameters: DataParameters,
    on_progress: Progress | None = None,
) -> Dataset:
    """Write the split folders; a version that is there already is not copied again.

    The version is a hash of every kept image's bytes, label and split, and of `normalise`: same images, same version,
    in whatever order they came. The folder is written beside and renamed into place; its modification time says when it
    was last asked for. Where `data_dir` is a URL, that is in its cache on this disk; `share_dataset` publishes it for
    other machines.
    """
    store, normalise = open_store(parameters.data_dir), parameters.normalise
    manifest = rows[COLUMNS].sort_values(["source", "member", "sha256"], ignore_index=True)
    if normalise == "reencode":
        manifest["path"] = manifest["path"].str.replace(r"\.\w+$", ".jpg", regex=True)
    version = _hash_content(manifest, normalise)
    description: dict[str, Any] = {
        "version": version,
        "parameters": parameters.model_dump(include={"val_fraction", "test_fraction", "normalise"}),
        "sources": [archive.describe() for archive in archives],
        "counts": _count(manifest, [archive.source.short_name for archive in archives]),
    }
    _remember(rows, store.folder)
    target = store.folder / "splits" / version
    url = f"{store.url}/splits/{version}" if store.url else ""
    if target.is_dir():
        log.info("data set %s is published already, nothing to copy", version)
        target.touch()
        if description != Dataset(target).description:  # same images, found in other archives or places
            _write_manifest(target, manifest, description)
        return Dataset(target, url)
    beside = target.with_name(f".{version}.partial")
    shutil.rmtree(beside, ignore_errors=True)  # left by a run that was killed: the lock is ours
    try:
        _copy_images(manifest, archives, beside, normalise, on_progress)
        _write_manifest(beside, manifest, description)
        beside.replace(target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    log.info("data set %s published: %s", version, description["counts"]["splits"])
    return Dataset(target, url)


def _hash_content(manifest: pd.DataFrame, normalise: Normalisation) -> str:
    kept = manifest.loc[manifest["kept"], ["sha256", "label", "split"]]
    lines = sorted(" ".join(row) for row in kept.itertuples(index=False))
    if normalise != "none":
        lines.append(f"{normalise} {NORMAL_SIZE} {NORMAL_QUALITY}")
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
    manifest: pd.DataFrame,
    archives: Sequence[Archive],
    folder: Path,
    normalise: Normalisation,
    on_progress: Progress | None,
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
                (folder / row.path).write_bytes(data if normalise == "none" else _reencode(data))

            for _ in pool.map(copy, mine.itertuples(index=False)):
                done += 1
                if on_progress and (done % 500 == 0 or done == total):
                    on_progress(done, total)


def _reencode(data: bytes) -> bytes:
    """Write an image as all others are written, so that size and compression tell nothing of its label."""
    buffer = io.BytesIO()
    image = decode_image(data).resize((NORMAL_SIZE, NORMAL_SIZE), Image.Resampling.LANCZOS)
    image.save(buffer, "JPEG", quality=NORMAL_QUALITY)
    return buffer.getvalue()


def _write_manifest(folder: Path, manifest: pd.DataFrame, description: dict[str, Any]) -> None:
    with write_beside(folder / "manifest.parquet") as beside:
        manifest.to_parquet(beside, index=False)
    write_json(folder / "dataset.json", description)


@contextmanager
def lock_folder(folder: Path, holder: str, way_out: str = "set `data.data_dir` to another folder") -> Iterator[None]:
    """Hold a folder for one run; nested use in one process is one lock.

    The operating system lets go of the lock when the process ends, however it ends.

    Raises:
        LockedError: at once, if another process holds it; says which.
    """
    folder = folder.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / ".lock.json"
    lock = filelock.FileLock(folder / ".lock", timeout=0, is_singleton=True, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout as exc:
        held_by = json.loads(note.read_text()) if note.exists() else {"holder": "unknown"}
        raise LockedError(
            f"One run at a time may use a folder. {folder} is held by {held_by}. Wait until it ends, or {way_out}."
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
