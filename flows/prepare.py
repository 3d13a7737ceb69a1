"""From Kaggle to split folders. Runs on the CPU pool."""

from prefect import flow, runtime, unmapped

from deepfake_core.config import DataParameters
from deepfake_core.manifest import lock_data
from tasks.data import build_index, deduplicate, download, merge, split


@flow(name="prepare")
def prepare(data: DataParameters = DataParameters()) -> str:
    """Download, index, deduplicate, split and merge; return the folder of the data set.

    Args:
        data: Where images come from, where they go, and how they are split.
    """
    data_dir = data.data_dir.expanduser().resolve()
    with lock_data(data_dir, holder=f"flow run {runtime.flow_run.name}"):
        archives = download.map(data.sources, unmapped(data_dir)).result()
        indexes = build_index.map(archives, unmapped(data_dir)).result()
        rows = split(deduplicate(indexes), data)
        dataset = merge(rows, archives, data.model_copy(update={"data_dir": data_dir}))
    return str(dataset.path)
