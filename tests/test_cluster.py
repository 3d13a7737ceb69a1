"""`prepare` on a Ray cluster of two nodes, each a few processes of this machine with its own folder."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from deepfake_core.config import DataParameters, Source
from deepfake_core.data import index
from deepfake_core.data.archive import open_local
from deepfake_core.errors import ArchiveError, ConfigurationError, ServiceError
from deepfake_core.storage.store import open_store
from flows.prepare import prepare
from tasks.data import index_shard
from tasks.shards import run_shards
from tests.builders import ROOT, faces, free_port, wait_until, write_zip

pytestmark = [
    pytest.mark.usefixtures("prefect_api"),
    pytest.mark.cluster,
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.sweep,
]

pytest.importorskip("ray", reason="the extra `cluster` is not installed")

SHARD_SIZE = 6
IMAGES = 60
"""Of each class: 20 shards, as much as a node needs a while for."""


class Node:
    """A node with one core."""

    def __init__(self, *options: str, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # a socket's path has 107 bytes at most
        folder = [f"--temp-dir={self.folder}"] if "--head" in options else []  # others take the head's
        command = [Path(sys.executable).with_name("ray"), "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
        more = ["--object-store-memory=80000000", "--min-worker-port=0", "--max-worker-port=0"]
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # the driver sends its code
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [*command, *more, *folder, *options],
                env={**own, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait(self) -> bool:
        """Wait until it is a part of the cluster; return whether it came to that."""
        wait_until(lambda: "Ray runtime started" in (self.folder / "log").read_text() or not self.is_running)
        return self.is_running

    def kill(self) -> None:
        """End all of its processes at once, as a power cut does."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def start_node(*options: str, **environment: str) -> Iterator[Node]:
    """Start a node. A raylet gives its agents 15 s to start: on a busy machine, that takes several tries."""
    node = Node(*options, **environment)
    try:
        while not node.wait():
            shutil.rmtree(node.folder)
            node = Node(*options, **environment)
        yield node
    finally:
        if node.is_running:
            node.kill()
        shutil.rmtree(node.folder, ignore_errors=True)


HERE = "--node-ip-address=127.0.0.1"


@contextmanager
def start_head(**environment: str) -> Iterator[str]:
    """Start a cluster of one node; yield its address."""
    head = f"127.0.0.1:{free_port()}"
    own = (f"--port={head[10:]}", f"--ray-client-server-port={free_port()}", "--include-dashboard=false")
    with start_node("--head", HERE, *own, **environment):
        yield head


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Start two nodes; return the address of the head."""
    with start_head() as head, start_node(f"--address={head}", HERE):
        yield head


@pytest.fixture
def data(tmp_path, monkeypatch) -> DataParameters:
    """Return parameters of two drawn archives, which are cut into 20 shards."""
    monkeypatch.setattr(index, "SHARD_SIZE", SHARD_SIZE)
    zips = [write_zip(tmp_path / name, faces(IMAGES // 2, start)) for name, start in (("a.zip", 0), ("b.zip", 500))]
    return DataParameters(sources=tuple(Source(name=str(path)) for path in zips), data_dir=str(tmp_path / "data"))


def hash_results(data: DataParameters) -> dict[str, str]:
    """Return the version, and the SHA-256 of what `prepare` left that follows from the images alone."""
    (folder,) = open_store(data.data_dir).splits().glob("[0-9a-f]*")
    files = [
        folder / "manifest.parquet",
        folder / "dataset.json",
        *open_store(data.data_dir).indexes().glob("*.parquet"),
    ]
    return {folder.name: ""} | {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def local(data, tmp_path) -> dict[str, str]:
    """Return the results of this machine alone."""
    alone = data.model_copy(update={"data_dir": str(tmp_path / "alone")})
    prepare(alone)
    return hash_results(alone)


@contextmanager
def watch_shards(data: DataParameters) -> Iterator[dict[str, set[int]]]:
    """Yield the inodes that each finished shard's file had: a second one means that it was made again."""
    seen, ended = defaultdict(set), threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            for file in open_store(data.data_dir).indexes().glob(".*.partial/[0-9]*.parquet"):
                with suppress(FileNotFoundError):
                    seen[f"{file.parent.name}/{file.name}"].add(file.stat().st_ino)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


