"""Disks that are full or read-only: real ones of a few MB, for every writer. What a killed process left is removed."""
# ruff: noqa: ARG001 - all writers have the same arguments

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deepfake_core import cli
from deepfake_core.config import DataParameters, EvaluationParameters, Source
from deepfake_core.data import images, split_memory
from deepfake_core.data.confirmed import fetch_confirmed
from deepfake_core.data.dataset import Dataset, _list_images, share_dataset
from deepfake_core.data.duplicates import mark_duplicates
from deepfake_core.data.index import build_index
from deepfake_core.data.kaggle import fetch_archive
from deepfake_core.data.links import find_links
from deepfake_core.data.publishing import publish_dataset
from deepfake_core.data.splits import assign_splits
from deepfake_core.demo.archives import draw_archives
from deepfake_core.errors import DiskError
from deepfake_core.feedback.records import GivenVerdict
from deepfake_core.feedback.reports import open_feedback
from deepfake_core.reports.data_report import write_report
from deepfake_core.serving.load_versions import Judge
from deepfake_core.storage.files import write_beside, write_json
from deepfake_core.storage.locks import lock_folder
from deepfake_core.storage.shared_folder import fetch_folder
from deepfake_core.storage.store import Store, open_store
from deepfake_core.training.calibration import calibrate_detector
from deepfake_core.training.fit import Training, train_candidate
from tests.builders import RECIPE, draw_portrait, encode, faces, score_images, stripes, write_zip

libc = ctypes.CDLL(None, use_errno=True)
MS_RDONLY, MS_REMOUNT = 1, 32


def mount(folder: Path, flags: int = 0, size: int = 8) -> bool:
    options = f"size={size}m".encode()
    return libc.mount(b"none", str(folder).encode(), b"tmpfs", flags, options) == 0


@pytest.fixture
def disk(tmp_path):
    """Mount a disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount(folder):
        pytest.skip(f"no disk can be mounted here: {os.strerror(ctypes.get_errno())}")
    try:
        yield folder
    finally:
        assert libc.umount(str(folder).encode()) == 0


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass
    return filler


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Give an archive of drawn images, its rows with a split each, and the links."""
    archive = write_zip(tmp_path_factory.mktemp("sources") / "faces.zip", faces(12))
    store = open_store(tmp_path_factory.mktemp("rows"))
    opened = fetch_archive(Source(name=str(archive)), store)
    index = build_index(opened, store)
    links = find_links(index)
    return opened, assign_splits(mark_duplicates(index, links), links, {}, 0.25, 0.25), links


WRITERS = {}


def writer(make: Callable) -> Callable:
    WRITERS[make.__name__] = make
    return make


# Each gets a folder on the disk, what `rows` drew, and a function that returns a fixture. It returns what writes there.


@writer
def json_file(folder, rows, fixture):
    return lambda: write_json(folder / "x.json", {"x": "y" * 100_000})


@writer
def a_lock_and_what_is_written_under_it(folder, rows, fixture):
    def write() -> None:
        with lock_folder(folder / "data", "a test"):
            (folder / "data" / "x").write_bytes(bytes(100_000))

    return write


@writer
def image_index(folder, rows, fixture):
    return lambda: build_index(rows[0], open_store(folder))


def publish(folder: Path, rows: tuple, **more: str) -> Dataset:
    return publish_dataset(rows[1], [rows[0]], open_store(folder), DataParameters(sources=(rows[0].source,), **more))


@writer
def split_folders(folder, rows, fixture):
    split_memory.remember_splits(rows[1], open_store(folder))
    return lambda: publish(folder, rows)


@writer
def split_folders_encoded_again(folder, rows, fixture):
    split_memory.remember_splits(rows[1], open_store(folder))
    return lambda: publish(folder, rows, normalise="reencode")


@writer
def memory_of_splits(folder, rows, fixture):
    return lambda: split_memory.remember_splits(rows[1], open_store(folder))


@writer
def decoded_batches(folder, rows, fixture):
    dataset = publish(folder, rows)
    return lambda: images.load_images(dataset, "train", 64)


@writer
def report_on_data(folder, rows, fixture):
    dataset = publish(folder, rows)
    return lambda: write_report(dataset, rows[2], [rows[0]])


@writer
def drawn_archives(folder, rows, fixture):
    return lambda: draw_archives(folder / "sample", per_class=2)


def share(folder: Path, rows: tuple, data_folder: Path) -> Dataset:
    """Publish a data set at a URL."""
    store = Store(data_folder, f"memory://{folder}")
    dataset = publish_dataset(rows[1], [rows[0]], store, DataParameters(sources=(rows[0].source,)))
    write_report(dataset, rows[2], [rows[0]])
    return dataset


@writer
def packed_for_others(folder, rows, fixture):
    dataset = share(folder.parents[1] / "url", rows, folder)
    return lambda: share_dataset(dataset)


@writer
def fetched_from_others(folder, rows, fixture):
    elsewhere = folder.parents[1]
    dataset = share(elsewhere / "url", rows, elsewhere / "cache")
    share_dataset(dataset)
    here = Store(folder, dataset.store.url)
    version = dataset.version
    return lambda: fetch_folder(here, here.splits(version), lambda at: _list_images(Dataset(at, here), version))


@writer
def kept_of_others(folder, rows, fixture):
    store = Store(folder.parents[1] / "cache", f"memory://{folder.parents[1]}/url")
    split_memory.remember_splits(rows[1], store)
    split_memory.share_memory(store)
    return lambda: split_memory.read_memory(Store(folder, store.url))


