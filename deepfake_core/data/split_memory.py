"""The split of every image that any version held, so that an image stays in its split permanently."""

import itertools
import logging
import re
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepfake_core.config import FEEDBACK
from deepfake_core.data.reported_images import name_pictures
from deepfake_core.storage.files import hash_file, write_beside
from deepfake_core.storage.store import Store

log = logging.getLogger(__name__)

COLUMNS = ["sha256", "split"]
ROWS_AT_ONCE = 100_000


def read_memory(store: Store) -> dict[str, str]:
    """Return the split of every image that any version in this store held, by SHA-256.

    Images of a group that were left out as copies are remembered too: should the kept one leave its source, they take
    its place. Where the store is at a URL, what other machines remembered is fetched first.
    """
    memory = _read_table(store.split_memory())
    return memory | _fetch_memory(store) if store.url else memory


def remember_splits(rows: pd.DataFrame, store: Store) -> None:
    """Add the images of `rows`, with `group`, `kept` and `split`, to what this machine remembers."""
    left_out = ~rows["kept"] & (rows["group"] != "")
    held = rows.loc[rows["kept"] & rows["group"].isin(rows.loc[left_out, "group"])].drop_duplicates("group")
    splits = rows["split"].where(rows["kept"])
    of_groups = rows.loc[left_out, "group"].map(held.set_index("group")["split"])
    splits[left_out] = of_groups.astype(splits.dtype)  # of none, pandas would make numbers
    now = pa.array(splits.astype("str"))
    reported = (rows["source"] == FEEDBACK).to_numpy()
    sent = pa.array(name_pictures(rows[reported]).astype("str"))
    columns = ([pa.array(rows["sha256"].astype("str")), sent], [now, now.filter(pa.array(reported))])
    found = pa.table([pa.chunked_array([part for part in column if len(part)]) for column in columns], COLUMNS)
    path = store.split_memory()
    table = found
    if path.exists():
        known = pq.read_table(path, columns=COLUMNS).cast(found.schema)
        if pc.all(pc.is_in(found.drop_null()["sha256"], known["sha256"].combine_chunks())).as_py():
            return
        table = pa.concat_tables([known, found])
    table = table.combine_chunks()
    order = pc.sort_indices(table["sha256"])  # stable: of one image, what was known comes first
    order = order.filter(table["split"].is_valid().combine_chunks().take(order))
    with write_beside(path) as beside, pq.ParquetWriter(beside, table.schema) as writer:
        before = None
        for start in range(0, len(order), ROWS_AT_ONCE):
            part = table.take(order[start : start + ROWS_AT_ONCE])
            names = [before, *part["sha256"].to_pylist()]
            writer.write_table(part.filter([name != last for last, name in itertools.pairwise(names)]))
            before = names[-1]


def share_memory(store: Store) -> None:
    """Add what this machine remembers and the URL does not. Nothing is overwritten, so nothing can be lost."""
    known = _fetch_memory(store)
    new = {image: split for image, split in _read_table(store.split_memory()).items() if image not in known}
    if not new:
        return
    folder = store.shared_memory()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        path = Path(file.name)
        _write_table(new, path)
        store.publish(folder / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{hash_file(path)}.parquet", path)
    log.info("the splits of %d new images are published at %s", len(new), store.url)


def _fetch_memory(store: Store) -> dict[str, str]:
    """Return what all machines remember.

    Each adds files, named by time and SHA-256. Of two splits of an image, the earlier counts.
    """
    memory: dict[str, str] = {}
    for name in store.list_names(store.shared_memory()):
        if found := re.fullmatch(r"\d{8}T\d{6}Z-([0-9a-f]{64})\.parquet", name, re.ASCII):
            file = store.shared_memory() / name
            if not file.exists():
                store.fetch(file, found[1], marker=file)
            memory = _read_table(file) | memory
    return memory


def _read_table(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    memory = pd.read_parquet(path)
    return dict(zip(memory["sha256"], memory["split"], strict=True))


def _write_table(memory: Mapping[str, str], path: Path) -> None:
    pd.DataFrame(sorted(memory.items()), columns=COLUMNS).to_parquet(path, index=False)
