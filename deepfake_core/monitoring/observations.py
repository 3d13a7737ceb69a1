"""Observations: what a version said of each face, and what was measured of it. No pixels, no names.

A folder, or a URL, holds a folder for each day (UTC) and in it a Parquet file for each process that observed. Clips are
not observed: the test split, with which observations are compared, has none.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
from pyarrow import parquet

from deepfake_core.serving.verdict import Judged
from deepfake_core.storage.store import Store, open_store

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

OBSERVATION_SCHEMA = pyarrow.schema(
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

DIGITS = 3
"""Of a stored measure, behind the point: with all of them, whoever has a picture would find its row."""

DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
OBSERVATION_FILE = re.compile(r"[0-9a-f]{16}\.parquet|\.[0-9a-f]{16}\.parquet\.\d+")
"""The second is a file that a killed process left half written."""

Row = dict[str, Any]


def list_rows(judged: Judged) -> Iterator[Row]:
    """Yield a row by `OBSERVATION_SCHEMA` for each verdict on an image that has a label."""
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
            "probability": _round(verdict.fake_probability),
            "sure": verdict.sure,
            "side": seen.quality.side,
            "sharpness": _round(seen.quality.sharpness),
            "jpeg_quality": _round(seen.quality.jpeg_quality),
            "width": seen.width,
            "height": seen.height,
            "shadow_version": seen.shadow_version,
            "shadow_probability": _round(seen.shadow_probability),
            "shadow_fake": seen.shadow_fake,
        }


def _round(value: float | None) -> float | None:
    return None if value is None else round(float(value), DIGITS)


def read_window(address: str, since: datetime, until: datetime) -> "pd.DataFrame":
    """Return the observations of a time, from `since` on and before `until`, by `OBSERVATION_SCHEMA`.

    A file that is none of ours, or is damaged, is left out, with a warning.

    Raises:
        ConfigurationError, CredentialsError, DownloadError: if a store can't be used.
    """
    store = open_store(address)
    tables = [OBSERVATION_SCHEMA.empty_table()]
    for day in _list_days(store):
        if since.date() <= date.fromisoformat(day) <= until.date():
            tables += _read_day(store, day)
    found = pyarrow.concat_tables(tables).to_pandas()
    return found[(found["time"] >= since) & (found["time"] < until)].reset_index(drop=True)


def read_recent(address: str, days: int, version: str) -> "pd.DataFrame":
    """Return what was observed of a version in the last days, as `read_window` does.

    Args:
        version: name/number.
    """
    now = datetime.now(UTC)
    found = read_window(address, now - timedelta(days=days), now)
    own = found[found["version"] == version]
    log.info("%d observations, %d of them of %s", len(found), len(own), version)
    return own


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
        if path.name.startswith("."):
            continue
        data = store.read(path) if store.url else path.read_bytes()
        try:
            file = pyarrow.BufferReader(data or b"")
            table = parquet.read_table(file, columns=OBSERVATION_SCHEMA.names, page_checksum_verification=True).cast(
                OBSERVATION_SCHEMA
            )
            table.validate(full=True)
        except (OSError, ValueError, pyarrow.ArrowException) as exc:
            log.warning("%s holds no observations and is left out: %s", store.address_of(path), exc)
        else:
            yield table


def list_old_days(store: Store, keep_days: int) -> list[str]:
    """Return the days of which no observation is needed any more."""
    first = str(datetime.now(UTC).date() - timedelta(days=keep_days))
    return [day for day in _list_days(store) if day < first and list_day(store, day)]


def list_day(store: Store, day: str) -> list[Path]:
    """Return the files of observations of a day, also half-written ones, and no other that may lie there."""
    folder = store.folder / day
    names = store.list_names(folder) if store.url else sorted(path.name for path in folder.iterdir())
    return [folder / name for name in names if OBSERVATION_FILE.fullmatch(name)]


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
