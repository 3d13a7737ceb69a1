"""`prepare` and `score` on a Ray cluster of two nodes, each a few processes of this machine with its own folder."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pandas as pd
import psutil
import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from deepfake_core.config import DataParameters, Source
from deepfake_core.data import index
from deepfake_core.data.local import open_local
from deepfake_core.data.shards import remove_shards
from deepfake_core.errors import ArchiveError, ConfigurationError, ServiceError
from deepfake_core.serving import batch_scoring
from deepfake_core.serving.batch_scoring import ScoreShard, cut_images, join_shards
from deepfake_core.serving.load_versions import Judge
from deepfake_core.storage.store import Store, open_store
from flows.prepare import prepare
from tasks.data import index_shard
from tasks.scoring import score_shard
from tasks.shards import CODE, run_shards
from tests.builders import (
    ROOT,
    copy_former,
    faces,
    forbid,
    free_port,
    jpeg,
    keep_download,
    score_images,
    wait_until,
    write_zip,
)

pytestmark = [
    pytest.mark.usefixtures("prefect_api"),
    pytest.mark.cluster,
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.sweep,
    pytest.mark.skipif(find_spec("ray") is None, reason="the extra `cluster` is not installed"),
]

SHARD_SIZE = 6
IMAGES = 60
"""Of each class: 20 shards."""

ATTEMPTS = 10
"""A raylet ends if its agent takes over 15 s to start, which on a busy machine it does; no option changes that."""


class Node:
    """A node, which is some processes of this machine."""

    def __init__(self, *options: str, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # a socket's path has 107 bytes at most
        self.address, self.client = (f"{scheme}127.0.0.1:{free_port()}" for scheme in ("", "ray://"))
        command = [Path(sys.executable).with_name("ray"), "start", "--block", "--disable-usage-stats"]
        own = ["--node-ip-address=127.0.0.1", "--object-store-memory=80000000", "--include-log-monitor=false"]
        own += ["--min-worker-port=0", "--max-worker-port=0"]
        if "--head" in options:  # others take the head's folder
            port, client_port = (address.rpartition(":")[2] for address in (self.address, self.client))
            own += [f"--temp-dir={self.folder}", f"--port={port}", f"--ray-client-server-port={client_port}"]
            own += ["--include-dashboard=false"]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # the driver sends its code
        patience = {"RAY_worker_register_timeout_seconds": "600"}  # instead of 60
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *own, *options], env={**clean, **patience, **environment}, stdout=log, stderr=log
            )

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def wait(self) -> bool:
        """Wait until it is a part of the cluster; return whether it came to that, and all of its processes run."""
        wait_until(lambda: "Ray runtime started" in self.log.read_text() or self.has_ended)
        return not self.has_ended

    @property
    def has_ended(self) -> bool:
        if self.process.poll() is not None:
            return True
        with suppress(psutil.NoSuchProcess):  # one that is of no importance ended meanwhile
            children = psutil.Process(self.process.pid).children()
            return any(child.name() == "raylet" and child.status() == psutil.STATUS_ZOMBIE for child in children)
        return False

    def kill(self) -> None:
        """End all of its processes at once, as a power cut does."""
        if self.process.poll() is None:  # else Ray ended them
            for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def start_node(*options: str, **environment: str) -> Iterator[Node]:
    """Start a node; skip the test if Ray does not start here."""
    for _ in range(ATTEMPTS):
        node = Node(*options, **environment)
        try:
            if node.wait():
                yield node
                return
            said = node.log.read_text()[-500:]
        finally:
            node.kill()
            shutil.rmtree(node.folder, ignore_errors=True)
    pytest.skip(f"Ray does not start here: each of {ATTEMPTS} times, a process of it ended. It said: {said}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Node]:
    """Start two nodes of a core each; return the head."""
    with start_node("--head", "--num-cpus=1") as head, start_node(f"--address={head.address}", "--num-cpus=1"):
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


def list_shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the finished shards below a folder; a shard that is made again is another file."""
    files = {file: file.stat() for file in folder.rglob("[0-9]*-[0-9]*.parquet")}
    return {f"{file.parent.name}/{file.name}": (found.st_ino, found.st_mtime_ns) for file, found in files.items()}


@pytest.fixture
def used(monkeypatch) -> dict[str, tuple[int, int]]:
    """Return the shards that an index was made of, once it is."""
    shards: dict[str, tuple[int, int]] = {}

    def remove(store: Store, name: str) -> None:
        shards.update(list_shards(store.shards(name)))
        remove_shards(store, name)

    monkeypatch.setattr(index, "remove_shards", remove)
    return shards


