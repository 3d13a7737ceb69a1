"""The page, in a real browser, with versions from a real registry."""

import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from PIL import Image

from deepfake_core.cli import main
from deepfake_core.errors import ModelError
from deepfake_core.registry import connection, detectors, production, runs, versions
from deepfake_core.serving import page as page_server
from tests.builders import NAME, draw_portrait, draw_scene, free_port, jpeg, write_clip

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def served(candidate, put_mlflow, tmp_path_factory):
    """Serve the page, with version 1 in production; yield its address."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        put_mlflow(patch, folder)
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        patch.setattr(page_server, "MAX_UPLOAD_BYTES", 1_000_000)
        patch.setattr(page_server, "MAX_ALIAS_AGE_SECONDS", 0)
        for _ in range(2):
            with runs.open_run("cnn") as run_id:
                version = detectors.register_detector(run_id, candidate.folder, NAME, jpeg(1), {})
        assert version == "2"
        production.move_production(NAME, "1", None, "test")
        port = free_port()
        launched = page_server.launch_page(page_server.ModelKeeper(f"models:/{NAME}@production", detect=True), port)
        yield f"http://127.0.0.1:{port}", port
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


@pytest.mark.slow
def test_an_image_gets_its_verdict_heat_map_and_version(page, tmp_path):
    draw_scene({(40, 60): draw_portrait(1, 200), (300, 250): draw_portrait(2, 150)}).save(tmp_path / "scene.png")
    drop(page, tmp_path / "scene.png").get_by_text(f"Judged by {NAME} version").wait_for()
    assert page.get_by_role("heading", name=re.compile(r"(None|1|2) of 2 faces (is|are) judged fake")).is_visible()
    assert page.get_by_text("P(fake) =").count() == 2
    picture = page.locator("img[src*='/file=']")
    picture.wait_for()
    assert picture.evaluate("image => image.complete && image.naturalWidth") == 640
    assert not page.get_by_text("Over time").is_visible()


@pytest.mark.slow
def test_a_clip_gets_a_timeline(page, tmp_path):
    people = [draw_scene({(40 + number, 60): draw_portrait(1, 200)}) for number in range(30)]
    drop(page, write_clip(tmp_path / "clip.mp4", people)).get_by_text("over 30 frames").wait_for()
    assert page.get_by_text("Over time").is_visible()


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


@pytest.mark.slow
@pytest.mark.parametrize("how", ["path", "url"])
def test_a_request_can_name_no_file_and_no_address(served, tmp_path, how):
    draw_portrait(1).save(tmp_path / "secret.png")
    asked = []

    class Witness(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), Witness) as witness:
        threading.Thread(target=witness.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{witness.server_port}/secret.png"
        place = str(tmp_path / "secret.png") if how == "path" else address
        data = {"path": place, "url": place, "meta": {"_type": "gradio.FileData"}}
        api = f"{served[0]}/gradio_api/call/judge"
        event = requests.post(api, json={"data": [data]}).json()["event_id"]
        answer = requests.get(f"{api}/{event}").text
        witness.shutdown()
    assert "event: error" in answer
    assert "P(fake)" not in answer
    assert not asked


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
def test_a_taken_port_is_said(served, candidate, capsys):
    assert main(["serve", "--model", str(candidate.folder), "--port", str(served[1])]) == 2
    assert "which is taken" in capsys.readouterr().err
    assert main(["serve", "--model", "/dev/null"]) == 2
    assert "folder written by `deepfake pull`" in capsys.readouterr().err
