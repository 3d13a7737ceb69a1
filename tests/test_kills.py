"""SIGKILL at each of 41 points of a retrain; then it is run again, and leaves what a retrain leaves that nobody killed.

Each process is forked from one that has imported all it needs. It does what the flows do by the core's functions, as a
flow takes much longer.
"""

import hashlib
import re
import shutil
import signal
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import mlflow
import pytest
from prefect.settings import PREFECT_API_URL

from deepfake_core.data.dataset import Dataset, open_dataset
from deepfake_core.data.index import INDEX_FORMAT
from deepfake_core.data.links import LINKS_FORMAT
from deepfake_core.registry import names
from deepfake_core.registry.runs import search_runs
from deepfake_core.registry.versions import list_versions
from deepfake_core.storage.store import open_store
from tests.builders import NAME
from tests.small_retrain import DATA, SIZE, fork, prepare, retrain, retrain_by_flow

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.sweep]

TRAINING, BATCHES, ARTIFACTS = "data/training/ID-cnn-ID", f"data/batches/ID-{SIZE}px", "mlruns/1/ID/artifacts"

START, TRAINED, REGISTERED = "", "log_batch val/true_positives", "set_model_version_tag compared_with none"
POINTS = {
    START: (
        "rename data/.lock.json",
        f"rename data/indexes/a-v{INDEX_FORMAT}-ID.parquet",
        f"rename data/indexes/near copies-v{LINKS_FORMAT}-ID.parquet",
        "rename data/splits/memory.parquet",
        "write data/splits/.ID.partial/train/real/ID.jpg 3",
        "rename data/splits/.ID.partial/manifest.parquet",
        "rename data/splits/.ID.partial/dataset.json",
        "rename data/splits/ID",
        "rename data/.id",
        "create_run",
        "log_inputs",
        f"write {BATCHES}/.train.npyID 3",  # its space is reserved by then, and nothing is in it
        f"rename {BATCHES}/train.npy",
        "create_run 2",
        f"rename {TRAINING}/detector/checkpoint.keras",
        f"rename {TRAINING}/history.csv",
        f"write {TRAINING}/all/training_metadata.json",
        f"write {TRAINING}/detector/model.onnx",
        f"rename {TRAINING}/detector/detector.json",
        TRAINED,
    ),
    TRAINED: (
        f"rename {ARTIFACTS}/checkpoint/checkpoint.keras",
        f"write {ARTIFACTS}/probe/scores.json",
        "set_terminated 3",  # the first two are of the runs that a kill left
        f"rename {BATCHES}/test.npy",
        "log_batch test/true_positives 2",
        "log_model_artifacts",
        "write mlruns/1/models/m-ID/artifacts/artifacts/detector/model.onnx",
        "create_registered_model",
        "set_logged_model_tags",  # the version is registered
        REGISTERED,
    ),
    REGISTERED: (
        "create_registered_model",  # which is the lock of a move
        "set_model_version_tag move_to_production",
        "set_registered_model_alias production",
        "set_model_version_tag production_because",
        "set_model_version_tag production_since",
        "delete_model_version_tag move_to_production",
        "set_model_version_tag decision promoted",
        f"rename {ARTIFACTS}/report.html",
        "update_model_version",
        "set_terminated 2",
        "rename data/training/.ID-cnn-ID.partial",
    ),
}
"""By where the retrain was killed before that goes on, so that a network is not trained for each point."""


@pytest.fixture(scope="module")
def states(retrain_folder):
    """Return by `POINTS` copies of the folder as kills left it, and the version of the data set that the zip gives."""
    folder = retrain_folder
    copies = {START: shutil.copytree(folder, folder.with_name("start"))}
    version = prepare(folder).version
    for last, point in pairwise(POINTS):
        put(copies[last], folder)
        assert fork(folder, retrain, point) == -signal.SIGKILL
        copies[point] = shutil.copytree(folder, folder.with_name(f"state-{len(copies)}"))
    return copies, version


def put(copy: Path, folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)


@pytest.mark.parametrize(("state", "point"), [(state, point) for state, points in POINTS.items() for point in points])
def test_a_retrain_that_is_killed_is_made_up_for_by_the_next(retrain_folder, states, state, point):
    folder, (copies, expected) = retrain_folder, states
    put(copies[state], folder)
    assert fork(folder, retrain, point) == -signal.SIGKILL, f"never came to: {point}"
    check_whole(folder, expected)
    assert fork(folder, retrain) == 0
    check_whole(folder, expected)
    check_finished(folder, expected)