HELD = """
import importlib, pathlib, sys, time
sys.path.remove({path!r})
del sys.modules["simplejpeg"]
real = importlib.import_module("simplejpeg")
decode_jpeg = real.decode_jpeg

def decode(*given, **named):
    if len(list(pathlib.Path({data!r}).rglob("[0-9]*-[0-9]*.parquet"))) >= 4:
        pathlib.Path({path!r}, "held").touch()
        time.sleep(100_000)
    return decode_jpeg(*given, **named)

real.decode_jpeg = decode
"""


@pytest.fixture
def held(data, tmp_path) -> Path:
    """Return a folder for the path of Python, with which a node decodes no more after four shards.

    It also holds another commit of the product.
    """
    path = tmp_path / "held"
    for name in CODE:
        (path / name).mkdir(parents=True)
        (path / name / "__init__.py").write_text("raise ImportError('this is another commit')")
    (path / "simplejpeg.py").write_text(HELD.format(path=str(path), data=str(open_store(data.data_dir).indexes())))
    return path


def test_two_nodes_give_the_data_set_of_one_machine(cluster, data, local, used):
    there = data.model_copy(update={"cluster": cluster.address})
    prepare(there)
    assert hash_results(there) == local
    assert len(used) == 20


def test_two_nodes_find_the_near_copies_that_one_machine_finds(cluster, data, monkeypatch, tmp_path):
    monkeypatch.setattr("deepfake_core.data.neighbours.MAX_EXACT_COMPARISONS", 0)  # as among many
    monkeypatch.setattr("deepfake_core.data.hash_tables.TABLES", 400)
    alone = data.model_copy(update={"data_dir": str(tmp_path / "alone")})
    prepare(alone)
    monkeypatch.setattr("deepfake_core.data.search_shards.PAIRS_IN_SHARD", 5)
    for step in ("compare_tables", "measure_pairs"):
        forbid(monkeypatch, f"deepfake_core.data.search_shards.{step}")  # here; nodes have their own
    there = data.model_copy(update={"cluster": cluster.address})
    prepare(there)
    assert hash_results(there) == hash_results(alone)


def test_a_node_that_is_killed_costs_only_what_it_was_at(data, local, held, used):
    """It is the only one with a core. The run waits for the next."""
    before: dict[str, tuple[int, int]] = {}

    def replace(head: Node, node: Node) -> None:
        wait_until(lambda: (held / "held").exists() or prepared.is_set())
        before.update(list_shards(open_store(data.data_dir).indexes()))
        node.kill()
        with start_node(f"--address={head.address}", "--num-cpus=1"):
            prepared.wait()

    prepared = threading.Event()
    with (
        start_node("--head", "--num-cpus=0") as head,
        start_node(f"--address={head.address}", "--num-cpus=1", PYTHONPATH=str(held)) as node,
        ThreadPoolExecutor() as beside,
    ):
        replaced = beside.submit(replace, head, node)
        there = data.model_copy(update={"cluster": head.address})
        try:
            prepare(there)
        finally:
            prepared.set()
        replaced.result()
    assert hash_results(there) == local
    assert len(before) == 4
    assert before.items() <= used.items()


@pytest.fixture
def to_score(tmp_path, monkeypatch) -> list[ScoreShard]:
    """Return 20 shards of a folder of 100 images."""
    monkeypatch.setattr(batch_scoring, "SHARD_IMAGES", 5)
    (tmp_path / "images").mkdir()
    for name, data in faces(50).items():
        (tmp_path / "images" / name.replace("/", "-")).write_bytes(data)
    judge = Judge(copy_former(tmp_path / "model"), detect=False)
    return cut_images(tmp_path / "images", tmp_path / "there.parquet", judge)


@flow
def score_there(shards: list[ScoreShard], cluster: str) -> None:
    run_shards(score_shard, shards, cluster)


def test_two_nodes_give_the_scores_of_one_machine(cluster, to_score, tmp_path, monkeypatch):
    """At most twice as many shards as cores are handed to Ray at once."""
    from prefect_ray.task_runners import PrefectRayFuture, RayTaskRunner

    in_progress, most = set(), []

    def submit(runner, *given, real=RayTaskRunner.submit, **named):
        future = real(runner, *given, **named)
        in_progress.add(future.task_run_id)
        most.append(len(in_progress))
        return future

    def wait(future, *given, real=PrefectRayFuture.wait, **named):
        real(future, *given, **named)
        in_progress.discard(future.task_run_id)

    monkeypatch.setattr(RayTaskRunner, "submit", submit)
    monkeypatch.setattr(PrefectRayFuture, "wait", wait)
    score_there(to_score, cluster.address)
    assert (len(most), max(most), in_progress) == (20, 4, set())
    there = join_shards(to_score, tmp_path / "there.parquet")
    here = score_images(to_score[0].judge, to_score[0].images, tmp_path / "here.parquet")
    assert there == here
    assert here.images == 100
    scores = [pd.read_parquet(tmp_path / name) for name in ("here.parquet", "there.parquet")]
    pd.testing.assert_frame_equal(*scores)


