"""An archive becomes an image index: one row per file, read straight from the zip.

Each image is read and decoded once, and gives everything that later stages ask of it. Columns:

- `source, member`: where it is; `sha256`: of its bytes; `label`: real or fake, by its folder;
- `width, height`: in pixels, upright; `bytes`: size of the file; `format`: JPEG, PNG or WEBP;
- `jpeg_table`: the quantisation tables' name, with the quality that libjpeg would call them; empty if no JPEG;
- `reason`: empty for images that can be used, and says why not for all other files, each of which has a row;
- `thumbnail`: 32 x 32 grey pixels (1,024 bytes), and `hash`: 256 bits made from it (32 bytes), see `hashes`.
"""

import builtins
import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import simplejpeg
from PIL import Image

from deepfake_core.config import Source
from deepfake_core.data.archive import Archive, ArchiveReader
from deepfake_core.data.hashes import hash_thumbnails, shrink_images
from deepfake_core.data.jpeg_header import read_jpeg_header
from deepfake_core.data.labels import check_csv_files, check_labels, name_label
from deepfake_core.data.members import UNREADABLE, Member
from deepfake_core.decoding import (
    BYTES_PER_PIXEL,
    DECODING,
    MAX_BYTES,
    MemoryBudget,
    UnreadableImageError,
    check_scans,
    open_image,
)
from deepfake_core.storage.files import write_beside
from deepfake_core.storage.progress import Progress
from deepfake_core.storage.store import Store

log = logging.getLogger(__name__)

INDEX_FORMAT = 5
"""Part of the cache's name: raise it when the same archive would give another index."""

SHARD_SIZE = 2000
DECODED_AT_ONCE = 128
"""Images of a shard that are in memory before they are shrunk, of 256 x 256 pixels at most."""

MIN_DECODED_PIXELS = 64
"""JPEGs are decoded at the smallest of libjpeg's scales that leaves this many pixels a side."""

READING = MemoryBudget(2 * MAX_BYTES)
"""Memory of files from when they are read until they are decoded; `DECODING` is asked for after it, never before."""

NO_PIXELS = np.empty((0, 0), np.uint8)


class Content(NamedTuple):
    """What follows from an image's bytes alone: the columns from `width` on."""

    width: int = 0
    height: int = 0
    bytes: int = 0
    format: str = ""
    jpeg_table: str = ""
    reason: str = ""
    hash: builtins.bytes = b""
    thumbnail: builtins.bytes = b""


INDEX_COLUMNS = ["source", "member", "sha256", "label", *Content._fields]
Contents = dict[str, Content]
"""By the SHA-256 of the bytes."""


def build_index(archive: Archive, store: Store, on_progress: Progress | None = None) -> pd.DataFrame:
    """Describe every file of an archive; an archive that was indexed before is not read again,
    unless a file could not be read.

    Of a changed archive, only images whose bytes were not in the source's last index are decoded.

    Returns:
        One row per file, ordered by member name. See the module for the columns.

    Raises:
        DatasetError: if no image has a label, or a csv file and the folders disagree on one.
    """
    source = archive.source
    rule = source.model_dump_json(include={"real_folder", "fake_folder", "csv_real_label", "follow_links"})
    key = hashlib.sha256(f"{archive.sha256} {rule}".encode()).hexdigest()[:16]
    prefix = f"{source.short_name}-v{INDEX_FORMAT}-"
    cached = store.indexes() / f"{prefix}{key}.parquet"
    if cached.exists() and not (index := pd.read_parquet(cached))["reason"].eq(UNREADABLE).any():
        log.info("%s: unchanged, its index is on disk already", source.short_name)
        return index
    known = _read_contents(find_newest_index(store, prefix))
    known_before = len(known)
    with archive.open() as reader:
        members = sorted(reader.members, key=lambda member: member.name)
        size = min(SHARD_SIZE, max(DECODED_AT_ONCE, len(members) // (16 * (os.cpu_count() or 1))))
        shards = [members[start : start + size] for start in range(0, len(members), size)]
        rows: list[tuple] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for shard in pool.map(lambda shard: index_members(source, reader, shard, known), shards):
                rows += shard
                if on_progress:
                    on_progress(len(rows), len(members))
        index = pd.DataFrame(rows, columns=INDEX_COLUMNS).astype(
            {"width": "int32", "height": "int32", "bytes": "int64"}
        )
        check_labels(source, index, members)
        if source.csv_real_label is not None:
            check_csv_files(source, reader, index)
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


def find_newest_index(store: Store, prefix: str) -> Path | None:
    """Return the table of a name and format that was written last; `prefix` is both."""
    name = re.compile(re.escape(prefix) + r"[0-9a-f]{16}\.parquet")
    indexes = [path for path in store.indexes().glob("*.parquet") if name.fullmatch(path.name)]
    return max(indexes, key=os.path.getmtime, default=None)


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
    name = source.short_name
    name_folder = cache(lambda folder: name_label(source, folder))
    for start in range(0, len(members), DECODED_AT_ONCE):
        part = members[start : start + DECODED_AT_ONCE]
        digests, new = [], {}
        for member in part:
            with READING.hold(member.size):
                data = _read(reader, member)
                digests.append("" if data is None else hashlib.sha256(data).hexdigest())
                if data is not None and digests[-1] not in known and digests[-1] not in new:
                    new[digests[-1]] = decode(data)
        known |= _shrink_and_hash(new)
        for member, digest in zip(part, digests, strict=True):
            content = known[digest] if digest else Content(reason=member.problem or UNREADABLE)
            label = name_folder(member.name.rpartition("/")[0])
            if not label and not content.reason:
                content = content._replace(reason="no_label")
            rows.append((name, member.name, digest, label, *content))
    return rows


def _read(reader: ArchiveReader, member: Member) -> bytes | None:
    with contextlib.suppress(OSError):  # of a folder's file, which is gone or can't be read
        return None if member.problem else reader.read(member)
    return None


def decode(data: bytes) -> tuple[Content, np.ndarray]:
    """Return an image's content without thumbnail and hash, and grey pixels (h, w), if any, to make those from."""
    header = read_jpeg_header(data)
    table = header.table if header else ""
    if header and header.is_plain:
        try:
            area = header.width * header.height
            check_scans(data, area)
            with DECODING.hold(area * BYTES_PER_PIXEL["JPEG"]):
                pixels = simplejpeg.decode_jpeg(
                    data, "GRAY", min_height=MIN_DECODED_PIXELS, min_width=MIN_DECODED_PIXELS
                )
                return Content(header.width, header.height, len(data), "JPEG", table), _reduce(pixels[:, :, 0])
        except ValueError:
            pass  # damaged, or of a rare kind: Pillow raises the exact error
    try:
        with open_image(data) as image:
            content = Content(image.width, image.height, len(data), image.format or "", table)
            return content, _reduce(np.asarray(image.convert("L")))
    except UnreadableImageError as exc:
        return Content(bytes=len(data), jpeg_table=table, reason=exc.reason), NO_PIXELS


def _reduce(pixels: np.ndarray) -> np.ndarray:
    """Average blocks of a large picture's pixels, so that both sides are 256 pixels at most."""
    if max(pixels.shape) <= 4 * MIN_DECODED_PIXELS:
        return pixels
    height, width = (max(1, side // MIN_DECODED_PIXELS) for side in pixels.shape)
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
