"""From Kaggle to split folders. Runs on the CPU pool."""

from prefect import flow, runtime, unmapped

from deepfake_core.config import DataParameters
from deepfake_core.data.index import list_shards
from deepfake_core.storage.locks import lock_folder
from deepfake_core.storage.store import open_store
from tasks.data import (
    deduplicate,
    download,
    fetch_reports,
    find_near_copies,
    index_archive,
    index_shard,
    merge,
    report_on_data,
    share,
    split,
)
from tasks.shards import run_shards


@flow(name="prepare")
def prepare(data: DataParameters = DataParameters()) -> str:
    """Download, index, find near copies, split, merge and report; return the address of the data set.

    Args:
        data: Where images come from, where they go, and how they are split.

    Returns:
        The folder of the data set, or its URL where `data.data_dir` is one.
    """
    store = open_store(data.data_dir)
    store.check()
    with lock_folder(store.folder, holder=f"flow run {runtime.flow_run.name}"):
        sources = (*data.sources, *fetch_reports(data.feedback, store))
        archives = download.map(sources, unmapped(store)).result()
        run_shards(index_shard, list_shards(archives, store), data.cluster)
        indexes = index_archive.map(archives, unmapped(store)).result()
        near = find_near_copies(indexes, store, data.cluster)
        rows = split(deduplicate(indexes, near), near, store, data)
        dataset = merge(rows, archives, store, data)
        report_on_data(dataset, near, archives)
        if store.url:
            share(dataset)
    return dataset.address
