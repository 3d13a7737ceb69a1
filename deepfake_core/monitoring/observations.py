"""Observations: what a version said of each face, and what was measured of it. No pixels, no names.

A folder, or a URL, holds a folder for each day (UTC) and in it a Parquet file for each process that observed. Clips are
not observed: the test split, with which observations are compared, has none.
"""

import logging
import re
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow
from pyarrow import parquet

from deepfake_core.errors import ConfigurationError
from deepfake_core.serving.verdict import Judged
from deepfake_core.storage.files import write_beside
from deepfake_core.storage.store import Store, open_store

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

SCHEMA = pyarrow.schema(
    [
        ("time", pyarrow.timestamp("us", tz="UTC")),
        ("version", pyarrow.string()),
        ("face", pyarrow.int32()),
        ("fake", pyarrow.bool_()),
        ("probability", pyarrow.float64()),
        ("sure", pyarrow.bool_()),
        ("side", pyarrow.float64()),
        ("sharpness", pyarrow.float64()),
        ("jpeg_quality", pyarrow.float64()),
        ("width", pyarrow.int32()),
        ("height", pyarrow.int32()),
        ("shadow_version", pyarrow.string()),
        ("shadow_probability", pyarrow.float64()),
        ("shadow_fake", pyarrow.bool_()),
    ]
)
"""`version` is name/number, empty for a model from a folder; `face` is 1 for the largest, null for a whole image."""

ROWS_BETWEEN_WRITES = 1000
SECONDS_BETWEEN_WRITES = 60.0
SECONDS_BETWEEN_WARNINGS = 3600.0
MAX_WAITING_ROWS = 10_000
"""Rows that wait for a disk or store that fails, at most: the newest."""

MAX_ROWS_AT_ONCE = 65_536
"""Rows that are held while a file is written anew."""

MAX_SECONDS_TO_END = 20.0
"""How long the end of a process may wait for a store."""

DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
OURS = re.compile(r"[0-9a-f]{16}\.parquet")

Row = dict[str, Any]


def list_rows(judged: Judged) -> Iterator[Row]:
    """Yield a row by `SCHEMA` for each verdict on an image that has a label."""
    now = datetime.now(UTC)
    for verdict in judged.verdicts:
        seen = verdict.observed
        if seen is None:
            continue
        yield {
            "time": now,
            "version": seen.version,
            "face": verdict.face,
            "fake": verdict.label == "fake",
            "probability": verdict.fake_probability,
            "sure": verdict.sure,
            "side": seen.measured.side,
            "sharpness": seen.measured.sharpness,
            "jpeg_quality": seen.measured.jpeg_quality,
            "width": seen.width,
            "height": seen.height,
            "shadow_version": seen.shadow_version,
            "shadow_probability": seen.shadow_probability,
            "shadow_fake": seen.shadow_fake,
        }


class Observer:
    """Appends observations, in a thread of its own: what fails there stops no verdict, and warns once an hour.

    Rows are written at the latest after a minute, and at the end. A process that is killed loses those of its last
    minute. Its file is whole.

    Args:
        address: folder or URL.

    Raises:
        ConfigurationError: for a malformed URL.
    """

    def __init__(self, address: str) -> None:
        self._store = open_store(address, "--observe")
        self._name = f"{uuid.uuid4().hex[:16]}.parquet"
        self._rows: list[Row] = []
        self._unpublished: set[Path] = set()
        self._warned = -SECONDS_BETWEEN_WARNINGS
        self._lock, self._wake, self._ended = threading.Lock(), threading.Event(), threading.Event()
        self._writer = threading.Thread(target=self._write_often, name="observe", daemon=True)
        self._writer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, judged: Judged) -> None:
        """Observe the verdicts on an image; return at once."""
        with self._lock:
            self._rows += list_rows(judged)
            del self._rows[:-MAX_WAITING_ROWS]
            if len(self._rows) >= ROWS_BETWEEN_WRITES:
                self._wake.set()

    def close(self) -> None:
        """Write what waits, and end."""
        self._ended.set()
        self._wake.set()
        self._writer.join(MAX_SECONDS_TO_END)
        if self._writer.is_alive():
            self._warn(f"it did not answer within {MAX_SECONDS_TO_END:g} s")

    def _write_often(self) -> None:
        ended = False
        while not ended:
            self._wake.wait(SECONDS_BETWEEN_WRITES)
            self._wake.clear()
            ended = self._ended.is_set()
            with self._lock:
                rows, self._rows = self._rows, []
            try:
                self._write(rows)
            except Exception as exc:  # noqa: BLE001 - whatever fails here, verdicts go on
                self._warn(str(exc))
            with self._lock:
                self._rows = [*rows, *self._rows][-MAX_WAITING_ROWS:]

    def _write(self, rows: list[Row]) -> None:
        """Write rows, and remove them from the list once they are on this disk; then publish them."""
        while rows:
            day = rows[0]["time"].date()
            path = self._store.folder / str(day) / self._name
            append_rows(path, [row for row in rows if row["time"].date() == day])
            rows[:] = [row for row in rows if row["time"].date() != day]
            if self._store.url:
                self._unpublished.add(path)
        for path in sorted(self._unpublished):
            self._store.publish(path)
            self._unpublished.remove(path)
            if self._ended.is_set() or path.parent.name != str(datetime.now(UTC).date()):
                path.unlink()

    def _warn(self, why: str) -> None:
        if time.monotonic() - self._warned >= SECONDS_BETWEEN_WARNINGS:
            self._warned = time.monotonic()
            log.warning(
                "observations can't be written to %s, verdicts go on; the newest %s are kept for later: %s",
                self._store.address,
                f"{MAX_WAITING_ROWS:,}",
                why,
            )


