"""The page, in a real browser, with versions from a real registry."""

import contextlib
import http.client
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from PIL import Image
from pyarrow import parquet

from deepfake_core.cli import main
from deepfake_core.detector import Detector
from deepfake_core.errors import ModelError
from deepfake_core.monitoring.observations import read_window
from deepfake_core.monitoring.observer import open_observer
from deepfake_core.registry import connection, detectors, production, runs, versions
from deepfake_core.serving import page as page_server
from deepfake_core.serving import uploads
from deepfake_core.serving.verdict import Verdict
from tests.builders import NAME, ROOT, draw_portrait, draw_scene, free_port, jpeg, needs_gradio, wait_until, write_clip

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = needs_gradio


@pytest.fixture(scope="module")
def served(candidate, put_mlflow, tmp_path_factory):
    """Serve the page, with version 1 in production; yield its address."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        put_mlflow(patch, folder)
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        patch.setattr(page_server, "MAX_UPLOAD_BYTES", 1_000_000)
        patch.setattr(page_server, "MAX_ALIAS_AGE_SECONDS", 0)
        patch.setattr(page_server, "MAX_SESSIONS", 20)
        for _ in range(2):
            with runs.open_run("cnn") as run_id:
                version = detectors.register_detector(run_id, candidate.folder, NAME, jpeg(1), {})
        assert version == "2"
        production.move_production(NAME, "1", None, "test")
        port = free_port()
        launched = page_server.launch_page(page_server.ModelKeeper(f"models:/{NAME}@production", detect=True), port)
        yield f"http://127.0.0.1:{port}", port, launched
        launched.close()


@pytest.fixture
def page(chromium, served):
    """Open the page, and fail if it asks any other host or raises an error."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(0)  # the test's own limit is enough
        asked, failures = set(), []
        page.on("request", lambda request: asked.add(request.url))
        page.on("pageerror", lambda error: failures.append(error))
        page.goto(served[0])
        yield page
        assert {re.sub(r"(^\w+://[^/]*).*", r"\1", url) for url in asked if "://" in url} == {served[0]}
        assert not failures
        browser.close()


def drop(page, file):
    page.locator("input[type=file]").first.set_input_files(file)
    return page


@pytest.mark.parametrize(
    ("verdicts", "headline"),
    [
        ([("fake", True)], "Fake, P(fake) = 0.80"),
        ([("fake", None)], "Fake, P(fake) = 0.80"),
        ([("fake", False)], "Not sure: perhaps fake, P(fake) = 0.80"),
        ([("fake", True), ("real", True)], "1 of 2 faces is judged fake"),
        (
            [("fake", False), ("fake", False), ("real", True)],
            "2 of 3 faces are judged fake; 2 of the verdicts are not sure",
        ),
        ([("real", False), ("real", None)], "None of 2 faces are judged fake; 1 of the verdicts is not sure"),
    ],
)
def test_the_headline_says_what_is_not_sure(candidate, verdicts, headline):
    found = [Verdict("a.jpg", number, None, label, 0.8, 0.5, sure) for number, (label, sure) in enumerate(verdicts, 1)]
    text = page_server.write_verdict(found, f"{NAME} version 1", Detector(candidate.folder))
    assert re.findall("<h2>(.*)</h2>", text) == [headline]


@pytest.mark.slow
def test_an_image_gets_its_verdict_heat_map_and_version(page, tmp_path):
    draw_scene({(40, 60): draw_portrait(1, 200), (300, 250): draw_portrait(2, 150)}).save(tmp_path / "scene.png")
    drop(page, tmp_path / "scene.png").get_by_text(f"Judged by {NAME} version").wait_for()
    page.get_by_role("heading", name=re.compile(r"(None|1|2) of 2 faces (is|are) judged fake")).wait_for()
    sync_api.expect(page.get_by_text("P(fake) =")).to_have_count(2, timeout=0)
    sync_api.expect(page.locator("img[src*='/file=']")).to_have_js_property("naturalWidth", 640, timeout=0)
    assert not page.get_by_text("Over time").is_visible()


