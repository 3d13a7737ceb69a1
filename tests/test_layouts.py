"""A small retrain from tars, in a process of its own, which is killed while it writes them."""

import shutil
import signal
from functools import partial

import pytest

from deepfake_core.data.dataset import open_dataset
from deepfake_core.housekeeping import clean
from deepfake_core.registry.versions import list_versions
from deepfake_core.storage.store import open_store
from deepfake_core.storage.tars import PLACES
from tests.builders import NAME, faces, write_zip
from tests.small_retrain import DATA, ZIP, fork, prepare, retrain

pytestmark = [pytest.mark.process, pytest.mark.slow]

from_tars = partial(retrain, layout="shards")


def find_dataset(folder):
    (described,) = (folder / DATA / "splits").glob("*/dataset.json")
    return open_dataset(described.parent)


def test_a_retrain_from_tars_is_the_same_training_as_one_from_files(retrain_folder):
    folder = retrain_folder
    assert fork(folder, from_tars) == 0
    dataset = find_dataset(folder)
    assert (dataset.path / PLACES).exists()
    assert not list(dataset.path.rglob("*.jpg"))
    (version,) = list_versions(NAME)
    assert version.is_finished
    manifest = (dataset.path / "manifest.parquet").read_bytes()
    shutil.rmtree(dataset.path)
    shutil.rmtree(folder / DATA / "batches")
    assert fork(folder, retrain) == 0
    assert list(dataset.path.rglob("*.jpg"))
    assert (dataset.path / "manifest.parquet").read_bytes() == manifest  # although splits are remembered by now
    assert list_versions(NAME) == [version]  # nothing was trained again


@pytest.mark.parametrize("tar", ["train", "val"])
def test_a_kill_while_tars_are_written_leaves_nothing_that_counts(retrain_folder, tar):
    folder = retrain_folder
    shutil.rmtree(folder / DATA, ignore_errors=True)
    act = partial(prepare, layout="shards")
    assert fork(folder, act, f"write data/splits/.ID.partial/{tar}/000000.tar") == -signal.SIGKILL
    assert not list((folder / DATA / "splits").glob("*/dataset.json"))
    assert list((folder / DATA / "splits").glob(".*.partial"))
    assert fork(folder, act) == 0
    dataset = find_dataset(folder)
    assert not list((folder / DATA / "splits").glob(".*.partial"))
    assert all(dataset.read(path) for path in dataset.manifest.query("kept")["path"])


def test_housekeeping_removes_what_a_kill_left_of_tars_and_keeps_those_that_are_needed(retrain_folder):
    folder = retrain_folder
    assert fork(folder, from_tars) == 0
    dataset, store = find_dataset(folder), open_store(folder / DATA)
    write_zip(folder / ZIP, faces(14))
    act = partial(prepare, layout="shards")
    assert fork(folder, act, "write data/splits/.ID.partial/val/000000.tar") == -signal.SIGKILL
    (left,) = store.splits().glob(".*.partial")
    size = sum(file.stat().st_size for file in left.rglob("*") if file.is_file())
    removed = {path: one.bytes for one in clean(store, NAME) for path in one.paths}
    assert removed[left] == size > 0
    assert not left.exists()
    assert all(dataset.read(path) for path in dataset.manifest.query("kept")["path"])
