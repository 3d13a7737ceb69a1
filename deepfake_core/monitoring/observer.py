"""Appends observations to a folder or URL, in a thread of its own."""

import logging
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Self

import pyarrow
from pyarrow import parquet

from deepfake_core.errors import ConfigurationError
from deepfake_core.monitoring.observations import OBSERVATION_SCHEMA, Row, list_rows
from deepfake_core.serving.verdict import Judged
from deepfake_core.storage.files import write_beside
from deepfake_core.storage.store import open_store

log = logging.getLogger(__name__)

ROWS_BETWEEN_WRITES = 1000
SECONDS_BETWEEN_WRITES = 60.0
SECONDS_BETWEEN_WARNINGS = 3600.0
MAX_WAITING_ROWS = 10_000
"""Rows that wait for a disk or store that fails, at most: the newest."""

MAX_ROWS_AT_ONCE = 65_536
"""Rows that are held while a file is written anew."""

MAX_REMEMBERED_IMAGES = 100_000
"""Images of a day that are known when they are judged again."""

MAX_SECONDS_TO_END = 20.0
"""How long the end of a process may wait for a store."""


class Observer:
    """Appends observations, in a thread of its own: what fails there stops no verdict, and warns once an hour.

    Rows are written at the latest after a minute, and at the end. A process that is killed loses those of its last
    minute. Its file is whole. Of a URL, nothing is kept on this disk: a day's file is read, and written anew.

    Args:
        address: folder or URL.

    Raises:
        ConfigurationError: for a malformed URL.
    """

    def __init__(self, address: str) -> None:
        self._store = open_store(address)
        self._name = f"{uuid.uuid4().hex[:16]}.parquet"
        self._rows: list[Row] = []
        self._seen, self._day = set[int](), date.min
        self._warned = -SECONDS_BETWEEN_WARNINGS
        self._lock, self._wake, self._ended = threading.Lock(), threading.Event(), threading.Event()
        self._writer = threading.Thread(target=self._write_often, name="observe", daemon=True)
        self._writer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, judged: Judged) -> None:
        """Observe the verdicts on an image, once a day; return at once."""
        rows = list(list_rows(judged))
        with self._lock:
            if rows and not self._is_repeated(judged.sha256, rows[0]):
                self._rows += rows
            del self._rows[:-MAX_WAITING_ROWS]
            if len(self._rows) >= ROWS_BETWEEN_WRITES:
                self._wake.set()

    def append(self, images: Mapping[str, list[Row]]) -> None:
        """Write rows of images, by SHA-256, and wait for it; each image once a day.

        Raises:
            OSError, DeepfakeError: if they can't be written.
        """
        rows = [row for sha256, own in images.items() if not self._is_repeated(sha256, own[0]) for row in own]
        self.write_rows(rows)

    def _is_repeated(self, sha256: str, row: Row) -> bool:
        """Return whether the same versions judged the image before on this day: it would count as another one."""
        if row["time"].date() != self._day or len(self._seen) >= MAX_REMEMBERED_IMAGES:
            self._seen, self._day = set(), row["time"].date()
        judged = hash((sha256, row["version"], row["shadow_version"]))
        repeated = judged in self._seen
        self._seen.add(judged)
        return repeated

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
                self.write_rows(rows)
            except Exception as exc:  # noqa: BLE001 - whatever fails here, verdicts go on
                self._warn(str(exc))
            with self._lock:
                self._rows = [*rows, *self._rows][-MAX_WAITING_ROWS:]

    def write_rows(self, rows: list[Row]) -> None:
        """Write rows, and remove them from the list once they are written."""
        while rows:
            day = rows[0]["time"].date()
            path = self._store.folder / str(day) / self._name
            some = [row for row in rows if row["time"].date() == day]
            if self._store.url:  # nothing of it stays on this disk
                before, written = self._store.read(path), BytesIO()
                _write_anew(BytesIO(before) if before else None, written, some)
                self._store.write(path, written.getvalue())
            else:
                append_rows(path, some)
            rows[:] = [row for row in rows if row["time"].date() != day]

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
    with write_beside(path) as beside:
        _write_anew(path if path.exists() else None, beside, rows)


def _write_anew(before: Path | BytesIO | None, written: Path | BytesIO, rows: Iterable[Row]) -> None:
    with parquet.ParquetWriter(written, OBSERVATION_SCHEMA, write_page_checksum=True) as writer:
        if before:
            with parquet.ParquetFile(before) as file:
                for batch in file.iter_batches(MAX_ROWS_AT_ONCE):
                    writer.write_batch(batch)
        writer.write_table(pyarrow.Table.from_pylist(list(rows), OBSERVATION_SCHEMA))