@pytest.mark.slow
def test_a_clip_gets_a_timeline(page, tmp_path):
    people = [draw_scene({(40 + number, 60): draw_portrait(1, 200)}) for number in range(30)]
    drop(page, write_clip(tmp_path / "clip.mp4", people)).get_by_text("over 30 frames").wait_for()
    page.get_by_text("Over time").wait_for()


@pytest.mark.slow
def test_what_is_no_image_shows_no_face_or_is_too_large_is_said(page, served, tmp_path):
    (tmp_path / "<b>words.jpg").write_text("words")
    drop(page, tmp_path / "<b>words.jpg").get_by_text("No verdict: must be a JPEG, PNG or WebP image").wait_for()
    page.goto(served[0])
    Image.new("RGB", (300, 300), "grey").save(tmp_path / "wall.png")
    drop(page, tmp_path / "wall.png").get_by_text("No verdict: no face was found").wait_for()
    page.goto(served[0])
    (tmp_path / "large.jpg").write_bytes(jpeg(1) + bytes(2_000_000))
    drop(page, tmp_path / "large.jpg").get_by_text("exceed the maximum allowed size").first.wait_for()


def call(served, data, **headers):
    """Call the page's function as a program does; return the answer, or what it ended with."""
    api = f"{served[0]}/gradio_api/call/judge"
    called = requests.post(api, json={"data": [data]}, headers=headers)
    if not called.ok:
        return called
    return requests.get(f"{api}/{called.json()['event_id']}")


def send(served, file):
    """Upload a file and have it judged; return the answer's text."""
    with file.open("rb") as opened:
        (path,) = requests.post(f"{served[0]}/gradio_api/upload", files={"files": opened}).json()
    return call(served, {"path": path, "meta": {"_type": "gradio.FileData"}}).text


@pytest.mark.slow
def test_callers_without_a_session_are_not_remembered_for_ever(served, tmp_path):
    (tmp_path / "words.jpg").write_text("words")
    for _ in range(25):
        assert "No verdict" in send(served, tmp_path / "words.jpg")
    assert len(served[2].state_holder.session_data) <= 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["{witness}", "{witness}?x=http://{host}/", "HTTP://{host}", " {witness}", "//{host}", "{secret}"]
)
def test_a_request_can_name_no_file_and_no_address(served, tmp_path, place):
    draw_portrait(1).save(tmp_path / "secret.png")
    asked = []

    class Witness(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), Witness) as witness:
        threading.Thread(target=witness.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{witness.server_port}"
        named = place.format(witness=f"http://{host}/secret.png", host=host, secret=tmp_path / "secret.png")
        data = {"path": named, "url": named, "meta": {"_type": "gradio.FileData"}}
        answers = [call(served, one) for one in (data, named, [data], [named])]
        witness.shutdown()
    for answer in answers:
        assert answer.status_code == 400 or "event: error" in answer.text
        assert "P(fake)" not in answer.text
    assert not asked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "{served}"}, 200),
        ({"Host": "localhost:{port}", "Origin": "http://localhost:{port}"}, 200),
        ({"Host": "rebound.example"}, 403),
        ({"Host": "rebound.example:{port}"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Origin": "https://other.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_other_sites_are_refused(served, headers, status):
    filled = {name: value.format(served=served[0], port=served[1]) for name, value in headers.items()}
    assert requests.get(served[0], headers=filled).status_code == status
    assert requests.post(f"{served[0]}/gradio_api/upload", files={"files": b"1"}, headers=filled).status_code == status
    assert call(served, None, **filled).status_code == status


@pytest.mark.slow
@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("path", ["call/judge", "queue/join", "run/judge", "cancel", "upload"])
def test_a_body_beyond_the_limit_is_refused_while_it_arrives(served, path, declared):
    """300 MB, of which the server reads no more than a few."""
    sent = 0

    def chunks():
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="large.jpg"\r\n\r\n'
        for _ in range(300):
            sent += 1
            yield bytes(1_000_000)

    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", served[1])) as connection:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        headers |= {"Content-Length": "300000000"} if declared else {}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", f"/gradio_api/{path}", chunks(), headers, encode_chunked=not declared)
        with contextlib.suppress(ConnectionResetError):
            assert connection.getresponse().status == 413
    assert sent < 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "body", [*({"data": [], "fn_index": number} for number in (99, -1, "0", [1], {})), [], "x", None]
)
@pytest.mark.parametrize("path", ["queue/join", "run/judge", "call/judge"])
def test_a_call_of_nothing_is_the_callers_error(served, path, body):
    named = body | {"session_hash": "x"} if isinstance(body, dict) else body
    assert 400 <= requests.post(f"{served[0]}/gradio_api/{path}", json=named).status_code < 500