def open_observer(address: str, shadow: bool = False) -> AbstractContextManager[Observer | None]:
    """Return what observes verdicts at a folder or URL, for a `with` statement; nothing for an empty address.

    Raises:
        ConfigurationError: for a malformed URL; or if a shadow, whose verdicts are only observed, has no address.
    """
    if shadow and not address:
        raise ConfigurationError(
            "A shadow's verdicts are only observed: --shadow needs --observe. Received: no folder or URL for them."
        )
    return Observer(address) if address else nullcontext()


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a Parquet file anew with more rows, whole or not at all."""
    with write_beside(path) as beside, parquet.ParquetWriter(beside, SCHEMA) as writer:
        if path.exists():
            with parquet.ParquetFile(path) as before:
                for batch in before.iter_batches(MAX_ROWS_AT_ONCE):
                    writer.write_batch(batch)
        writer.write_table(pyarrow.Table.from_pylist(list(rows), SCHEMA))


def read_window(address: str, since: datetime, until: datetime) -> "pd.DataFrame":
    """Return the observations of a time, from `since` on and before `until`, by `SCHEMA`.

    A file that is none of ours is left out, with a warning.

    Raises:
        ConfigurationError, CredentialsError, DownloadError: if a store can't be used.
    """
    store = open_store(address, "`watch.observations`")
    tables = [SCHEMA.empty_table()]
    for day in _list_days(store):
        if since.date() <= date.fromisoformat(day) <= until.date():
            tables += _read_day(store, day)
    found = pyarrow.concat_tables(tables).to_pandas()
    return found[(found["time"] >= since) & (found["time"] < until)].reset_index(drop=True)


def _list_days(store: Store) -> list[str]:
    if store.url:
        found = store.list_names(store.folder)
    else:
        found = sorted(path.name for path in store.folder.iterdir()) if store.folder.is_dir() else []
    return [name for name in found if _is_day(name)]


def _is_day(name: str) -> bool:
    try:
        return bool(DAY.fullmatch(name) and date.fromisoformat(name))
    except ValueError:
        return False


def _read_day(store: Store, day: str) -> Iterator[pyarrow.Table]:
    for path in list_day(store, day):
        try:
            data = store.read(path) if store.url else path.read_bytes()
            yield parquet.read_table(pyarrow.BufferReader(data or b""), columns=SCHEMA.names).cast(SCHEMA)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowKeyError, ValueError) as exc:
            log.warning("%s holds no observations and is left out: %s", store.address_of(path), exc)


def list_old_days(store: Store, keep_days: int) -> list[str]:
    """Return the days of which no observation is needed any more."""
    first = str(datetime.now(UTC).date() - timedelta(days=keep_days))
    return [day for day in _list_days(store) if day < first]


def list_day(store: Store, day: str) -> list[Path]:
    """Return the files of observations of a day, and no other that may lie there."""
    folder = store.folder / day
    names = store.list_names(folder) if store.url else sorted(path.name for path in folder.iterdir())
    return [folder / name for name in names if OURS.fullmatch(name)]


def remove_day(store: Store, day: str) -> None:
    """Remove the observations of a day, and nothing else that may lie there."""
    for path in list_day(store, day):
        if store.url:
            store.remove(path)
        else:
            path.unlink()
    if not store.url:
        with suppress(OSError):  # others' files are there
            (store.folder / day).rmdir()
