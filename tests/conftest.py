"""Fixtures that several files of tests use."""

import itertools
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.builders import NAME, RECIPE, ROOT, faces, jpeg, stripes, write_zip

if TYPE_CHECKING:
    from deepfake_core.training.fit import Candidate
    from tests.kaggle_server import KaggleServer

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a busy machine, scikit-learn's threads spin: ten times the CPU

PROCESS_FIXTURES = {"chromium", "prefect_api", "served", "stack"}
FIRST = ("test_flows.py", "test_cluster.py", "test_stack.py", "test_packaging.py", "test_fit.py", "test_devices.py")
"""The files that take longest."""

TOGETHER = {
    **dict.fromkeys(
        (
            "test_flows.py",
            "test_batch_scoring.py",
            "test_production.py",
            "test_review.py",
            "test_store.py",
            "test_watch.py",
        ),
        "with server",
    ),
    **dict.fromkeys(("test_kills.py", "test_two_at_once.py"), "forked"),
}
"""Files that one process runs, so that Prefect's server, or what processes are forked from, starts once."""

buckets = itertools.count()

COLLECTED = pytest.StashKey[Counter[str]]()
"""How many cases each test has, whatever marks are asked for."""


@pytest.hookimpl(tryfirst=True)  # before those of other marks are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests whose fixtures start a process, and begin with the files that take longest."""
    config.stash[COLLECTED] = Counter(item.nodeid.partition("[")[0] for item in items)
    for item in items:
        if PROCESS_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("process")
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Give each process whole files, as fixtures of a module are made once for it."""

    class FileScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return TOGETHER.get(Path(file).name, file)

    return FileScheduling(config, log)


@pytest.fixture(autouse=True)
def forbid_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that starts a process and is not marked so, since `make test-fast` would run it; git may be asked."""
    if request.node.get_closest_marker("process"):
        return
    start = subprocess.Popen.__init__

    def start_git(self: subprocess.Popen, command: Any, *arguments: Any, **named: Any) -> None:
        name = command if isinstance(command, str) else command[0]
        assert Path(str(name)).name == "git", f"this test starts {name}: mark it with pytest.mark.process"
        start(self, command, *arguments, **named)

    monkeypatch.setattr(subprocess.Popen, "__init__", start_git)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of this run of the tests that all of its processes share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def candidate(shared_folder: Path) -> "Candidate":
    """Train a small network, once for all processes; whoever changes its folder copies it first."""
    from deepfake_core.training.fit import Training, train_candidate

    with filelock.FileLock(shared_folder / "candidate.lock"):
        return train_candidate(
            Training("cnn", RECIPE, seed=1), stripes(96, 0), stripes(32, 1), shared_folder / "candidate"
        )


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["KaggleServer"]:
    """Let this process find Kaggle on loopback, with nothing in it yet."""
    from tests.kaggle_server import HIDDEN, KaggleServer

    folder = tmp_path / "kaggle"
    folder.mkdir()
    for name in HIDDEN:
        monkeypatch.delenv(name, raising=False)
    with KaggleServer(folder) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """Serve S3 on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a bucket, and let this process see it with credentials."""
    import fsspec

    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "XDG_CACHE_HOME": str(tmp_path / "a"),
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # each holds the endpoint and credentials of its first use
    bucket = f"faces-{next(buckets)}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}/deepfake"


@pytest.fixture(scope="session")
def chromium() -> str:
    """Return the path of Debian's browser; `make browser` installs it."""
    path = shutil.which("chromium")
    if path is None:
        message = "no chromium here: `make browser` installs Debian's"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture
def make_zip(tmp_path: Path) -> Callable[..., Path]:
    def make(members: Mapping[str, bytes], name: str = "faces.zip") -> Path:
        return write_zip(tmp_path / "sources" / name, members)

    return make


@pytest.fixture(scope="session")
def empty_database(shared_folder: Path) -> Path:
    """Return an MLflow database that holds nothing yet: making its tables takes seconds."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    database = shared_folder / "empty.db"
    with filelock.FileLock(shared_folder / "empty.lock"):
        if not database.exists():
            SqlAlchemyStore(f"sqlite:///{shared_folder}/making.db", str(shared_folder / "mlruns"))
            (shared_folder / "making.db").rename(database)
    return database


@pytest.fixture(scope="session")
def put_mlflow(empty_database: Path) -> Callable[[pytest.MonkeyPatch, Path], None]:
    """Return a function that puts an MLflow, which is empty, into a folder that becomes the current one."""

    def put(patch: pytest.MonkeyPatch, folder: Path) -> None:
        patch.chdir(folder)
        shutil.copy(empty_database, folder / "mlflow.db")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")

    return put


@pytest.fixture
def tracking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put_mlflow: Callable[[pytest.MonkeyPatch, Path], None]
) -> Path:
    """Put MLflow into a folder of its own, which is also the current folder."""
    put_mlflow(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def retrain_folder(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Path]:
    """Return a folder with an MLflow and a zip, for the processes of `small_retrain`."""
    from deepfake_core.registry import connection, names
    from tests import small_retrain

    folder = tmp_path_factory.mktemp("retrain") / "work"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    write_zip(folder / small_retrain.ZIP, faces(12))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        small_retrain.processes.set_forkserver_preload(["tests.fork_server"])
        patch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")  # else a file that is replaced stays open
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        connection.connect().create_experiment(names.EXPERIMENT, str(folder / "mlruns" / "1"))
        yield folder


@pytest.fixture(scope="module")
def registered_once(candidate, put_mlflow, tmp_path_factory):
    from deepfake_core.registry import detectors, runs

    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        put_mlflow(patch, folder)
        with runs.open_run("retrain") as parent:
            with runs.open_run("cnn", parent) as run_id:
                runs.log_parameters(run_id, {"training": {"epochs": 3, "augmentation": {"zoom": 0.1}}})
                runs.log_metrics(run_id, {"test/auc": 0.9, "test/precision": 0.8, "test/recall": 0.7})
            version = detectors.register_detector(run_id, candidate.folder, NAME, jpeg(1), {"flow_run_id": "f1"})
    return folder, (parent, run_id, version)


@pytest.fixture
def registered(registered_once, monkeypatch):
    """Give the parent run, the candidate's run and the version, in an MLflow that holds just these."""
    from deepfake_core.registry import connection

    folder, ids = registered_once
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    connection.connect()
    return ids


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[None]:
    """Run flows against a temporary Prefect server with a database of its own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=1200):
        yield