def test_what_an_aborted_upload_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(uploads, "MAX_UPLOAD_AGE_SECONDS", 1)
    with uploads.keep_uploads():
        part, new = (Path(os.environ["GRADIO_TEMP_DIR"]) / name for name in ("tmpabcd", "new"))
        part.write_bytes(bytes(1000))
        os.utime(part, (time.time() - 60,) * 2)
        new.touch()
        os.utime(new, (time.time() + 60,) * 2)
        wait_until(lambda: not part.exists())
        assert new.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_json_that_is_nested_without_end_is_the_callers_error(served):
    for body in (b"[" * 400_000 + b"]" * 400_000, b'{"a":' * 150_000 + b"1" + b"}" * 150_000):
        answer = requests.post(f"{served[0]}/gradio_api/run/judge", data=body)
        assert (answer.status_code, answer.json()["detail"]) == (400, "The body must be JSON.")


@pytest.mark.slow
@pytest.mark.parametrize("path", ["run/nothing", "api/nothing", "call/nothing", "call/v2/nothing", "call/nothing/"])
def test_a_call_of_a_name_that_no_function_has_is_the_callers_error(served, path):
    answer = requests.post(f"{served[0]}/gradio_api/{path}", json={"data": [None]})
    assert (answer.status_code, answer.json()["detail"]) == (404, "There is no such function. Received: 'nothing'.")


@pytest.mark.slow
def test_a_slow_image_holds_no_other_up(served, tmp_path):
    draw_portrait(1).save(tmp_path / "small.png")
    Image.new("RGB", (7000, 7000)).resize((7000, 7000)).save(tmp_path / "large.webp", lossless=True, quality=0)
    answers = []
    slow = threading.Thread(target=lambda: answers.append(("large", send(served, tmp_path / "large.webp"))))
    slow.start()
    while slow.is_alive() and not [name for name, _ in answers if name == "small"]:
        answers.append(("small", send(served, tmp_path / "small.png")))
    slow.join()
    assert answers[0][0] == "small"
    assert "P(fake)" in answers[0][1]


@pytest.mark.slow
def test_the_page_follows_production(page, served, tmp_path):
    draw_portrait(1).save(tmp_path / "face.png")
    drop(page, tmp_path / "face.png").get_by_text("Judged by deepfake-detector version 1").wait_for()
    production.move_production(NAME, "2", "1", "test")
    page.goto(served[0])
    drop(page, tmp_path / "face.png").get_by_text("Judged by deepfake-detector version 2").wait_for()


@pytest.mark.slow
@pytest.mark.usefixtures("served")
def test_a_registry_that_went_away_stops_no_answer(caplog):
    keeper = page_server.ModelKeeper(f"models:/{NAME}@production", detect=False)
    _, version = keeper.get()
    versions.mlflow.MlflowClient().delete_registered_model_alias(NAME, "production")
    assert keeper.get()[1] == version
    assert "still serving" in caplog.text
    with pytest.raises(ModelError, match="must be a version in the registry"):
        page_server.ModelKeeper(f"models:/{NAME}@production", detect=False)


