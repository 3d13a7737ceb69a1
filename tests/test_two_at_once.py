"""Two of everything at once: one wins or both succeed, what the loser is told, and nothing is lost."""

import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from deepfake_core.data.dataset import open_dataset
from deepfake_core.errors import LockedError, ModelError, ProductionMovedError
from deepfake_core.housekeeping import clean
from deepfake_core.registry import names, production
from deepfake_core.registry.connection import connect
from deepfake_core.registry.runs import search_runs
from deepfake_core.registry.versions import list_versions
from deepfake_core.serving.page import serve
from deepfake_core.serving.uploads import UPLOADS
from deepfake_core.storage.store import open_store
from tests.builders import FORMER, NAME, free_port, jpeg, wait_until
from tests.small_retrain import DATA, fork, prepare, processes, retrain, run

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.sweep]

TOLD = 3
"""The exit status of who was told that another is at it."""


@pytest.fixture
def folder(retrain_folder):
    """Return the folder as it was before the first test, whatever the last one left."""
    start = retrain_folder.with_name("start")
    if start.exists():
        shutil.rmtree(retrain_folder)
        shutil.copytree(start, retrain_folder)
    else:
        shutil.copytree(retrain_folder, start)
    return retrain_folder


def attempt(folder: Path, act: Callable[[Path], object], gate: Any) -> None:
    """Run once all are there."""
    gate.wait()
    try:
        run(folder, act)
    except (LockedError, ModelError, ProductionMovedError) as exc:
        print(exc, file=sys.stderr)
        sys.exit(TOLD)


def try_at_once(folder: Path, *acts: Callable[[Path], object]) -> list[int | None]:
    gate = processes.Barrier(len(acts))
    started = [processes.Process(target=attempt, args=(folder, act, gate)) for act in acts]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return sorted(process.exitcode for process in started)


def retrain_elsewhere(folder: Path) -> str:
    """Retrain with a data folder of its own."""
    (folder / "other").mkdir()
    shutil.copy(folder / "a.zip", folder / "other")
    return retrain(folder / "other")


def collect_garbage(folder: Path) -> None:
    clean(open_store(folder / DATA), keep=1)


def promote(folder: Path, version: str) -> None:
    del folder
    connect()
    production.promote_by_hand(NAME, version, "better", force=True)


def check_versions(count: int) -> None:
    """Assert that each version is finished, that aliases are right, and that no run is left."""
    found = list_versions(NAME)
    assert len(found) == count
    assert all(version.is_finished for version in found)
    aliases = {alias for version in found for alias in version.aliases}
    assert aliases in ({"production"}, {"production", "previous"}, {"production", "challenger"})
    assert {one.info.status for one in search_runs()} == {"FINISHED"}
    assert [one.name for one in connect().search_registered_models()] == [NAME]


def test_retrains_on_one_data_folder(folder):
    assert try_at_once(folder, retrain, retrain) == [0, TOLD]
    check_versions(1)
    assert try_at_once(folder, retrain, retrain) in ([0, 0], [0, TOLD])  # nothing changed: over at once
    check_versions(1)


def test_retrains_on_two_data_folders(folder):
    """Both train the same, and are compared with what is in production when they are done."""
    assert try_at_once(folder, retrain, retrain_elsewhere) == [0, 0]
    check_versions(2)
    (best,) = [version for version in list_versions(NAME) if "production" in version.aliases]
    assert {version.decision for version in list_versions(NAME)} <= {names.PROMOTED, names.NOT_PROMOTED}
    assert best.decision == names.PROMOTED


def test_prepares(folder):
    assert try_at_once(folder, prepare, prepare) in ([0, 0], [0, TOLD])
    (path,) = (folder / DATA / "splits").glob("[0-9a-f]*")
    dataset = open_dataset(path)
    assert len(list(path.rglob("*.jpg"))) == len(dataset.manifest) == 24


def test_a_retrain_and_housekeeping(folder):
    assert fork(folder, retrain) == 0
    shutil.copytree(folder / DATA / "splits", folder / DATA / "kept")
    connect().delete_model_version(NAME, "1")  # so that it is trained again
    connect().delete_registered_model(NAME)
    assert try_at_once(folder, retrain, collect_garbage) in ([0, 0], [0, TOLD])
    assert fork(folder, retrain) == 0  # whoever won
    check_versions(1)


@pytest.mark.parametrize("acts", [2, 3])
def test_housekeeping(folder, acts):
    assert fork(folder, retrain) == 0
    for number in range(3):
        left = folder / DATA / "splits" / f".{number}.partial" / "train"
        left.mkdir(parents=True)
        (left / "0.jpg").write_bytes(jpeg(number))
    assert set(try_at_once(folder, *[collect_garbage] * acts)) <= {0, TOLD}
    collect_garbage(folder)
    assert not list((folder / DATA / "splits").glob(".*"))
    check_versions(1)
    assert len(list((folder / DATA / "splits").glob("[0-9a-f]*"))) == 1


def test_promotions(folder):
    assert fork(folder, retrain) == 0
    for _ in range(2):
        connect().copy_model_version(f"models:/{NAME}/1", NAME)
    assert try_at_once(folder, partial(promote, version="2"), partial(promote, version="3")) in ([0, 0], [0, TOLD])
    (now,) = [version for version in list_versions(NAME) if "production" in version.aliases]
    assert now.version in ("2", "3")
    assert production.list_rollbacks(NAME)[-1] == "1"
    assert not [version for version in list_versions(NAME) if names.MOVE in version.tags]


def show(folder: Path, port: int, uploads: Path) -> None:
    del folder
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    serve(str(FORMER), detect=False, port=port)


def answers(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/config").ok
    except requests.RequestException:
        return False


def test_pages(folder, tmp_path):
    """Neither takes away what was uploaded to the other, when it starts and when it ends."""
    ports = [free_port(), free_port()]
    pages = [processes.Process(target=run, args=(folder, partial(show, port=port, uploads=tmp_path))) for port in ports]
    for page in pages:
        page.start()
    for port in ports:
        wait_until(lambda port=port: answers(port))
    sent = [requests.post(f"http://127.0.0.1:{port}/gradio_api/upload", files={"files": jpeg(1)}) for port in ports]
    (kept,) = sent[1].json()
    assert len(list(tmp_path.glob(f"{UPLOADS}*"))) == 2
    assert fork(folder, partial(show, port=ports[0], uploads=tmp_path)) == 1  # the port is taken
    pages[0].terminate()
    pages[0].join()
    assert Path(kept).read_bytes() == jpeg(1)
    assert len(list(tmp_path.glob(f"{UPLOADS}*"))) == 1
    pages[1].terminate()
    pages[1].join()
    assert not list(tmp_path.glob(f"{UPLOADS}*"))