def test_a_node_that_is_killed_while_it_scores_costs_only_what_it_was_at(to_score):
    """It is the only one with a core. The run waits for the next."""
    folder, before = to_score[0].folder, dict[str, tuple[int, int]]()

    def replace(head: Node, node: Node) -> None:
        wait_until(lambda: len(list_shards(folder)) >= 4 or scored.is_set())
        node.kill()
        before.update(list_shards(folder))
        with start_node(f"--address={head.address}", "--num-cpus=1"):
            scored.wait()

    scored = threading.Event()
    with (
        start_node("--head", "--num-cpus=0") as head,
        start_node(f"--address={head.address}", "--num-cpus=1") as node,
        ThreadPoolExecutor() as beside,
    ):
        replaced = beside.submit(replace, head, node)
        try:
            score_there(to_score, head.address)
        finally:
            scored.set()
        replaced.result()
    assert 4 <= len(before) < len(to_score)
    assert before.items() <= list_shards(folder).items()
    assert all(shard.is_done for shard in to_score)


def test_a_surviving_node_scores_what_a_killed_one_was_at(to_score):
    folder, before = to_score[0].folder, dict[str, tuple[int, int]]()

    def kill(node: Node) -> None:
        wait_until(lambda: len(list_shards(folder)) >= 4 or scored.is_set())
        node.kill()
        before.update(list_shards(folder))

    scored = threading.Event()
    with (
        start_node("--head", "--num-cpus=1") as head,
        start_node(f"--address={head.address}", "--num-cpus=1") as node,
        ThreadPoolExecutor() as beside,
    ):
        killed = beside.submit(kill, node)
        try:
            score_there(to_score, head.address)
        finally:
            scored.set()
        killed.result()
    assert 4 <= len(before) < len(to_score)
    assert before.items() <= list_shards(folder).items()
    assert all(shard.is_done for shard in to_score)


def test_images_that_a_node_has_otherwise_are_named_and_stop_the_run(cluster, to_score):
    (to_score[0].images / "a.jpg").write_bytes(jpeg(1))  # the first by name, so that all others move
    with pytest.raises(ConfigurationError, match=r"score shard images 0-5: Images must stay as they are"):
        score_there(to_score, cluster.address)


def kill_driver(data: DataParameters, away: str = "") -> None:
    """Run `prepare` in a process that is killed while it waits for its fifth shard.

    Args:
        away: a folder that is renamed before the nodes begin.
    """
    code = (
        "import itertools, os, sys; from deepfake_core.config import DataParameters\n"
        "import flows.prepare; from deepfake_core.data import index; from flows.prepare import prepare, run_shards\n"
        "from prefect_ray.task_runners import PrefectRayFuture; waits = itertools.count(1)\n"
        "wait, die = PrefectRayFuture.wait, lambda: os.kill(os.getpid(), 9)\n"
        "PrefectRayFuture.wait = lambda future: die() if next(waits) == 5 else wait(future)\n"
        "hide = lambda folder: folder and os.rename(folder, f'{folder}-away')\n"
        "sys.modules['flows.prepare'].run_shards = lambda *given: hide(sys.argv[2]) or run_shards(*given)\n"
        f"index.SHARD_SIZE = {SHARD_SIZE}; prepare(DataParameters.model_validate_json(sys.argv[1]))"
    )
    environment = {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value()), "PYTHONPATH": str(ROOT)}
    driver = subprocess.run([sys.executable, "-c", code, data.model_dump_json(), away], env=environment)
    assert driver.returncode == -signal.SIGKILL


def test_a_run_whose_driver_was_killed_goes_on(cluster, data, local, used):
    """The next run connects as a machine that is no node does."""
    kill_driver(data.model_copy(update={"cluster": cluster.address}))
    before = list_shards(open_store(data.data_dir).indexes())
    assert len(before) >= 4
    there = data.model_copy(update={"cluster": cluster.client})

    def prepare_there() -> bool:
        """Return whether it came to a connection: on a busy machine, Ray may fail at that."""
        with suppress(ServiceError):
            prepare(there)
            return True
        return False

    wait_until(prepare_there)
    assert hash_results(there) == local
    assert before.items() <= used.items()