@pytest.mark.slow
@pytest.mark.usefixtures("served")
def test_a_tracking_server_that_is_down_holds_no_answer_up(caplog, monkeypatch):
    keeper = page_server.ModelKeeper(f"models:/{NAME}/1", detect=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    assert keeper.get()[1] == f"{NAME} version 1"
    assert time.monotonic() - started < 30
    assert "still serving" in caplog.text
    monkeypatch.undo()
    connection.connect()


@pytest.mark.slow
@pytest.mark.usefixtures("served")
def test_the_challenger_runs_beside_production_and_is_only_observed(tmp_path):
    draw_portrait(1).save(tmp_path / "face.png")
    client = connection.connect()
    with open_observer(str(tmp_path / "seen"), shadow=True) as observer:
        keeper = page_server.ModelKeeper(f"models:/{NAME}/1", True, observer, shadow=True)
        shown = []
        for version in (None, "2", None):
            if version:
                client.set_registered_model_alias(NAME, "challenger", version)
            else:
                client.delete_registered_model_alias(NAME, "challenger")
            shown.append(page_server.judge_upload(keeper, tmp_path / "face.png")[0])
    assert len(set(shown)) == 1
    now = datetime.now(UTC)
    rows = read_window(str(tmp_path / "seen"), now - timedelta(days=1), now)
    assert rows["version"].nunique() == 1
    assert rows["shadow_version"].fillna("").tolist() == ["", f"{NAME}/2"]  # the third is the first again


@pytest.mark.slow
def test_a_taken_port_is_said(served, candidate, capsys):
    assert main(["serve", "--model", str(candidate.folder), "--port", str(served[1])]) == 2
    assert "which is taken" in capsys.readouterr().err
    assert main(["serve", "--model", "/dev/null"]) == 2
    assert "folder written by `deepfake pull`" in capsys.readouterr().err


FREED = """
import ctypes, psutil
from deepfake_core.serving import page
page._give_memory_back()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free(libc.malloc(16_000_000))  # glibc keeps blocks of up to this size from now on, unless it is told not to
before = psutil.Process().memory_info().rss
freed = []
for _ in range(20):
    freed.append(libc.malloc(4_000_000))
    libc.memset(freed[-1], 1, 4_000_000)
    libc.memset(libc.malloc(50_000), 1, 50_000)  # is never freed, and lies behind
for block in freed:
    libc.free(block)
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does with freed memory")
def test_memory_of_images_goes_back_to_the_system():
    told = subprocess.run([sys.executable, "-c", FREED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(told.stdout) < 10_000_000


@pytest.mark.sweep
@pytest.mark.process
def test_no_upload_is_left_when_the_page_ends(candidate, tmp_path):
    (tmp_path / f"deepfake-page-{2**22 + 1}-left").mkdir()  # no process has this number
    (tmp_path / f"deepfake-page-{os.getpid()}-others").mkdir()
    draw_portrait(1).save(tmp_path / "face.png")
    port = free_port()
    command = [sys.executable, "-m", "deepfake_core.cli", "serve", "--model", candidate.folder, "--port", str(port)]
    command += ["--observe", tmp_path / "seen"]
    with subprocess.Popen(
        command, env={**os.environ, "GRADIO_TEMP_DIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert "Ctrl+C" in server.stdout.readline()
        assert "P(fake)" in send((f"http://127.0.0.1:{port}", port), tmp_path / "face.png")
        (folder,) = tmp_path.glob(f"deepfake-page-{server.pid}-*")
        assert list(folder.rglob("face.png"))
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    (seen,) = tmp_path.glob("seen/*/*.parquet")  # what waited was written at the end
    assert parquet.read_metadata(seen).num_rows == 1
    assert [found.name for found in tmp_path.glob("deepfake-page-*")] == [f"deepfake-page-{os.getpid()}-others"]
