"""From a folder or a table of images to a table of scores."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from pyarrow import parquet

from deepfake_core.errors import ConfigurationError
from deepfake_core.monitoring.observer import Observer
from deepfake_core.serving.file_kinds import find_files, is_clip, list_names
from deepfake_core.serving.predictor import Encoded, Predictor
from deepfake_core.serving.verdict import Judged
from deepfake_core.storage.files import show_name, write_beside
from deepfake_core.storage.progress import Progress

log = logging.getLogger(__name__)

ROWS_READ = 8
"""Images read from a table at a time."""

ROWS_WRITTEN = 5000
"""Rows of scores that are kept before they are written."""

SCORES_SCHEMA = pyarrow.schema(
    [
        ("image", pyarrow.string()),
        ("sha256", pyarrow.string()),
        ("face", pyarrow.int32()),
        ("box", pyarrow.list_(pyarrow.int32())),
        ("label", pyarrow.string()),
        ("fake_probability", pyarrow.float64()),
        ("threshold", pyarrow.float64()),
        ("sure", pyarrow.bool_()),
        ("reason", pyarrow.string()),
        ("error", pyarrow.string()),
    ]
)


@dataclass(frozen=True)
class ScoredTable:
    """What a table of scores holds.

    Attributes:
        digest: a hash of the images' bytes, whatever their names and order.
        outcomes: rows by `real`, `fake`, `no face` and `unreadable`.
    """

    images: int
    digest: str
    outcomes: dict[str, int]


def score_images(
    predictor: Predictor,
    images: Path,
    output: Path,
    on_progress: Progress | None = None,
    observer: Observer | None = None,
) -> ScoredTable:
    """Judge a folder's images, or a Parquet file's, and write a row per face, in bounded memory.

    Args:
        images: a folder, or a Parquet file with a column `image` of encoded bytes, and `name` if they have names.
        output: the Parquet file to write, which appears when it is whole: `image`, `sha256`, `face` (1 for the largest,
            null where the whole image was judged), `box`, `label`, `fake_probability`, `threshold`, `sure`, `reason`,
            `error`.
        observer: of the verdicts.

    Raises:
        ConfigurationError: if `images` is neither, is damaged, or is a folder without images.
    """
    total, sources = _open(images)
    counts: Counter[str] = Counter()
    hashes: list[str] = []
    rows: list[dict[str, object]] = []
    with write_beside(output) as beside, parquet.ParquetWriter(beside, SCORES_SCHEMA) as writer:
        for done, judged in enumerate(predictor.judge(sources()), 1):
            hashes.append(judged.sha256)
            counts.update(verdict.outcome for verdict in judged.verdicts)
            if observer:
                observer.add(judged)
            rows += _list_rows(judged)
            if len(rows) >= ROWS_WRITTEN:
                writer.write_table(pyarrow.Table.from_pylist(rows, SCORES_SCHEMA))
                rows = []
            if on_progress:
                on_progress(done, total)
        writer.write_table(pyarrow.Table.from_pylist(rows, SCORES_SCHEMA))
    digest = hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()[:16]
    return ScoredTable(len(hashes), digest, dict(counts))


def _open(images: Path) -> tuple[int, Callable[[], Iterator[tuple[str, Encoded]]]]:
    if images.is_dir():
        known, others = find_files(images)
        clips = [file for file in known if is_clip(file)]
        files, others = sorted(set(known) - set(clips)), others + clips
        if others:
            log.warning("%s: %d files are no images and are not scored: %s", images, len(others), list_names(others))
        if not files:
            raise ConfigurationError(f"A folder must hold images. Received: {images}, which holds none.")
        return len(files), lambda: ((show_name(file.relative_to(images)), file) for file in files)
    rule = "Images must be a folder, or a Parquet file with a column `image` of bytes"
    try:
        table = parquet.ParquetFile(images)
    except (OSError, pyarrow.ArrowException) as exc:
        raise ConfigurationError(f"{rule}. Received: {images} ({exc})") from exc
    schema = table.schema_arrow
    kind = schema.field("image").type if schema.names.count("image") == 1 else None
    if kind not in (pyarrow.binary(), pyarrow.large_binary()):
        raise ConfigurationError(f"{rule}. Received: {images} with the columns {', '.join(map(str, schema))}")
    columns = [name for name in ("image", "name") if name in schema.names]

    def read() -> Iterator[tuple[str, Encoded]]:
        number = 0
        try:
            for batch in table.iter_batches(ROWS_READ, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield str(row.get("name") or f"row {number}"), row["image"] or b""
        except (OSError, ValueError, pyarrow.ArrowException) as exc:
            raise ConfigurationError(
                f"{rule}. Received: {images}, which is damaged after row {number:,} ({exc}). Write it again."
            ) from exc

    return table.metadata.num_rows, read


def _list_rows(judged: Judged) -> Iterator[dict[str, object]]:
    for verdict in judged.verdicts:
        row = verdict.as_row()
        yield {name: judged.sha256 if name == "sha256" else row[name] for name in SCORES_SCHEMA.names}