def list_objects(store: Store) -> dict[str, str]:
    """Return the finished shards at the store's URL, each with the time at which it was written."""
    folders = [store.indexes() / name for name in store.list_names(store.indexes())]
    files = fsspec.filesystem("s3")
    addresses = [store.address_of(folder / name) for folder in folders for name in store.list_names(folder)]
    return {address: str(files.info(address)["LastModified"]) for address in addresses}


def test_nodes_without_a_shared_disk_read_and_write_at_the_url(data, s3_url, tmp_path, monkeypatch):
    """While they work, what is on the driver's disk is away. A driver that was killed goes on."""
    sources = tuple(Source(name=f"owner/{Path(source.name).stem}-faces", version=1) for source in data.sources)
    stores = [open_store(address) for address in (tmp_path / "alone", s3_url)]
    for store in stores:
        for source, kaggle in zip(data.sources, sources, strict=True):
            keep_download(Path(source.name), kaggle, store)
    prepare(DataParameters(sources=sources, data_dir=str(tmp_path / "alone")))
    store, used = stores[1], {}

    @contextmanager
    def hide() -> Iterator[None]:
        store.folder.rename(f"{store.folder}-away")
        yield
        assert not store.folder.exists()
        Path(f"{store.folder}-away").rename(store.folder)

    def run_without_disk(task, shards, cluster):
        with hide():
            run_shards(task, shards, cluster)
            used.update(list_objects(store))

    monkeypatch.setattr("flows.prepare.run_shards", run_without_disk)
    forbid(monkeypatch, "deepfake_core.data.index.index_members")  # the driver makes no shard of its own
    with start_node("--head", "--num-cpus=1", XDG_CACHE_HOME=str(tmp_path / "node")) as head:
        there = DataParameters(sources=sources, data_dir=s3_url, cluster=head.address)
        kill_driver(there, str(store.folder))
        before = list_objects(store)
        Path(f"{store.folder}-away").rename(store.folder)
        prepare(there)
    assert 4 <= len(before) < len(used) == 20
    assert before.items() <= used.items()
    results = [hash_results(DataParameters(data_dir=store.address)) for store in stores]
    assert results[0] == results[1]
    assert list_objects(store) == {}
    assert not [file for file in (tmp_path / "node").rglob("*") if file.match("deepfake/*") or file.suffix == ".zip"]


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
    with pytest.raises(ArchiveError, match=r"index shard a 54-60: .*'real/9.jpg'.*damaged"):
        prepare(data.model_copy(update={"cluster": cluster.address}))
    assert len(list_shards(store.indexes())) >= 9


def test_a_node_that_lacks_a_package_is_named_with_it(data, tmp_path):
    (tmp_path / "simplejpeg.py").write_text("raise ModuleNotFoundError('No module named simplejpeg')")
    with (
        start_node("--head", "--num-cpus=1", PYTHONPATH=str(tmp_path)) as head,
        pytest.raises(ServiceError, match=r"ip=.* in index shard a 0-6.*No module named simplejpeg"),
    ):
        prepare(data.model_copy(update={"cluster": head.address}))


def test_a_node_without_memory_is_said_and_what_to_do(data):
    """Ray ends a task on a node whose memory is nearly used up; here any use of it is too much."""
    limits = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
    with (
        start_node("--head", "--num-cpus=1", **limits) as head,
        pytest.raises(ServiceError, match=r"must have memory for a shard.*in index shard a 0-6.*fewer cores"),
    ):
        prepare(data.model_copy(update={"cluster": head.address}))


def test_a_cluster_that_is_not_there_is_refused_at_once(data):
    there = data.model_copy(update={"cluster": f"127.0.0.1:{free_port()}"})
    with pytest.raises(ServiceError, match=r"must name a running Ray cluster.*Connection refused"):
        prepare(there)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_something_else_answers_is_refused(data, scheme):
    """It is that of Prefect's server."""
    there = data.model_copy(update={"cluster": f"{scheme}{urlsplit(PREFECT_API_URL.value()).netloc}"})
    with pytest.raises(ServiceError, match=r"must name a running Ray cluster.*Compare with `ray status`") as refusal:
        prepare(there)
    assert "\n" not in str(refusal.value)


def test_a_cluster_without_a_prefect_server_is_refused():
    """Each worker of the cluster would start a server of its own."""
    with temporary_settings({PREFECT_API_URL: None}), pytest.raises(ConfigurationError, match="no PREFECT_API_URL"):
        run_shards(index_shard, ["a shard"], "auto")


def test_without_the_extra_the_error_says_what_to_install(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'deepfake-retraining\[cluster\]'"):
        prepare(data.model_copy(update={"cluster": "auto"}))
