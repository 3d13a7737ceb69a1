"""A folder's images, or those of a Parquet file, as a list that can be read in parts."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow
from pyarrow import parquet

from deepfake_core.errors import ConfigurationError
from deepfake_core.serving.file_kinds import find_files, is_clip, list_names
from deepfake_core.serving.predictor import Encoded
from deepfake_core.storage.files import show_name

log = logging.getLogger(__name__)

RULE = "Images must be a folder, or a Parquet file with a column `image` of bytes"

ROWS_READ = 8
"""Images read from a table at a time."""

READ_BYTES = 2**20


@dataclass(frozen=True)
class ImageList:
    """Images in a fixed order.

    Attributes:
        count: how many there are.
        describe: returns a hash of what is known now, without reading them, of those from a position up to another:
            names, bytes and times of change.
        read: yields names and images from a position up to another.
    """

    count: int
    describe: Callable[[int, int], str]
    read: Callable[[int, int], Iterator[tuple[str, Encoded]]]


def list_images(images: Path) -> ImageList:
    """List a folder's images by name, or a Parquet file's rows. A folder's list is kept until `forget_images`.

    Args:
        images: a folder, or a Parquet file with a column `image` of encoded bytes, and `name` if they have names.

    Raises:
        ConfigurationError: if it is neither, is damaged, or is a folder without images.
    """
    return _list_folder(images) if images.is_dir() else _list_table(images)


def forget_images() -> None:
    """Have folders listed anew."""
    _list_folder.cache_clear()


@lru_cache(maxsize=1)
def _list_folder(images: Path) -> ImageList:
    known, others = find_files(images)
    clips = [file for file in known if is_clip(file)]
    files, others = sorted(set(known) - set(clips)), others + clips
    if others:
        log.warning("%s: %d files are no images and are not scored: %s", images, len(others), list_names(others))
    if not files:
        raise ConfigurationError(f"A folder must hold images. Received: {images}, which holds none.")

    def name(file: Path) -> str:
        return show_name(file.relative_to(images))

    def read(start: int, stop: int) -> Iterator[tuple[str, Encoded]]:
        return ((name(file), file) for file in files[start:stop])

    def describe(start: int, stop: int) -> str:
        lines = (f"{name(file)}\0{_describe(file)}\n" for file in files[start:stop])
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    return ImageList(len(files), describe, read)


def _list_table(images: Path) -> ImageList:
    try:
        table = parquet.ParquetFile(images, pre_buffer=False, buffer_size=READ_BYTES)
    except (OSError, pyarrow.ArrowException) as exc:
        raise ConfigurationError(f"{RULE}. Received: {images} ({exc})") from exc
    schema = table.schema_arrow
    kind = schema.field("image").type if schema.names.count("image") == 1 else None
    if kind not in (pyarrow.binary(), pyarrow.large_binary()):
        raise ConfigurationError(f"{RULE}. Received: {images} with the columns {', '.join(map(str, schema))}")
    columns = [name for name in ("image", "name") if name in schema.names]

    def read(start: int, stop: int) -> Iterator[tuple[str, Encoded]]:
        number = 0
        try:
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if number + rows <= start:
                    number += rows
                    continue
                for batch in table.iter_batches(ROWS_READ, [group], columns):
                    before = min(max(0, start - number), len(batch))
                    number += before
                    for row in batch.slice(before, max(0, stop - number)).to_pylist():
                        number += 1
                        yield str(row.get("name") or f"row {number}"), row["image"] or b""
                    if number >= stop:
                        return
        except (OSError, ValueError, pyarrow.ArrowException) as exc:
            raise ConfigurationError(
                f"{RULE}. Received: {images}, which is damaged after row {number:,} ({exc}). Write it again."
            ) from exc

    return ImageList(table.metadata.num_rows, lambda _start, _stop: _describe(images), read)


def _describe(file: Path) -> str:
    """Return a file's bytes and time of change; of one that is gone, nothing."""
    try:
        found = file.stat()
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"
