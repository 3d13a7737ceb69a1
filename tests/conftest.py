"""Small real things that tests share: drawn images, zips, a temporary Prefect and MLflow."""

import io
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from PIL import Image

from deepfake_core.demo import faces, forgeries

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

T = TypeVar("T")
SHARED = Path(__file__).parents[2] / "shared"

needs_shared = pytest.mark.skipif(
    not (SHARED / "build_archives.py").is_file(), reason="the shared face images lie beside the checkout; not here"
)


LONGEST = ("test_stack.py", "test_flows.py", "test_training.py", "test_production.py", "test_devices.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def draw_image(seed: int, size: int = 48, cells: int = 6) -> Image.Image:
    """Draw a random picture of so many smooth cells a side; other seeds give other pictures."""
    coarse = np.random.default_rng(seed).integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def draw_portrait(seed: int, size: int = 160) -> Image.Image:
    """Draw a person, whose face a detector finds."""
    random = np.random.default_rng(seed)
    return forgeries.take_photograph(random, faces.Pose.draw(random), size)


def draw_scene(people: Mapping[tuple[int, int], Image.Image], width: int = 640, height: int = 480) -> Image.Image:
    """Paste people at their left and top onto a background without faces."""
    scene = draw_image(99, max(width, height), cells=4).crop((0, 0, width, height))
    for corner, person in people.items():
        scene.paste(person, corner)
    return scene


def jpeg(seed: int, size: int = 48) -> bytes:
    return encode(draw_image(seed, size), quality=90)


def recode(data: bytes) -> bytes:
    """Return other bytes with the same pixels: a JPEG with a comment segment."""
    return data[:2] + b"\xff\xfe\x00\x07hello" + data[2:]


def write_zip(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


def faces(count: int, start: int = 0) -> dict[str, bytes]:
    """Return `count` images per class, as members of a zip."""
    members = {f"real/{i}.jpg": jpeg(start + i) for i in range(count)}
    return members | {f"fake/{i}.jpg": jpeg(10_000 + start + i) for i in range(count)}


def free_port() -> int:
    """Return a port on loopback that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until(condition: Callable[[], T], seconds: float) -> T:
    """Return the condition's value once it is true; fail after some seconds."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"nothing happened in {seconds} s"
        time.sleep(1)
    return result


@contextmanager
def hold_data(data_dir: Path, holder: str) -> Iterator[subprocess.Popen]:
    """Let another process hold the data folder's lock; it is killed at the end."""
    code = (
        "import sys, time; from pathlib import Path; from deepfake_core.manifest import lock_folder\n"
        "with lock_folder(Path(sys.argv[1]), sys.argv[2]): print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(data_dir), holder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            yield other
        finally:
            other.kill()


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


@pytest.fixture
def tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put MLflow into a folder of its own, which is also the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[None]:
    """Run flows against a temporary Prefect server with a database of its own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield
