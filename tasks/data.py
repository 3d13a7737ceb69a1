"""The stages from Kaggle to split folders, and what removes them again."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import cast

import pandas as pd
from prefect import task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.blocks.system import Secret

from deepfake_core import housekeeping
from deepfake_core.config import DataParameters, Source
from deepfake_core.data import (
    confirmed,
    duplicates,
    index,
    kaggle,
    links,
    publishing,
    search_shards,
    split_memory,
    splits,
)
from deepfake_core.data import dataset as datasets
from deepfake_core.data.archive import Archive
from deepfake_core.data.credentials import VARIABLES
from deepfake_core.data.dataset import Dataset
from deepfake_core.data.search_shards import SearchShard
from deepfake_core.data.shards import Shard
from deepfake_core.housekeeping import Removal
from deepfake_core.reports import data_report
from deepfake_core.storage.store import Store
from tasks.options import NETWORK, ONCE, SHARD
from tasks.progress import report_progress
from tasks.shards import run_shards

KAGGLE_BLOCK = "kaggle-api-token"
"""Name of the Secret block in Prefect that holds Kaggle's token, where no variable does."""


def use_kaggle_token(source: Source) -> None:
    """Take Kaggle's token from its Secret block, unless the usual variables hold credentials."""
    if source.is_local or any(map(os.environ.get, VARIABLES)):
        return
    try:
        secret = cast("Secret[str]", Secret.load(KAGGLE_BLOCK))
    except ValueError:  # there is none; the client may find its files
        return
    os.environ["KAGGLE_API_TOKEN"] = str(secret.get())


@task(name="download", task_run_name="download {source.short_name}", **NETWORK)
def download(source: Source, store: Store) -> Archive:
    """Bring a source's archive to this disk, verified; share it where the store is at a URL."""
    use_kaggle_token(source)
    with report_progress(f"download {source.short_name}") as on_progress:
        archive = kaggle.fetch_archive(source, store, on_progress)
    with report_progress(f"share {source.short_name}") as on_progress:
        kaggle.share_archive(archive, store, on_progress)
    return archive


@task(name="ask for the version", task_run_name="ask for the version of {source.short_name}", **NETWORK)
def ask_for_version(source: Source, store: Store) -> int | None:
    """Return the version that Kaggle has of a source and the store has not."""
    use_kaggle_token(source)
    return kaggle.find_new_version(source, store)


@task(name="fetch confirmed reports", **NETWORK)
def fetch_reports(address: str, store: Store) -> tuple[Source, ...]:
    """Bring the images of confirmed reports to this disk, as a source; none where there are no such reports."""
    return confirmed.fetch_confirmed(address, store)


@task(name="index", task_run_name="index {archive.source.short_name}", **ONCE)
def index_archive(archive: Archive, store: Store) -> Path:
    """Describe every file of an archive; return the index's Parquet file."""
    with report_progress(f"index {archive.source.short_name}") as on_progress:
        return index.write_index(archive, store, on_progress)


@task(name="index shard", task_run_name="index shard {shard}", **SHARD)
def index_shard(shard: Shard, threads: int) -> None:
    """Write the rows of some thousand files of an archive, unless they are there."""
    index.index_shard(shard, threads)


@task(name="compare pictures", task_run_name="compare {shard}", **SHARD)
def compare_pictures(shard: SearchShard, threads: int) -> None:
    """Write what some hash tables find, or how like some pairs of pictures are, unless it is there."""
    search_shards.search_shard(shard, threads)


@task(name="find near copies", **ONCE)
def find_near_copies(indexes: Sequence[Path], store: Store, cluster: str) -> pd.DataFrame:
    """Find the pairs of pictures that are copies, edits or neighbours of each other."""
    cluster = "" if store.url else cluster  # a shard's nodes read the hashes from the data folder
    run = partial(run_shards, compare_pictures, cluster=cluster, at_once=1)
    with report_progress("compare new pictures") as on_progress:
        return links.find_or_read_links(indexes, store, run, on_progress)


@task(name="deduplicate", **ONCE)
def deduplicate(indexes: Sequence[Path], near: pd.DataFrame) -> pd.DataFrame:
    """Group near copies, and keep one copy per picture across all sources."""
    return duplicates.mark_duplicates(index.read_facts(indexes), near)


@task(name="split", **ONCE)
def split(rows: pd.DataFrame, near: pd.DataFrame, store: Store, data: DataParameters) -> pd.DataFrame:
    """Put each kept image into a split, whole groups together and known images where they were."""
    memory = split_memory.read_memory(store)
    return splits.assign_splits(rows, near, memory, data.val_fraction, data.test_fraction)


@task(name="merge", **ONCE)
def merge(rows: pd.DataFrame, archives: Sequence[Archive], store: Store, data: DataParameters) -> Dataset:
    """Publish the split folders, whole or not at all."""
    with report_progress("merge") as on_progress:
        dataset = publishing.publish_dataset(rows, archives, store, data, on_progress)
    counts = dataset.description["counts"]["sources"]
    create_table_artifact(
        [{"source": source, **reasons} for source, reasons in counts.items()],
        key="data-set",
        description=f"Files per source and what became of them; data set {dataset.version} at {dataset.address}",
    )
    return dataset


@task(name="report on data", **ONCE)
def report_on_data(dataset: Dataset, near: pd.DataFrame, archives: Sequence[Archive]) -> None:
    """Write the data set's report beside its images, and link it."""
    path = data_report.write_report(dataset, near, archives)
    create_link_artifact(
        path.as_uri(),
        key="data-report",
        link_text=f"report of data set {dataset.version}",
        description=f"{dataset.address}/{path.name}",
    )


@task(name="share", **NETWORK)
def share(dataset: Dataset) -> None:
    """Publish a data set for other machines, whole or not at all."""
    with report_progress("share") as on_progress:
        datasets.share_dataset(dataset, on_progress)


@task(name="fetch data set", **NETWORK)
def fetch_dataset(address: str) -> Dataset:
    """Open a published split folder; bring it to this disk first where it is shared."""
    with report_progress("fetch data set") as on_progress:
        return datasets.open_dataset(address, on_progress)


@task(name="remove what is not needed", **ONCE)
def remove_unneeded(
    store: Store,
    model_name: str,
    keep: int,
    dry_run: bool,
    feedback: str,
    keep_rejected_days: int,
    observations: str,
    keep_observations_days: int,
) -> list[Removal]:
    """Remove what is not needed any more, or only list it."""
    return housekeeping.clean(
        store,
        model_name,
        keep,
        dry_run,
        feedback=feedback,
        keep_rejected_days=keep_rejected_days,
        observations=observations,
        keep_observations_days=keep_observations_days,
    )
