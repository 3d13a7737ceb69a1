"""From Kaggle to split folders. Runs on the CPU pool."""

from prefect import flow, runtime, unmapped

from deepfake_core.config import DataParameters
from deepfake_core.manifest import lock_folder
from deepfake_core.store import open_store
from tasks.data import build_index, deduplicate, download, find_links, merge, share, split, write_report


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
    data = data.model_copy(update={"data_dir": store.address})
    with lock_folder(store.folder, holder=f"flow run {runtime.flow_run.name}"):
        archives = download.map(data.sources, unmapped(data.data_dir)).result()
        indexes = build_index.map(archives, unmapped(data.data_dir)).result()
        links = find_links(indexes)
        rows = split(deduplicate(indexes, links), links, data)
        dataset = merge(rows, archives, data)
        write_report(dataset, links, archives)
        if store.url:
            share(dataset, store.url)
    return dataset.address
