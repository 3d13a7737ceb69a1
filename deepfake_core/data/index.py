"""An archive becomes an image index: one row per file, read straight from the zip.

Each image is read and decoded once, and gives everything that later stages ask of it. Columns:

- `source, member`: where it lies; `sha256`: of its bytes; `label`: real or fake, by its folder;
- `width, height`: in pixels, upright; `bytes`: size of the file; `format`: JPEG, PNG or WEBP;
- `jpeg_table`: the quantisation tables' name, with the quality that libjpeg would call them; empty if no JPEG;
- `reason`: empty for images that can be used, and says why not for all other files;
- `thumbnail`: 32 x 32 grey pixels (1,024 bytes), and `hash`: 256 bits made from it (32 bytes), see `hashes`.
"""

import builtins
import hashlib
import io
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pandas as pd
import simplejpeg
from PIL import Image

from deepfake_core.archive import Archive, ArchiveReader, Member, Progress
from deepfake_core.config import CLASS_NAMES, Source
from deepfake_core.detector import MAX_PIXELS, UnreadableImageError, decode_image
from deepfake_core.errors import ArchiveError, DatasetError
from deepfake_core.files import write_beside
from deepfake_core.hashes import hash_thumbnails, shrink_images
from deepfake_core.store import open_store

log = logging.getLogger(__name__)

INDEX_FORMAT = 2
"""Part of the cache's name: raise it when the same archive would give another index."""

SHARD_SIZE = 2000
DECODED_AT_ONCE = 128
"""Images of a shard that are in memory before they are shrunk, of 256 x 256 pixels at most."""

SMALLEST_SIDE = 64
"""JPEGs are decoded at the smallest of libjpeg's scales that leaves this many pixels a side."""

NO_PIXELS = np.empty((0, 0), np.uint8)
LUMA_SUM = 3688
"""Of ITU-T T.81 (JPEG), table K.1, which libjpeg scales to a quality."""


class Content(NamedTuple):
    """What an image's bytes tell, wherever it lies: the columns from `width` on."""

    width: int = 0
    height: int = 0
    bytes: int = 0
    format: str = ""
    jpeg_table: str = ""
    reason: str = ""
    hash: builtins.bytes = b""
    thumbnail: builtins.bytes = b""


class JpegHeader(NamedTuple):
    """What stands before a JPEG's first scan.

    `is_plain` is False for what libjpeg's grey decoding does not do alone: turned by Exif, CMYK, too large.
    """

    width: int
    height: int
    table: str
    is_plain: bool


COLUMNS = ["source", "member", "sha256", "label", *Content._fields]
Contents = dict[str, Content]
"""What images tell, by the SHA-256 of their bytes."""


