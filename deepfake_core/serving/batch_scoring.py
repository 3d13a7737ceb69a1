"""From a folder or a table of images to a table of scores, in shards of some hundred images each.

A shard's rows are a Parquet file, named by all that they follow from: the images, who judges them, and the range. It
appears whole, so that the next run goes on where one was killed. Beside it lies what was observed of its verdicts.
"""

import hashlib
import logging
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow
from pyarrow import compute, parquet

from deepfake_core.errors import ConfigurationError
from deepfake_core.monitoring.observations import OBSERVATION_SCHEMA, list_rows
from deepfake_core.monitoring.observer import Observer
from deepfake_core.serving.image_list import forget_images, list_images
from deepfake_core.serving.load_versions import Judge
from deepfake_core.serving.predictor import NO_FACE, Predictor
from deepfake_core.serving.verdict import Judged
from deepfake_core.storage.files import translate_disk_errors, write_beside

log = logging.getLogger(__name__)

SHARD_IMAGES = 500

ROWS_WRITTEN = 5000
"""Rows of scores that are kept before they are written."""

SCORES_FORMAT = 1
"""Raised when a shard's rows change for the same images and version."""

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

OBSERVED_SCHEMA = OBSERVATION_SCHEMA.append(pyarrow.field("sha256", pyarrow.string()))


@dataclass(frozen=True)
class ScoredTable:
    """What a table of scores holds.

    Attributes:
        digest: a hash of the images' bytes, whatever their names and order.
        outcomes: rows by `real`, `fake`, `no face` and `unreadable`; and of all, those `marked as not sure`.
    """

    images: int
    digest: str
    outcomes: dict[str, int]


@dataclass(frozen=True)
class ScoreShard:
    """The images from `start` up to `stop` of a list.

    Attributes:
        images: a folder or a Parquet file.
        key: what was known of these images when the list was cut.
        folder: of the shards' files.
    """

    images: Path
    key: str
    judge: Judge
    folder: Path
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.images.name} {self.start}-{self.stop}"

    @property
    def file(self) -> Path:
        return self.folder / f"{self.start:010}-{self.stop:010}.parquet"

    @property
    def observed(self) -> Path:
        return self.file.with_suffix(".observed")

    @property
    def is_done(self) -> bool:
        return self.file.is_file()


def place_shards(output: Path) -> Path:
    """Return the folder of what is finished of a table: beside it, so that all machines see both."""
    return output.with_name(f"{output.name}.shards")


def cut_images(images: Path, output: Path, judge: Judge) -> list[ScoreShard]:
    """Return the shards of a folder's images, or a Parquet file's; at least one.

    Args:
        images: a folder, or a Parquet file with a column `image` of encoded bytes, and `name` if they have names.
        output: the table that the shards become.

    Raises:
        ConfigurationError: if `images` is neither, is damaged, or is a folder without images.
    """
    forget_images()
    listed = list_images(images)
    ranges = [
        (start, min(start + SHARD_IMAGES, listed.count)) for start in range(0, max(listed.count, 1), SHARD_IMAGES)
    ]
    keys = [listed.describe(*one) for one in ranges]
    follows = [SCORES_FORMAT, *keys, judge.version, judge.digest, judge.detect, judge.shadow, judge.observed]
    name = hashlib.sha256("\n".join(map(str, follows)).encode()).hexdigest()[:16]
    folder = place_shards(output) / name
    with translate_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return [ScoreShard(images, key, judge, folder, *one) for key, one in zip(keys, ranges, strict=True)]


def score_shard(shard: ScoreShard, threads: int = 0) -> None:
    """Judge a shard's images and write a row per face, unless that is done.

    Args:
        threads: that score; 0 for a thread per core.

    Raises:
        ConfigurationError: if this machine does not see the images or the shards' folder, or the images are others.
    """
    if shard.is_done:
        return
    if not shard.folder.is_dir():
        raise ConfigurationError(
            f"Each machine that scores must see the folder of `output` at the same path. Received: "
            f"{socket.gethostname()}, which has no {shard.folder}. Put it on a disk that all nodes of `cluster` share."
        )
    _check_images(shard)
    rows: list[dict[str, object]] = []
    observed: list[dict[str, object]] = []
    predictor = load_predictor(shard.judge, threads)
    for judged in predictor.judge(list_images(shard.images).read(shard.start, shard.stop)):
        rows += _list_rows(judged)
        if shard.judge.observed:
            observed += ({**row, "sha256": judged.sha256} for row in list_rows(judged))
    _check_images(shard)
    if observed:
        with write_beside(shard.observed) as beside:
            parquet.write_table(pyarrow.Table.from_pylist(observed, OBSERVED_SCHEMA), beside)
    with write_beside(shard.file) as beside:
        parquet.write_table(pyarrow.Table.from_pylist(rows, SCORES_SCHEMA), beside)


