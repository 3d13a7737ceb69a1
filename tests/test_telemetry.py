"""Nothing that runs here talks to others: connections are recorded by strace, with its children's and C++'s.

It sees what is tried while a command runs, whether it succeeds or not. It can't see what would be sent later, such as
ONNX Runtime's first upload some seconds after a model is loaded; but it writes a device id into the home folder before.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest
import yaml
from dotenv import dotenv_values

from deepfake_core import TELEMETRY
from deepfake_core.registry import detectors, runs
from deepfake_core.registry.connection import connect
from tests.builders import (
    FORMER,
    NAME,
    ROOT,
    copy_former,
    draw_portrait,
    encode,
    faces,
    free_port,
    jpeg,
    wait_until,
    write_zip,
)

pytestmark = pytest.mark.sweep

STRACE = shutil.which("strace") or ""
CLI = (sys.executable, "-m", "deepfake_core.cli")
ADDRESS = re.compile(r'htons\((\d+)\),[^"]*inet_(?:addr\(|pton\(AF_INET6, )"([^"]+)"')


def can_trace() -> bool:
    return (
        bool(STRACE) and subprocess.run([STRACE, "-qq", "-o", "/dev/null", "true"], capture_output=True).returncode == 0
    )


needs_strace = pytest.mark.skipif(
    not can_trace(), reason="connections can't be recorded: no strace, or it may not trace"
)


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def record(home, tmp_path) -> Callable[..., subprocess.Popen]:
    """Start a command whose connections are written to the file `connections`.

    Its environment is a person's: without the switches of this process, or what tells libraries that a test runs.
    """
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "MLFLOW_TRACKING_URI") if name in os.environ}
    environment = {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}

    def start(*command: str | Path, **more: str) -> subprocess.Popen:
        watch = [STRACE, "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-e", "signal=none"]
        return subprocess.Popen(
            [*watch, "-o", tmp_path / "connections", *command],
            env={**environment, **more},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def finish(process: subprocess.Popen) -> str:
    shown, _ = process.communicate()
    assert process.returncode in (0, -signal.SIGINT), shown
    return shown


def read_connections(tmp_path: Path) -> set[str]:
    """Return the addresses outside this machine that were tried, a name server's among them.

    Port 0 only asks the kernel for a route, and sends nothing.
    """
    found = ADDRESS.findall((tmp_path / "connections").read_text())
    tried = {ip_address(address.removeprefix("::ffff:")) for port, address in found if port != "0"}
    return {str(address) for address in tried if not address.is_loopback}


def check_silence(tmp_path: Path, home: Path) -> None:
    assert read_connections(tmp_path) == set()
    assert not list(home.rglob("*onnxruntime*"))


@pytest.mark.process
@needs_strace
def test_what_is_tried_is_recorded(record, tmp_path):
    code = "import socket; s = socket.socket(); s.settimeout(1); s.connect_ex(('192.0.2.7', 443))"
    finish(record(sys.executable, "-c", code))
    assert read_connections(tmp_path) == {"192.0.2.7"}


@pytest.mark.process
@pytest.mark.slow
@needs_strace
def test_telemetry_can_be_turned_on(record, home, tmp_path):
    (tmp_path / "face.png").write_bytes(encode(draw_portrait(1), "PNG"))
    finish(record(*CLI, "predict", "face.png", "--model", FORMER, ORT_DISABLE_TELEMETRY="0"))
    assert list(home.rglob("*onnxruntime*")), "what the tests below look for must be there if telemetry is on"


@pytest.mark.process
@pytest.mark.slow
@needs_strace
def test_predict_connects_to_nobody(record, home, tmp_path):
    (tmp_path / "face.png").write_bytes(encode(draw_portrait(1), "PNG"))
    assert "face.png" in finish(record(*CLI, "predict", "face.png", "--model", FORMER))
    check_silence(tmp_path, home)


@pytest.mark.process
@pytest.mark.slow
@needs_strace
def test_the_page_connects_to_nobody(record, home, tmp_path):
    port = free_port()
    page = record(*CLI, "serve", "--model", FORMER, "--port", str(port))

    def answers() -> bool:
        assert page.poll() is None, page.communicate()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/config") as answer:
                return answer.status == 200
        except OSError:
            return False

    wait_until(answers)
    child = Path(f"/proc/{page.pid}/task/{page.pid}/children").read_text().split()[0]
    os.kill(int(child), signal.SIGTERM)  # SIGINT is ignored by what a shell started in the background
    page.communicate()
    check_silence(tmp_path, home)


@pytest.mark.process
@pytest.mark.slow
@needs_strace
def test_a_registered_model_connects_to_nobody(tracking, record, home):
    """Neither listed, nor loaded by MLflow in a program that knows nothing of this project."""
    connect()
    with runs.open_run("cnn") as run_id:
        folder = copy_former(tracking / "detector")
        detectors.register_detector(run_id, folder, NAME, jpeg(1), {})
    assert "1" in finish(record(*CLI, "versions"))
    check_silence(tracking, home)
    (tracking / "face.jpg").write_bytes(jpeg(1))
    code = (
        "import mlflow, pandas; from pathlib import Path\n"
        f"model = mlflow.pyfunc.load_model('models:/{NAME}/1')\n"
        "print(model.predict(pandas.DataFrame({'image': [Path('face.jpg').read_bytes()]})))"
    )
    assert "fake_probability" in finish(record(sys.executable, "-c", code, PYTHONPATH=""))
    check_silence(tracking, home)


@pytest.mark.process
@pytest.mark.slow
@needs_strace
def test_a_flow_and_its_temporary_server_connect_to_nobody(record, home, tmp_path):
    archive = write_zip(tmp_path / "faces.zip", faces(60))
    code = (
        "import sys; from flows.prepare import prepare; from deepfake_core.config import DataParameters, Source\n"
        "prepare(DataParameters(sources=(Source(name=sys.argv[1]),), data_dir='data'))"
    )
    finish(record(sys.executable, "-c", code, archive, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="1200"))
    assert list((tmp_path / "data" / "splits").glob("*/dataset.json"))
    check_silence(tmp_path, home)


def test_the_stack_and_the_image_turn_off_the_same():
    assert dotenv_values(ROOT / "deployments" / "stack.env").items() >= TELEMETRY.items()
    image = (ROOT / "deployments" / "Dockerfile").read_text()
    assert [name for name, off in TELEMETRY.items() if f"{name}={off} \\\n" not in image] == []
    services = yaml.safe_load((ROOT / "deployments" / "compose.yaml").read_text())["services"]
    for name in services.keys() - {"postgres"}:
        assert services[name]["environment"].items() >= {switch: f"${{{switch}}}" for switch in TELEMETRY}.items()