@pytest.mark.usefixtures("prefect_api")
def test_a_flow_that_is_killed_time_and_again_after_its_version_was_registered_is_finished(retrain_folder, states):
    """Each run goes on from where the last was killed: nothing is trained or registered again."""
    folder, (copies, _) = retrain_folder, states
    put(copies[START], folder)
    flow = partial(retrain_by_flow, api=PREFECT_API_URL.value())
    for point, *found in (
        (REGISTERED, "", (), False),
        ("set_model_version_tag decision promoted", "", ("production",), False),
        ("update_model_version", names.PROMOTED, ("production",), False),
    ):
        assert fork(folder, flow, point) == -signal.SIGKILL
        (version,) = list_versions(NAME)
        assert [version.decision, version.aliases, version.is_finished] == found
        assert len(list((folder / DATA / "training").glob("[0-9a-f]*"))) == 2
        assert len(search_runs("attributes.status = 'RUNNING'")) == 1
    shutil.copytree(folder / DATA / "training", folder / "left")
    assert fork(folder, flow) == 0
    check_flow(folder)
    shutil.copytree(folder / "left", folder / DATA / "training", dirs_exist_ok=True)  # a kill at the very end
    assert fork(folder, flow) == 0
    check_flow(folder)


def check_flow(folder: Path) -> None:
    (version,) = list_versions(NAME)
    assert (version.aliases, version.decision, version.is_finished) == (("production",), names.PROMOTED, True)
    assert version.tags[names.PRODUCTION_BECAUSE] == "; ".join(version.reasons)
    assert sorted(run.info.run_name for run in search_runs() if names.PARENT in run.data.tags) == ["cnn", "hpf_cnn"]
    assert {run.info.status for run in search_runs()} == {"FINISHED"}
    assert list((folder / DATA / "training").iterdir()) == []
    page = Path(mlflow.MlflowClient().download_artifacts(version.run_id, "report.html")).read_text()
    assert all(name in page for name in ("Training of cnn", "Training of hpf_cnn"))


def check_whole(folder: Path, expected: str) -> None:
    """Assert that what is there under its own name is whole, whenever the last process ended."""
    for path in (folder / DATA / "splits").glob("[0-9a-f]*"):
        assert path.name == expected
        manifest = open_dataset(path).manifest
        for row in manifest[manifest["kept"]].itertuples():
            assert hashlib.sha256((path / row.path).read_bytes()).hexdigest() == row.sha256
    found = list_versions(NAME)
    assert len(found) <= 1
    for version in found:
        assert version.aliases in ((), ("production",))
        assert bool(version.aliases) >= (names.PRODUCTION_SINCE in version.tags)


def check_finished(folder: Path, expected: str) -> None:
    """Assert that there is one version, in production, with all that belongs to it, and no leftovers."""
    (version,) = list_versions(NAME)
    assert (version.aliases, version.decision, version.is_finished) == (("production",), names.PROMOTED, True)
    assert version.dataset_version == expected
    assert {names.PRODUCTION_SINCE, names.PRODUCTION_BY, names.PRODUCTION_BECAUSE} <= set(version.tags)
    assert names.MOVE not in version.tags
    assert "report.html" in {file.path for file in mlflow.MlflowClient().list_artifacts(version.run_id)}
    ended = Counter(one.info.status for one in search_runs() if names.PARENT not in one.data.tags)
    assert set(ended) <= {"FINISHED", "KILLED"}
    assert ended["FINISHED"] <= 1  # 0 if all but that was written
    assert search_runs("attributes.status = 'RUNNING'") == []
    assert [one.name for one in mlflow.MlflowClient().search_registered_models()] == [NAME]
    kept = Dataset(folder / DATA / "splits" / expected, open_store(folder / DATA)).manifest
    assert list_files(folder / DATA) == sorted(
        [".id", ".lock", "indexes/zip-ID.json", "splits/memory.parquet"]
        + [f"indexes/{name}-ID.parquet" for name in (f"a-v{INDEX_FORMAT}", f"near copies-v{LINKS_FORMAT}")]
        + [f"splits/ID/{name}" for name in ("dataset.json", "manifest.parquet", "report.html")]
        + [f"batches/ID-{SIZE}px/{split}.{end}" for split in ("train", "val", "test") for end in ("npy", "sha256")]
        + [re.sub(r"[0-9a-f]{16,}", "ID", f"splits/ID/{path}") for path in kept.loc[kept["kept"], "path"]]
    )


def list_files(folder: Path) -> list[str]:
    files = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(re.sub(r"[0-9a-f]{16,}", "ID", file) for file in files)
