"""Kept images are published as a split folder: whole or not at all, under a name made from their content."""

import io
import itertools
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from deepfake_core.config import CLASS_NAMES, SPLITS, DataParameters, Normalisation
from deepfake_core.data.archive import Archive, ArchiveReader
from deepfake_core.data.dataset import NORMAL_PIXELS, NORMAL_QUALITY, Dataset, hash_content
from deepfake_core.data.split_memory import remember_splits
from deepfake_core.data.splits import count_reasons
from deepfake_core.decoding import open_image
from deepfake_core.storage.files import require_space, translate_disk_errors, write_beside, write_json
from deepfake_core.storage.progress import Progress
from deepfake_core.storage.store import Store
from deepfake_core.storage.tars import BYTES_BESIDE, Place, write_places, write_tars

log = logging.getLogger(__name__)

READ_AHEAD = 64
"""Images that are held while a tar is written."""

ROWS_AT_ONCE = 10_000

MANIFEST_COLUMNS = [
    "source", "member", "sha256", "label", "width", "height", "split", "kept", "reason", "group", "path",
    "copy_of", "bytes", "format", "jpeg_table",
]  # fmt: skip


def publish_dataset(
    rows: pd.DataFrame,
    archives: Sequence[Archive],
    store: Store,
    parameters: DataParameters,
    on_progress: Progress | None = None,
) -> Dataset:
    """Write the split folders; a version that is there already is not copied again.

    The version is a hash of every kept image's bytes, label and split, and of `normalise`: same images, same version,
    in whatever order they came. The folder is written beside and renamed into place; its modification time says when it
    was last asked for. Where the store is at a URL, the folder is in its cache on this disk; `share_dataset` publishes
    it for other machines.
    """
    normalise = parameters.normalise
    manifest = _sort_rows(rows[MANIFEST_COLUMNS])
    if normalise == "reencode":
        manifest["path"] = manifest["path"].str.replace(r"\.\w+$", ".jpg", regex=True)
    version = hash_content(manifest, normalise)
    description: dict[str, Any] = {
        "version": version,
        "parameters": parameters.model_dump(include={"val_fraction", "test_fraction", "normalise", "cache_gb"}),
        "sources": [archive.describe() for archive in archives],
        "counts": _count(manifest, [archive.source.short_name for archive in archives]),
    }
    remember_splits(rows, store)
    target = store.splits(version)
    if target.is_dir():
        log.info("data set %s is published already, nothing to copy", version)
        target.touch()
        if description != Dataset(target, store).description:  # same images, found in other archives or places
            _write_manifest(target, manifest, description)
        return Dataset(target, store)
    beside = target.with_name(f".{version}.partial")
    shutil.rmtree(beside, ignore_errors=True)  # left by a run that was killed: the lock is ours
    try:
        with translate_disk_errors(beside):
            write = _copy_images if parameters.layout == "files" else _pack_images
            write(manifest, archives, beside, normalise, on_progress)
        _write_manifest(beside, manifest, description)
        beside.replace(target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    log.info("data set %s published: %s", version, description["counts"]["splits"])
    return Dataset(target, store)


def _sort_rows(manifest: pd.DataFrame) -> pd.DataFrame:
    """Sort by source, member and SHA-256: whole indexes are put in order, and their rows are copied if they are not."""
    keys, source = ["source", "member", "sha256"], manifest["source"]
    if len(starts := np.flatnonzero(source != source.shift())) > source.nunique():
        return manifest.sort_values(keys, ignore_index=True)
    runs = [manifest.iloc[start:stop] for start, stop in itertools.pairwise([*starts, len(manifest)])]
    order = sorted(range(len(runs)), key=[str(source.iloc[start]) for start in starts].__getitem__)
    manifest = pd.concat([runs[number] for number in order], ignore_index=True) if runs else manifest
    for start in range(0, len(manifest), ROWS_AT_ONCE):
        part = manifest[keys].iloc[max(start - 1, 0) : start + ROWS_AT_ONCE]
        if any(one > other for one, other in itertools.pairwise(part.itertuples(index=False, name=None))):
            return manifest.sort_values(keys, ignore_index=True)
    return manifest


def _count(manifest: pd.DataFrame, sources: Sequence[str]) -> dict[str, Any]:
    kept = manifest.loc[manifest["kept"], ["split", "label"]]
    splits = kept.value_counts(["split", "label"])
    return {
        "files": len(manifest),
        "kept": len(kept),
        "reasons": count_reasons(manifest),
        "sources": {
            source: {"files": int((manifest["source"] == source).sum())}
            | count_reasons(manifest.loc[manifest["source"] == source, ["reason"]])
            for source in sources
        },
        "splits": {
            split: {label: int(splits.get((split, label), 0)) for label in CLASS_NAMES}
            for split in SPLITS
            if (kept["split"] == split).any()
        },
    }


def _copy_images(
    manifest: pd.DataFrame,
    archives: Sequence[Archive],
    folder: Path,
    normalise: Normalisation,
    on_progress: Progress | None,
) -> None:
    for name in manifest.loc[manifest["kept"], "path"].str.rpartition("/")[0].unique():
        (folder / name).mkdir(parents=True)
    if normalise == "none":
        needed = int(manifest.loc[manifest["kept"], "bytes"].sum())
        require_space(folder, needed, f"The data set {folder}", "set `data.data_dir` to another disk")
    total, done = int(manifest["kept"].sum()), 0
    for archive in archives:
        mine = manifest[manifest["kept"] & (manifest["source"] == archive.source.short_name)]
        with archive.open() as reader, ThreadPoolExecutor(os.cpu_count()) as pool:

            def copy(row: Any, reader: ArchiveReader = reader) -> None:
                data = reader.read_again(row.member, row.sha256)
                (folder / row.path).write_bytes(data if normalise == "none" else _reencode(data))

            for _ in pool.map(copy, mine.itertuples(index=False)):
                done += 1
                if on_progress and (done % 500 == 0 or done == total):
                    on_progress(done, total)


def _pack_images(
    manifest: pd.DataFrame,
    archives: Sequence[Archive],
    folder: Path,
    normalise: Normalisation,
    on_progress: Progress | None,
) -> None:
    """Write tars of each split, in order of SHA-256: so classes and sources are mixed, for those who read in order."""
    kept = manifest.loc[manifest["kept"], ["source", "member", "sha256", "split", "path", "bytes"]]
    if normalise == "none":
        needed = int(kept["bytes"].sum()) + len(kept) * BYTES_BESIDE
        require_space(folder.parent, needed, f"The data set {folder}", "set `data.data_dir` to another disk")
    places: list[Place] = []
    with ExitStack() as opened, ThreadPoolExecutor(os.cpu_count()) as pool:
        readers = {one.source.short_name: opened.enter_context(one.open()) for one in archives}

        def read(row: Any) -> tuple[str, bytes]:
            data = readers[row.source].read_again(row.member, row.sha256)
            return row.path, data if normalise == "none" else _reencode(data)

        for split, rows in kept.sort_values("sha256").groupby("split"):
            (folder / str(split)).mkdir(parents=True)
            parts = (rows.iloc[start : start + READ_AHEAD] for start in range(0, len(rows), READ_AHEAD))
            images = (image for part in parts for image in pool.map(read, part.itertuples(index=False)))
            for place in write_tars(folder, str(split), images):
                places.append(place)
                if on_progress and (len(places) % 500 == 0 or len(places) == len(kept)):
                    on_progress(len(places), len(kept))
    write_places(folder, places)


def _reencode(data: bytes) -> bytes:
    """Write an image as all others are written, so that size and compression reveal nothing of its label."""
    buffer = io.BytesIO()
    with open_image(data) as image:
        small = image.resize((NORMAL_PIXELS, NORMAL_PIXELS), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=NORMAL_QUALITY)
    return buffer.getvalue()


def _write_manifest(folder: Path, manifest: pd.DataFrame, description: dict[str, Any]) -> None:
    with write_beside(folder / "manifest.parquet") as beside:
        manifest.to_parquet(beside, index=False)
    write_json(folder / "dataset.json", description)