def build_index(archive: Archive, data_dir: str | Path, on_progress: Progress | None = None) -> pd.DataFrame:
    """Describe every file of an archive; an archive that was indexed before is not read again.

    Of a changed archive, only images whose bytes were not in the source's last index are decoded.

    Returns:
        One row per file, ordered by member name. See the module for the columns.

    Raises:
        DatasetError: if no image has a label, or a csv file and the folders disagree on one.
    """
    source = archive.source
    rule = source.model_dump_json(include={"real_folder", "fake_folder", "csv_real_label"})
    key = hashlib.sha256(f"{archive.sha256} {rule}".encode()).hexdigest()[:16]
    folder, stem = open_store(data_dir).folder / "indexes", f"{source.short_name}-v{INDEX_FORMAT}-"
    cached = folder / f"{stem}{key}.parquet"
    if cached.exists():
        log.info("%s: unchanged, its index is on disk already", source.short_name)
        return pd.read_parquet(cached)
    known = _read_contents(max(folder.glob(f"{stem}{'?' * 16}.parquet"), key=os.path.getmtime, default=None))
    known_before = len(known)
    with ArchiveReader(archive.path) as reader:
        members = sorted(reader.members, key=lambda member: member.name)
        size = min(SHARD_SIZE, max(DECODED_AT_ONCE, len(members) // (16 * (os.cpu_count() or 1))))
        shards = [members[start : start + size] for start in range(0, len(members), size)]
        rows: list[tuple] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for shard in pool.map(lambda shard: index_members(source, reader, shard, known), shards):
                rows += shard
                if on_progress:
                    on_progress(len(rows), len(members))
        index = pd.DataFrame(rows, columns=COLUMNS).astype({"width": "int32", "height": "int32", "bytes": "int64"})
        _check_labels(source, index, members)
        if source.csv_real_label is not None:
            _check_csv_files(source, reader, index)
    with write_beside(cached) as beside:
        index.to_parquet(beside, index=False)
    unusable = index.loc[index["reason"] != "", "reason"].value_counts().to_dict()
    log.info(
        "%s: %d files, %d decoded now (others are copies, or were known), %d usable images, left out: %s",
        source.short_name,
        len(index),
        len(known) - known_before,
        int((index["reason"] == "").sum()),
        unusable or "none",
    )
    return index


def _read_contents(index: Path | None) -> Contents:
    """Return what an earlier index of the source knows, whatever its labels."""
    if index is None:
        return {}
    rows = pd.read_parquet(index, columns=["sha256", *Content._fields])
    rows = rows[(rows["sha256"] != "") & (rows["reason"] != "no_label")]
    return {row[0]: Content(*row[1:]) for row in rows.itertuples(index=False, name=None)}


def index_members(source: Source, reader: ArchiveReader, members: Sequence[Member], known: Contents) -> list[tuple]:
    """Describe some members: a pure function of the archive and their names.

    Args:
        known: saves time only: images whose bytes are known are not decoded again. Receives those that were.
    """
    rows: list[tuple] = []
    name, labels = source.short_name, dict[str, str]()
    for start in range(0, len(members), DECODED_AT_ONCE):
        part = members[start : start + DECODED_AT_ONCE]
        digests, new = [], {}
        for member in part:
            data = b"" if member.problem else reader.read(member)
            digests.append("" if member.problem else hashlib.sha256(data).hexdigest())
            if not member.problem and digests[-1] not in known and digests[-1] not in new:
                new[digests[-1]] = _decode(data)
        known |= _shrink_and_hash(new)
        for member, digest in zip(part, digests, strict=True):
            content = known[digest] if digest else Content(reason=member.problem)
            folder = member.name.rpartition("/")[0]
            label = labels[folder] if folder in labels else labels.setdefault(folder, _label(source, member.name))
            if not label and not content.reason:
                content = content._replace(reason="no_label")
            rows.append((name, member.name, digest, label, *content))
    return rows


def _decode(data: bytes) -> tuple[Content, np.ndarray]:
    """Return what the bytes tell but thumbnail and hash, and grey pixels of shape (h, w) to make those from, if any."""
    header = _read_jpeg_header(data)
    table = header.table if header else ""
    if header and header.is_plain:
        try:
            pixels = simplejpeg.decode_jpeg(data, "GRAY", min_height=SMALLEST_SIDE, min_width=SMALLEST_SIDE)[:, :, 0]
            return Content(header.width, header.height, len(data), "JPEG", table), _reduce(pixels)
        except ValueError:
            pass  # damaged, or of a rare kind: Pillow says which
    try:
        image = decode_image(data)
    except UnreadableImageError as exc:
        return Content(bytes=len(data), jpeg_table=table, reason=exc.reason), NO_PIXELS
    pixels = _reduce(np.asarray(image.convert("L")))
    return Content(image.width, image.height, len(data), image.format or "", table), pixels


def _reduce(pixels: np.ndarray) -> np.ndarray:
    """Average blocks of a large picture's pixels, so that both sides are 256 pixels at most."""
    if max(pixels.shape) <= 4 * SMALLEST_SIDE:
        return pixels
    height, width = (max(1, side // SMALLEST_SIDE) for side in pixels.shape)
    return np.asarray(Image.fromarray(pixels).reduce((width, height)))


def _shrink_and_hash(decoded: dict[str, tuple[Content, np.ndarray]]) -> Contents:
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for digest, (_, pixels) in decoded.items():
        by_shape.setdefault(pixels.shape, []).append(digest)
    contents: Contents = {}
    for shape, digests in by_shape.items():
        if shape == NO_PIXELS.shape:
            contents |= {digest: decoded[digest][0] for digest in digests}
            continue
        thumbnails = shrink_images(np.stack([decoded[digest][1] for digest in digests]))
        for digest, bits, thumbnail in zip(digests, hash_thumbnails(thumbnails), thumbnails, strict=True):
            contents[digest] = Content(*decoded[digest][0][:-2], bits.tobytes(), thumbnail.tobytes())
    return contents


def _read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Read a JPEG's segments up to its first scan; None if it is no JPEG, or a damaged one."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    return _read_jpeg_segments(data[: data.find(b"\xff\xda") + 4]) or _read_jpeg_segments.__wrapped__(data)


@lru_cache(1000)  # images of one encoder and size have the same segments
def _read_jpeg_segments(data: bytes) -> JpegHeader | None:
    at, tables, size, plain = 2, [], b"", True
    while True:
        marker = data[at + 1 : at + 2]
        if data[at : at + 1] == b"\xff" and marker == b"\xda":
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at : at + 1] != b"\xff" or end > len(data) or end < at + 4:
            return None
        if marker == b"\xdb":
            tables.append(data[at + 4 : end])
        elif marker in (b"\xc0", b"\xc1", b"\xc2"):
            size = data[at + 5 : at + 9]
            plain &= data[at + 9 : at + 10] in (b"\x01", b"\x03")
        elif marker == b"\xe1":
            plain &= data[at + 4 : at + 8] != b"Exif"
        at = end
    height, width = int.from_bytes(size[:2], "big"), int.from_bytes(size[2:], "big")
    if not (width and height and tables):
        return None
    return JpegHeader(width, height, _name_table(b"".join(tables)), plain and width * height <= MAX_PIXELS)


@lru_cache(1000)
def _name_table(tables: bytes) -> str:
    """Name quantisation tables by their digest, and by the quality at which libjpeg would write the first."""
    digest = hashlib.sha256(tables).hexdigest()[:6]
    if tables[0] >> 4 or len(tables) < 65:  # 16 bits each, or cut short
        return digest
    percent = 100 * np.frombuffer(tables[1:65], np.uint8).sum() / LUMA_SUM
    quality = (200 - percent) / 2 if percent <= 100 else 5000 / percent
    return f"q{quality:.0f}-{digest}"


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
