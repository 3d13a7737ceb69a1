"""Kept images are published as a split folder: whole or not at all, under a name made from their content."""

import contextlib
import io
import itertools
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from deepfake_core.config import CLASS_NAMES, SPLITS, DataParameters, Normalisation
from deepfake_core.data.archive import Archive, ArchiveReader
from deepfake_core.data.dataset import NORMAL_PIXELS, NORMAL_QUALITY, SUFFIXES, Dataset, hash_content, list_datasets
from deepfake_core.data.index import REPEATED
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

COPIED_AT_ONCE = 5000
ROWS_AT_ONCE = 100_000
"""Rows of the manifest that are made and written at once."""

MANIFEST_COLUMNS = [
    "source", "member", "sha256", "label", "width", "height", "split", "kept", "reason", "group", "path",
    "copy_of", "bytes", "format", "jpeg_table",
]  # fmt: skip
IMAGE_COLUMNS = ["source", "member", "sha256", "label", "split", "format", "bytes"]
"""What an image is read and written by."""


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
    version = hash_content(rows, normalise)
    description: dict[str, Any] = {
        "version": version,
        "parameters": parameters.model_dump(include={"val_fraction", "test_fraction", "normalise", "cache_gb"}),
        "sources": [archive.describe() for archive in archives],
        "counts": _count(rows, [archive.source.short_name for archive in archives]),
    }
    remember_splits(rows, store)
    target = store.splits(version)
    if target.is_dir():
        log.info("data set %s is published already, nothing to copy", version)
        target.touch()
        if description != Dataset(target, store).description:  # same images, found in other archives or places
            _write_manifest(target, rows, description)
        return Dataset(target, store)
    beside = target.with_name(f".{version}.partial")
    shutil.rmtree(beside, ignore_errors=True)  # left by a run that was killed: the lock is ours
    try:
        with translate_disk_errors(beside):
            write = _copy_images if parameters.layout == "files" else _pack_images
            write(rows, archives, beside, normalise, on_progress)
        _write_manifest(beside, rows, description)
        beside.replace(target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    log.info("data set %s published: %s", version, description["counts"]["splits"])
    return Dataset(target, store)


def _list_parts(rows: pd.DataFrame, normalise: Normalisation) -> Iterator[pd.DataFrame]:
    """Yield the manifest, sorted by source, member and SHA-256, some rows at a time.

    Indexes are sorted, so whole ones are put in order, and no more than a part is copied. Other rows are sorted.
    """
    keys, source = ["source", "member", "sha256"], rows["source"]
    starts = np.flatnonzero(source != source.shift())
    runs = [rows.iloc[start:stop] for start, stop in itertools.pairwise([*starts, len(rows)])]
    runs.sort(key=lambda run: str(run["source"].iloc[0]))
    if len(runs) > source.nunique() or not all(_is_sorted(run[keys]) for run in runs):
        runs = [rows.astype({"source": "str"}).sort_values(keys)]
    for run in runs:
        for start in range(0, len(run), ROWS_AT_ONCE):
            part = run.iloc[start : start + ROWS_AT_ONCE]
            facts = part[REPEATED].astype("str")
            yield part.assign(path=_name_paths(part, normalise), **facts)[MANIFEST_COLUMNS]


def _is_sorted(run: pd.DataFrame) -> bool:
    parts = (run.iloc[max(start - 1, 0) : start + ROWS_AT_ONCE] for start in range(0, len(run), ROWS_AT_ONCE))
    return all(
        one <= other for part in parts for one, other in itertools.pairwise(part.itertuples(index=False, name=None))
    )


def _name_paths(rows: pd.DataFrame, normalise: Normalisation) -> pd.Series:
    """Return where each image is in the split folder; of those that are not kept, empty."""
    suffix = rows["format"].astype("str").map(SUFFIXES) if normalise == "none" else SUFFIXES["JPEG"]
    return (rows["split"] + "/" + rows["label"] + "/" + rows["sha256"] + suffix).where(rows["split"] != "", "")


def _count(rows: pd.DataFrame, sources: Sequence[str]) -> dict[str, Any]:
    kept = rows.loc[rows["kept"], ["split", "label"]]
    splits = kept.value_counts(["split", "label"])
    return {
        "files": len(rows),
        "kept": len(kept),
        "reasons": count_reasons(rows),
        "sources": {
            source: {"files": int((rows["source"] == source).sum())}
            | count_reasons(rows.loc[rows["source"] == source, ["reason"]])
            for source in sources
        },
        "splits": {
            split: {label: int(splits.get((split, label), 0)) for label in CLASS_NAMES}
            for split in SPLITS
            if (kept["split"] == split).any()
        },
    }


def _copy_images(
    rows: pd.DataFrame,
    archives: Sequence[Archive],
    folder: Path,
    normalise: Normalisation,
    on_progress: Progress | None,
) -> None:
    total, needed = _count_images(rows, normalise)
    require_space(folder.parent, needed, f"The data set {folder}", "set `data.data_dir` to another disk")
    for split, label in rows.loc[rows["kept"], ["split", "label"]].drop_duplicates().itertuples(index=False):
        (folder / split / label).mkdir(parents=True)
    earlier = _find_earlier(Store(folder.parent.parent), normalise)
    done, source = 0, rows["source"].to_numpy()
    for archive in archives:
        mine = np.flatnonzero(rows["kept"] & (source == archive.source.short_name))
        with archive.open() as reader, ThreadPoolExecutor(os.cpu_count()) as pool:

            def copy(row: Any, reader: ArchiveReader = reader) -> None:
                data = reader.read_again(row.member, row.sha256)
                (folder / row.path).write_bytes(data if normalise == "none" else _reencode(data))

            for some in _take_some(rows, mine, COPIED_AT_ONCE, normalise):
                images = list(some)
                missing = [row for row in images if not (earlier and earlier.link(row.path, row.bytes, folder))]
                for _ in pool.map(copy, missing):
                    pass
                done += len(images)
                if on_progress:
                    on_progress(done, total)


def _find_earlier(store: Store, normalise: Normalisation) -> Dataset | None:
    """Return the data set that was asked for last, of those whose images are files, encoded in the same way."""
    for dataset in reversed(list_datasets(store)):
        if dataset.has_files and dataset.description["parameters"]["normalise"] == normalise:
            return dataset
    return None


def _pack_images(
    rows: pd.DataFrame,
    archives: Sequence[Archive],
    folder: Path,
    normalise: Normalisation,
    on_progress: Progress | None,
) -> None:
    """Write tars of each split, in order of SHA-256: so classes and sources are mixed, for those who read in order."""
    total, needed = _count_images(rows, normalise)
    needed += total * BYTES_BESIDE if needed else 0
    require_space(folder.parent, needed, f"The data set {folder}", "set `data.data_dir` to another disk")
    places: list[Place] = []
    order = pc.sort_indices(pa.array(rows["sha256"])).to_numpy()
    split = rows["split"].to_numpy()[order]
    with contextlib.ExitStack() as opened, ThreadPoolExecutor(os.cpu_count()) as pool:
        readers = {one.source.short_name: opened.enter_context(one.open()) for one in archives}

        def read(row: Any) -> tuple[str, bytes]:
            data = readers[row.source].read_again(row.member, row.sha256)
            return row.path, data if normalise == "none" else _reencode(data)

        for name in SPLITS:
            if not len(chosen := order[split == name]):
                continue
            (folder / name).mkdir(parents=True)
            parts = _take_some(rows, chosen, READ_AHEAD, normalise)
            images = (image for some in parts for image in pool.map(read, some))
            for place in write_tars(folder, name, images):
                places.append(place)
                if on_progress and (len(places) % 500 == 0 or len(places) == total):
                    on_progress(len(places), total)
    write_places(folder, places)


def _count_images(rows: pd.DataFrame, normalise: Normalisation) -> tuple[int, int]:
    """Return how many images are kept, and their bytes; 0 where what is written is not known before."""
    return int(rows["kept"].sum()), int(rows["bytes"].where(rows["kept"], 0).sum()) if normalise == "none" else 0


def _take_some(
    rows: pd.DataFrame, positions: np.ndarray, at_once: int, normalise: Normalisation
) -> Iterator[Iterator[Any]]:
    """Yield the rows at some positions with their `path`, some at a time."""
    for start in range(0, len(positions), at_once):
        some = rows[IMAGE_COLUMNS].iloc[positions[start : start + at_once]]
        yield some.assign(path=_name_paths(some, normalise)).itertuples(index=False)


def _reencode(data: bytes) -> bytes:
    """Write an image as all others are written, so that size and compression reveal nothing of its label."""
    buffer = io.BytesIO()
    with open_image(data) as image:
        small = image.resize((NORMAL_PIXELS, NORMAL_PIXELS), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=NORMAL_QUALITY)
    return buffer.getvalue()


def _write_manifest(folder: Path, rows: pd.DataFrame, description: dict[str, Any]) -> None:
    with write_beside(folder / "manifest.parquet") as beside, contextlib.ExitStack() as opened:
        writer: pq.ParquetWriter | None = None
        for part in _list_parts(rows, description["parameters"]["normalise"]):
            table = pa.Table.from_pandas(part, writer and writer.schema, preserve_index=False)
            writer = writer or opened.enter_context(pq.ParquetWriter(beside, table.schema))
            writer.write_table(table)
    write_json(folder / "dataset.json", description)
