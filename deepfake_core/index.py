"""An archive becomes an image index: one row per file, read straight from the zip.

Columns: `source, member, sha256, group, label, width, height, format, reason`. `group` is the
SHA-256 of the decoded pixels: equal pictures share it, whatever their bytes. `reason` is empty
for images that can be used, and says why not for all other files.
"""

import hashlib
import io
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from deepfake_core.archive import Archive, ArchiveReader, Member, Progress
from deepfake_core.config import CLASS_NAMES, Source
from deepfake_core.detector import UnreadableImageError, decode_image
from deepfake_core.errors import ArchiveError, DatasetError
from deepfake_core.files import write_beside

log = logging.getLogger(__name__)

INDEX_FORMAT = 1
"""Part of the cache's key: raise it when the same archive would give another index."""

SHARD_SIZE = 1000
COLUMNS = ["source", "member", "sha256", "group", "label", "width", "height", "format", "reason"]


def build_index(archive: Archive, data_dir: Path, on_progress: Progress | None = None) -> pd.DataFrame:
    """Describe every file of an archive; an archive that was indexed before is not read again.

    Returns:
        One row per file, ordered by member name. See the module for the columns.

    Raises:
        DatasetError: if no image has a label, or a csv file and the folders disagree on one.
    """
    rule = archive.source.model_dump_json(include={"real_folder", "fake_folder", "csv_real_label"})
    key = hashlib.sha256(f"{INDEX_FORMAT} {archive.sha256} {rule}".encode()).hexdigest()[:16]
    cached = data_dir / "indexes" / f"{archive.source.short_name}-{key}.parquet"
    if cached.exists():
        log.info("%s: unchanged, its index is on disk already", archive.source.short_name)
        return pd.read_parquet(cached)
    with ArchiveReader(archive.path) as reader:
        members = sorted(reader.members, key=lambda member: member.name)
        shards = [members[start : start + SHARD_SIZE] for start in range(0, len(members), SHARD_SIZE)]
        rows: list[dict] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for shard in pool.map(lambda shard: index_members(archive.source, reader, shard), shards):
                rows += shard
                if on_progress:
                    on_progress(len(rows), len(members))
        index = pd.DataFrame(rows, columns=COLUMNS).astype({"width": "int32", "height": "int32"})
        _check_labels(archive.source, index, members)
        if archive.source.csv_real_label is not None:
            _check_csv_files(archive.source, reader, index)
    with write_beside(cached) as beside:
        index.to_parquet(beside, index=False)
    unusable = index.loc[index["reason"] != "", "reason"].value_counts().to_dict()
    log.info(
        "%s: %d files, %d usable images, left out: %s",
        archive.source.short_name,
        len(index),
        int((index["reason"] == "").sum()),
        unusable or "none",
    )
    return index


def index_members(source: Source, reader: ArchiveReader, members: list[Member]) -> list[dict]:
    """Describe some members: a pure function of the archive and their names."""
    return [_describe(source, reader, member) for member in members]


def _describe(source: Source, reader: ArchiveReader, member: Member) -> dict:
    row: dict[str, Any] = {"source": source.short_name, "member": member.name, "sha256": "", "group": ""}
    row |= {"label": _label(source, member.name), "width": 0, "height": 0, "format": "", "reason": ""}
    if member.problem:
        return row | {"reason": member.problem}
    data = reader.read(member)
    row["sha256"] = hashlib.sha256(data).hexdigest()
    try:
        image = decode_image(data)
    except UnreadableImageError as exc:
        return row | {"reason": exc.reason}
    row |= {"width": image.width, "height": image.height, "format": image.format}
    pixels = hashlib.sha256(f"{image.width}x{image.height}".encode())
    pixels.update(image.tobytes())
    row["group"] = pixels.hexdigest()
    return row if row["label"] else row | {"reason": "no_label"}


def _label(source: Source, member: str) -> str:
    """Name the class by the innermost folder that has one of the two names; empty if none has."""
    names = {source.real_folder: CLASS_NAMES[0], source.fake_folder: CLASS_NAMES[1]}
    folders = PurePosixPath(member).parts[:-1]
    return next((names[folder] for folder in reversed(folders) if folder in names), "")


def _check_labels(source: Source, index: pd.DataFrame, members: list[Member]) -> None:
    if (index["reason"] == "").any():
        return
    folders = sorted({str(PurePosixPath(member.name).parent) for member in members})
    raise DatasetError(
        f"A source must hold images in folders named {source.real_folder!r} or {source.fake_folder!r}. "
        f"Received: {source.name}, {len(index)} files, reasons "
        f"{index['reason'].value_counts().to_dict()}, folders {folders[:10]}. Correct `real_folder` and "
        "`fake_folder` of the source, or the source."
    )


def _check_csv_files(source: Source, reader: ArchiveReader, index: pd.DataFrame) -> None:
    """Compare the csv files' labels with the folders'."""
    labels = index.loc[index["reason"] == ""].set_index("member")["label"]
    tails = {tuple(PurePosixPath(member).parts[-3:]): member for member in labels.index}
    checked = 0
    for member in reader.members:
        if not member.name.endswith(".csv") or member.problem:
            continue
        table = _read_csv(source, reader, member)
        if not {"path", "label"} <= set(table.columns):
            continue
        for path, value in zip(table["path"].astype(str), table["label"], strict=True):
            image = tails.get(tuple(PurePosixPath(path).parts[-3:]))
            if image is None:
                continue
            stated = CLASS_NAMES[0] if value == source.csv_real_label else CLASS_NAMES[1]
            if stated != labels[image]:
                raise DatasetError(
                    f"Folders and csv files must agree on every label. Received: {source.name}, {image!r} lies "
                    f"in a folder of {labels[image]} images, but {member.name} has label {value}, which means "
                    f"{stated} (`csv_real_label` is {source.csv_real_label}). Nothing was written. Correct the "
                    "source's label rule, or leave the source out."
                )
            checked += 1
    if not checked:
        raise DatasetError(
            f"`csv_real_label` needs csv files with columns `path` and `label` that name the source's images. "
            f"Received: {source.name}, where none does. Leave `csv_real_label` empty for this source."
        )
    log.info("%s: %d labels agree with the csv files", source.short_name, checked)


def _read_csv(source: Source, reader: ArchiveReader, member: Member) -> pd.DataFrame:
    try:
        return pd.read_csv(io.BytesIO(reader.read(member)))
    except (ValueError, ArchiveError) as exc:
        raise DatasetError(f"{source.name}: {member.name} must be a csv file ({exc}).") from exc