@writer
def confirmed_reports(folder, rows, fixture):
    feedback = open_feedback(folder.parents[1] / "feedback")
    verdict = GivenVerdict(label="real", probability=0.5, sure=True, version="a model version 1")
    sent = feedback.add(encode(draw_portrait(1, 400), "PNG"), verdict, "fake")
    feedback.confirm(sent.sha256, "fake", by="a reviewer")
    return lambda: fetch_confirmed(feedback.address, open_store(folder))


@writer
def download(folder, rows, fixture):
    server = fixture("kaggle")
    server.add("owner/faces", rows[0].path.read_bytes())
    return lambda: fetch_archive(Source(name="owner/faces"), open_store(folder))


@writer
def trained_network(folder, rows, fixture):
    training = Training("cnn", RECIPE.model_copy(update={"epochs": 1}))
    return lambda: train_candidate(training, stripes(32, 0), stripes(32, 1), folder / "training")


@writer
def calibration(folder, rows, fixture):
    detector = shutil.copytree(fixture("candidate").folder, folder / "detector")
    return lambda: calibrate_detector(detector, stripes(32, 1), EvaluationParameters())


@writer
def scores(folder, rows, fixture):
    judge = Judge(fixture("candidate").folder, detect=False)
    (folder.parents[1] / "images").mkdir()
    for number, data in enumerate(faces(5).values()):
        (folder.parents[1] / "images" / f"{number}.jpg").write_bytes(data)
    return lambda: score_images(judge, folder.parents[1] / "images", folder / "scores.parquet")


@writer
def feedback(folder, rows, fixture):
    kept = open_feedback(folder / "feedback")
    kept.create()
    verdict = GivenVerdict(label="real", probability=0.1, sure=True, version="1")
    return lambda: kept.add(encode(draw_portrait(1), "PNG"), verdict, "fake")


@pytest.fixture
def write(request, disk, rows):
    folder = disk / "data"
    folder.mkdir()
    return WRITERS[request.param](folder, rows, request.getfixturevalue)


def read_files(disk: Path) -> dict[Path, bytes]:
    """Return the content of each file that has one."""
    files = (file for file in disk.rglob("*") if file.is_file())
    return {file: data for file in files if (data := file.read_bytes())}


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITERS, indirect=True)
def test_a_full_disk_stops_each_writer_which_leaves_nothing_and_succeeds_once_there_is_room(disk, write):
    before = read_files(disk)
    filler = fill(disk)
    with pytest.raises(DiskError, match=r"GB free|MB are free"):
        write()
    filler.unlink()
    assert read_files(disk) == before
    write()
    assert read_files(disk) != before


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITERS, indirect=True)
def test_a_read_only_disk_stops_each_writer_which_succeeds_once_it_is_writable(disk, write):
    before = read_files(disk)
    assert mount(disk, MS_REMOUNT | MS_RDONLY)
    with pytest.raises(DiskError, match=r"must be able to read and write /.*Read-only file system.*permissions"):
        write()
    assert read_files(disk) == before
    assert mount(disk, MS_REMOUNT)
    write()
    assert read_files(disk) != before


@pytest.mark.process
def test_what_a_killed_decode_left_is_removed_by_the_next_and_what_is_being_written_stays(tmp_path):
    path = tmp_path / "train.npy"
    code = (
        "import sys, time; from pathlib import Path; from deepfake_core.storage.files import write_beside\n"
        "with write_beside(Path(sys.argv[1])) as beside: beside.write_bytes(bytes(9)); print(beside, flush=True); "
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(path)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as busy,
    ):
        left, written = (Path(process.stdout.readline().strip()) for process in (killed, busy))
        killed.kill()
        killed.wait()
        (tmp_path / ".other.npy.7").touch()
        with write_beside(path) as beside:
            beside.write_bytes(b"whole")
        try:
            assert {file.name for file in tmp_path.iterdir()} == {"train.npy", ".other.npy.7", written.name}
        finally:
            busy.kill()
    assert left.name.startswith(".train.npy.")
    assert path.read_bytes() == b"whole"


WRITE_OFTEN = """
import sys
from pathlib import Path
from deepfake_core.storage.files import write_beside
print("ready", flush=True)
sys.stdin.readline()
for turn in range(1000):
    with write_beside(Path(sys.argv[1])) as beside:
        beside.write_text(str(turn))
"""


@pytest.mark.process
def test_processes_that_write_one_path_at_once_take_nothing_from_each_other(tmp_path):
    command = [sys.executable, "-c", WRITE_OFTEN, str(tmp_path / "written")]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [one.stdout.readline() for one in started] == ["ready\n"] * 3
    for one in started:
        one.stdin.write("\n")
        one.stdin.flush()
    for one in started:
        one.communicate()
    assert [one.returncode for one in started] == [0] * 3
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"written": "999"}


def test_a_command_says_in_one_line_that_the_disk_is_full(disk, candidate, capsys):
    (disk / "face.png").write_bytes(encode(draw_portrait(1), "PNG"))
    fill(disk)
    command = ["predict", str(disk / "face.png"), "--no-detect", "--model", str(candidate.folder)]
    assert cli.main([*command, "--explain", str(disk)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("deepfake: What is written must fit on the disk. Received: No space left on device at /")
    assert error.count("\n") == 1