def _check_images(shard: ScoreShard) -> None:
    if list_images(shard.images).describe(shard.start, shard.stop) != shard.key:
        raise ConfigurationError(
            f"Images must stay as they are while they are scored. Received: {shard.images}, where some changed, or are "
            f"others on {socket.gethostname()}. Run again: all are scored anew."
        )


@lru_cache(maxsize=1)
def load_predictor(judge: Judge, threads: int) -> Predictor:
    """Load a version once in a process. `load_predictor.cache_clear` lets it go."""
    return judge.load(threads)


def join_shards(shards: Sequence[ScoreShard], output: Path, observer: Observer | None = None) -> ScoredTable:
    """Write the table of finished shards, then what was observed of them, in bounded memory.

    Args:
        output: the Parquet file to write, which appears when it is whole: `image`, `sha256`, `face` (1 for the largest,
            null where the whole image was judged), `box`, `label`, `fake_probability`, `threshold`, `sure`, `reason`,
            `error`.
    """
    counts: Counter[str] = Counter()
    digests: list[bytes] = []
    waiting: list[pyarrow.Table] = []
    with write_beside(output) as beside, parquet.ParquetWriter(beside, SCORES_SCHEMA) as writer:
        for shard in shards:
            with parquet.ParquetFile(shard.file) as file:
                rows = file.read()
            counts.update(_count_outcomes(rows))
            first = compute.less_equal(compute.fill_null(rows["face"], 1), 1)  # an image's rows follow each other
            digests += (digest.encode() for digest in rows["sha256"].filter(first).to_pylist())
            waiting.append(rows)
            if sum(map(len, waiting)) >= ROWS_WRITTEN:
                writer.write_table(pyarrow.concat_tables(waiting).combine_chunks())
                waiting = []
        writer.write_table(pyarrow.concat_tables([SCORES_SCHEMA.empty_table(), *waiting]).combine_chunks())
    if observer:
        _observe(shards, observer)
    digest = hashlib.sha256(b"\n".join(sorted(digests))).hexdigest()[:16]
    return ScoredTable(len(digests), digest, dict(counts))


def _count_outcomes(rows: pyarrow.Table) -> Counter[str]:
    outcomes = zip(rows["label"].to_pylist(), rows["error"].to_pylist(), strict=True)
    counts = Counter(label or ("no face" if error == NO_FACE else "unreadable") for label, error in outcomes)
    if len(known := rows["sure"].drop_null()):  # of a version without bounds none is
        counts["marked as not sure"] = compute.sum(compute.invert(known)).as_py()
    return counts


def _observe(shards: Sequence[ScoreShard], observer: Observer) -> None:
    """Append what was observed of shards, and remove each file that is appended. What fails here is a warning.

    A run that is killed between the two appends a shard's rows again the next time.
    """
    for shard in shards:
        if not shard.observed.is_file():
            continue
        rows: dict[str, list[dict[str, object]]] = {}
        with parquet.ParquetFile(shard.observed) as file:
            found = file.read().to_pylist()
        for row in found:
            rows.setdefault(str(row.pop("sha256")), []).append(row)
        try:
            observer.append(rows)
        except Exception as exc:  # noqa: BLE001 - whatever fails here, the scores are there
            log.warning("observations of %s can't be written: %s", shard, exc)
        else:
            shard.observed.unlink()


def _list_rows(judged: Judged) -> Iterator[dict[str, object]]:
    for verdict in judged.verdicts:
        row = verdict.as_row()
        yield {name: judged.sha256 if name == "sha256" else row[name] for name in SCORES_SCHEMA.names}