def test_two_nodes_give_the_data_set_of_one_machine(cluster, data, local):
    there = data.model_copy(update={"cluster": cluster})
    with watch_shards(data) as seen:
        prepare(there)
    assert hash_results(there) == local
    assert len(seen) == 20


def test_a_node_that_is_killed_costs_only_what_it_was_at(cluster, data, local):
    there = data.model_copy(update={"cluster": cluster})
    with start_node(f"--address={cluster}", HERE) as node, watch_shards(data) as seen:
        killer = threading.Thread(target=lambda: (wait_until(lambda: len(seen) > 3), node.kill()))
        killer.start()
        prepare(there)
        killer.join()
    assert hash_results(there) == local
    assert [len(inodes) for inodes in seen.values()] == [1] * 20


def test_a_run_whose_driver_was_killed_goes_on(cluster, data, local):
    there = data.model_copy(update={"cluster": cluster})
    code = (
        "import sys; from deepfake_core.config import DataParameters; from deepfake_core.data import index\n"
        f"index.SHARD_SIZE = {SHARD_SIZE}; from flows.prepare import prepare\n"
        "prepare(DataParameters.model_validate_json(sys.argv[1]))"
    )
    environment = {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value()), "PYTHONPATH": str(ROOT)}
    with watch_shards(data) as seen:
        driver = subprocess.Popen([sys.executable, "-c", code, there.model_dump_json()], env=environment)
        wait_until(lambda: len(seen) > 3 or driver.poll() is not None)
        driver.kill()
        assert driver.wait() == -signal.SIGKILL
        prepare(there)
    assert hash_results(there) == local
    assert [len(inodes) for inodes in seen.values()] == [1] * 20


def test_a_shard_that_always_fails_is_named_and_the_others_are_kept(cluster, data):
    """Bytes of a member were lost after the zip was verified."""
    zip_file, store = Path(data.sources[0].name), open_store(data.data_dir)
    open_local(data.sources[0], store)
    before, whole = zip_file.stat(), zip_file.read_bytes()
    damaged = bytearray(whole)
    with zipfile.ZipFile(zip_file) as archive:
        damaged[archive.getinfo("real/9.jpg").header_offset + 200] ^= 255
    zip_file.write_bytes(damaged)
    os.utime(zip_file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with watch_shards(data) as seen, pytest.raises(ArchiveError, match=r"index shard a 54-60: .*'real/9.jpg'.*damaged"):
        prepare(data.model_copy(update={"cluster": cluster}))
    assert len(seen) >= 9
    assert all(len(list(folder.iterdir())) for folder in store.indexes().glob(".*.partial"))


def test_a_node_that_lacks_a_package_is_named_with_it(data, tmp_path):
    (tmp_path / "simplejpeg.py").write_text("raise ModuleNotFoundError('No module named simplejpeg')")
    with (
        start_head(PYTHONPATH=str(tmp_path)) as head,
        pytest.raises(ServiceError, match=r"ip=.* in index shard a 0-6.*No module named simplejpeg"),
    ):
        prepare(data.model_copy(update={"cluster": head}))


def test_a_cluster_that_is_not_there_is_refused_at_once(data):
    there = data.model_copy(update={"cluster": f"127.0.0.1:{free_port()}"})
    with pytest.raises(ServiceError, match=r"must name a running Ray cluster.*Connection refused"):
        prepare(there)


def test_a_cluster_without_a_prefect_server_is_refused():
    """Each worker of the cluster would start a server of its own."""
    with temporary_settings({PREFECT_API_URL: None}), pytest.raises(ConfigurationError, match="no PREFECT_API_URL"):
        run_shards(index_shard, ["a shard"], "auto")


def test_without_the_extra_the_error_says_what_to_install(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'deepfake-retraining\[cluster\]'"):
        prepare(data.model_copy(update={"cluster": "auto"}))
