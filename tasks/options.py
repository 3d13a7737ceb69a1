"""The stages from Kaggle to split folders."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pandas as pd
from prefect import State, Task, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.blocks.system import Secret
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import TaskRun

from deepfake_core import archive, data_report, duplicates, index, manifest
from deepfake_core.archive import Archive
from deepfake_core.config import DataParameters, Source
from deepfake_core.errors import TransientError
from deepfake_core.manifest import Dataset
from tasks.progress import report_progress

KAGGLE_BLOCK = "kaggle-api-token"
"""Name of the Secret block in Prefect that holds Kaggle's token, where no variable does."""


def retry_transient(task: Task, task_run: TaskRun, state: State) -> bool:  # noqa: ARG001 - Prefect's signature
    """Retry what can heal, such as a network; a person has to act on anything else."""
    return isinstance(state.result(raise_on_failure=False), TransientError)


def use_kaggle_token(source: Source) -> None:
    """Take Kaggle's token from its Secret block, unless the usual variables hold credentials."""
    if source.is_local or os.environ.keys() & {"KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"}:
        return
    try:
        secret = cast("Secret[str]", Secret.load(KAGGLE_BLOCK))
    except ValueError:  # there is none; the client may find its files
        return
    os.environ["KAGGLE_API_TOKEN"] = secret.get()


@task(
    name="download",
    task_run_name="download {source.short_name}",
    retries=3,
    retry_delay_seconds=[10, 60, 300],
    retry_condition_fn=retry_transient,
    tags=["network"],
    cache_policy=NO_CACHE,
)
def download(source: Source, data_dir: str | Path) -> Archive:
    """Bring a source's archive to this disk, verified; share it where `data_dir` is a URL."""
    use_kaggle_token(source)
    with report_progress(f"download {source.short_name}") as on_progress:
        found = archive.fetch_archive(source, data_dir, on_progress)
    with report_progress(f"share {source.short_name}") as on_progress:
        archive.share_archive(found, data_dir, on_progress)
    return found


@task(
    name="ask for the version",
    task_run_name="ask for the version of {source.short_name}",
    retries=3,
    retry_delay_seconds=[10, 60, 300],
    retry_condition_fn=retry_transient,
    tags=["network"],
    cache_policy=NO_CACHE,
)
def find_new_version(source: Source, data_dir: str | Path) -> int | None:
    """Return the version that Kaggle has of a source and `data_dir` has not."""
    use_kaggle_token(source)
    return archive.find_new_version(source, data_dir)


@task(name="index", task_run_name="index {archive.source.short_name}", tags=["cpu"], cache_policy=NO_CACHE)
def build_index(archive: Archive, data_dir: str | Path) -> pd.DataFrame:
    """Describe every file of an archive."""
    with report_progress(f"index {archive.source.short_name}") as on_progress:
        return index.build_index(archive, data_dir, on_progress)


@task(name="find near copies", tags=["cpu"], cache_policy=NO_CACHE)
def find_links(indexes: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Find the pairs of pictures that are copies, edits or neighbours of each other."""
    return duplicates.find_links(pd.concat(indexes))


@task(name="deduplicate", tags=["cpu"], cache_policy=NO_CACHE)
def deduplicate(indexes: Sequence[pd.DataFrame], links: pd.DataFrame) -> pd.DataFrame:
    """Group near copies, and keep one copy per picture across all sources."""
    return duplicates.mark_duplicates(pd.concat(indexes), links)


@task(name="split", tags=["cpu"], cache_policy=NO_CACHE)
def split(rows: pd.DataFrame, links: pd.DataFrame, data: DataParameters) -> pd.DataFrame:
    """Put each kept image into train, val or test, whole groups together and known images where they were."""
    memory = manifest.read_memory(data.data_dir)
    return manifest.assign_splits(rows, links, memory, data.val_fraction, data.test_fraction)


@task(name="merge", tags=["cpu"], cache_policy=NO_CACHE)
def merge(rows: pd.DataFrame, archives: Sequence[Archive], data: DataParameters) -> Dataset:
    """Publish the split folders, whole or not at all."""
    with report_progress("merge") as on_progress:
        dataset = manifest.publish_dataset(rows, archives, data, on_progress)
    counts = dataset.description["counts"]["sources"]
    create_table_artifact(
        [{"source": source, **reasons} for source, reasons in counts.items()],
        key="data-set",
        description=f"Files per source and what became of them; data set {dataset.version} at {dataset.address}",
    )
    return dataset


@task(name="report", tags=["cpu"], cache_policy=NO_CACHE)
def write_report(dataset: Dataset, links: pd.DataFrame, archives: Sequence[Archive]) -> None:
    """Write the data set's report beside its images, and link it."""
    path = data_report.write_report(dataset, links, archives)
    create_link_artifact(
        path.as_uri(),
        key="data-report",
        link_text=f"report of data set {dataset.version}",
        description=f"{dataset.address}/{path.name}",
    )


@task(
    name="share",
    retries=3,
    retry_delay_seconds=[10, 60, 300],
    retry_condition_fn=retry_transient,
    tags=["network"],
    cache_policy=NO_CACHE,
)
def share(dataset: Dataset, data_dir: str) -> None:
    """Publish a data set for other machines, whole or not at all."""
    with report_progress("share") as on_progress:
        manifest.share_dataset(dataset, data_dir, on_progress)


@task(
    name="open data set",
    retries=3,
    retry_delay_seconds=[10, 60, 300],
    retry_condition_fn=retry_transient,
    tags=["network"],
    cache_policy=NO_CACHE,
)
def open_dataset(address: str) -> Dataset:
    """Open a published split folder; bring it to this disk first where it is shared."""
    with report_progress("fetch data set") as on_progress:
        return manifest.open_dataset(address, on_progress)
