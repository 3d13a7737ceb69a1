"""Reports from the page: in a real browser, and by POST."""

import hashlib
import json
import pathlib
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from deepfake_core.cli import main
from deepfake_core.decoding import UnreadableImageError
from deepfake_core.errors import TransientError
from deepfake_core.feedback.reports import open_feedback
from deepfake_core.serving import page as page_server
from deepfake_core.serving import wrong_verdict
from tests.builders import ROOT, copy_former, draw_portrait, draw_scene, free_port, needs_gradio, write_clip

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = needs_gradio


@pytest.fixture(scope="module")
def served(candidate, tmp_path_factory):
    """Serve a page that takes reports, and one that takes none; yield the address of both and the feedback."""
    folder = tmp_path_factory.mktemp("page")
    feedback = open_feedback(folder / "feedback")
    keeper = page_server.ModelKeeper(str(candidate.folder), detect=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        ports = free_port(), free_port()
        launched = [page_server.launch_page(keeper, ports[0], feedback), page_server.launch_page(keeper, ports[1])]
        yield *(f"http://127.0.0.1:{port}" for port in ports), feedback
        for one in launched:
            one.close()


@pytest.fixture
def open_page(chromium):
    """Return a function that opens an address; a page that asks any other host or raises an error fails the test."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(0)  # the test's own limit is enough
        asked, failures = set(), []
        page.on("request", lambda request: asked.add(request.url))
        page.on("pageerror", lambda error: failures.append(error))

        def open_address(address):
            page.goto(address)
            return page

        yield open_address
        assert len({re.sub(r"(^\w+://[^/]*).*", r"\1", url) for url in asked if "://" in url}) == 1
        assert not failures
        browser.close()


def drop(page, file):
    page.locator("input[type=file]").first.set_input_files(file)
    page.get_by_text("Judged by").wait_for()


@pytest.mark.slow
def test_a_person_says_on_the_page_that_a_verdict_is_wrong(served, open_page, tmp_path):
    address, _, feedback = served
    scene = tmp_path / "scene.png"
    draw_scene({(40, 60): draw_portrait(1, 200), (300, 250): draw_portrait(2, 150)}).save(scene)
    page = open_page(address)
    assert not page.get_by_text("This is wrong").is_visible()
    drop(page, scene)
    page.get_by_text("This is wrong").click()
    page.get_by_text("Nothing about you is kept.").wait_for()
    page.get_by_role("button", name="Send").click()
    page.get_by_text("Choose an image, and what it is.").wait_for()
    page.get_by_label("fake", exact=True).check()
    page.get_by_label("How do you know?").fill("<b>two</b> people | https://example.org/")
    page.get_by_role("button", name="Send").click()
    sha256 = hashlib.sha256(scene.read_bytes()).hexdigest()
    page.get_by_text(f"Its code is {sha256}").wait_for()
    (report,) = feedback.read(sha256).reports
    assert (report.label, report.note) == ("fake", "<b>two</b> people | https://example.org/")
    assert report.verdict.faces == 2
    page.get_by_text(f"{report.verdict.label}, P(fake) = {report.verdict.probability:.2f}").first.wait_for()
    assert feedback.read_image(sha256) == scene.read_bytes()

    draw_portrait(2).save(tmp_path / "next.png")
    page.get_by_label("Remove this file").or_(page.get_by_label("Clear")).first.click()
    page.get_by_text("This is wrong").wait_for(state="hidden")
    drop(page, tmp_path / "next.png")
    page.get_by_text("This is wrong").click()
    sync_api.expect(page.get_by_label("How do you know?")).to_have_value("", timeout=0)
    sync_api.expect(page.get_by_label("fake", exact=True)).not_to_be_checked(timeout=0)
    sync_api.expect(page.get_by_text("Its code is")).to_have_count(0, timeout=0)


@pytest.mark.slow
def test_a_clip_can_not_be_reported(served, open_page, tmp_path):
    page = open_page(served[0])
    drop(page, write_clip(tmp_path / "clip.mp4", [draw_scene({(40, 60): draw_portrait(1, 200)})] * 3))
    page.get_by_text("Over time").wait_for()
    assert not page.get_by_text("This is wrong").is_visible()


def upload(address, file):
    with file.open("rb") as opened:
        (path,) = requests.post(f"{address}/gradio_api/upload", files={"files": opened}).json()
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def report(address, *data, **headers):
    """Call the page's function as a program does; return the answer, or what it ended with."""
    api = f"{address}/gradio_api/call/report"
    called = requests.post(api, json={"data": data}, headers=headers)
    if not called.ok:
        return called.status_code, called.text
    answer = requests.get(f"{api}/{called.json()['event_id']}").text
    event, data = re.fullmatch(r"event: (\w+)\ndata: (.*)\n\n", answer).groups()
    return event, json.loads(data)


@pytest.mark.slow
def test_a_program_reports_by_post(served, tmp_path):
    address, _, feedback = served
    draw_portrait(3).save(tmp_path / "face.png")
    sha256 = hashlib.sha256((tmp_path / "face.png").read_bytes()).hexdigest()
    thanks = f"Thank you. A person will look at it. Its code is {sha256}"
    assert report(address, upload(address, tmp_path / "face.png"), "fake", "") == ("complete", [thanks])
    assert report(address, upload(address, tmp_path / "face.png"), "real", "x") == ("complete", [thanks])
    entry = feedback.read(sha256)
    assert (entry.count, entry.claimed) == (2, ["fake", "real"])
    assert entry.reports[0].verdict.probability is not None
    feedback.reject(sha256, by="someone")
    feedback.expire(sha256)
    event, (answer,) = report(address, upload(address, tmp_path / "face.png"), "fake", "")
    assert (event, answer[-18:]) == ("complete", " Nothing was kept.")


@pytest.mark.slow
@pytest.mark.process
def test_the_example_of_the_documentation_works(served, tmp_path):
    address, _, feedback = served
    draw_portrait(7).save(tmp_path / "face.jpg")
    (example,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "how-to" / "feedback.md").read_text(), re.S)
    script = example.replace("http://127.0.0.1:7860", address)
    answer = subprocess.check_output(["bash", "-euc", script], cwd=tmp_path, text=True)
    sha256 = hashlib.sha256((tmp_path / "face.jpg").read_bytes()).hexdigest()
    assert answer.startswith("event: complete\n")
    assert sha256 in answer
    assert feedback.read(sha256).reports[0].note == "The left ear is missing."


@pytest.mark.slow
def test_a_report_keeps_the_verdict_that_was_shown_though_production_moved_meanwhile(candidate, tmp_path):
    keeper = page_server.ModelKeeper(str(candidate.folder), detect=False)
    reporter = wrong_verdict.Reporter(open_feedback(tmp_path / "feedback"), keeper.get)
    draw_portrait(8).save(tmp_path / "face.png")
    *_, (sha256, verdict) = page_server.judge_upload(keeper, tmp_path / "face.png")
    shown = verdict.model_copy(update={"version": "the version before"})
    reporter.report(tmp_path / "face.png", "fake", "", (sha256, shown))
    reporter.report(tmp_path / "face.png", "fake", "", ("0" * 64, shown))  # a verdict on another image
    reporter.report(tmp_path / "face.png", "fake", "", None)
    (entry,) = open_feedback(tmp_path / "feedback").list_entries()
    assert [report.verdict for report in entry.reports] == [shown, verdict, verdict]


@pytest.mark.slow
def test_what_can_not_be_kept_is_said_and_nothing_is_kept(served, tmp_path):
    address, _, feedback = served
    before = feedback.list_entries()
    draw_portrait(4).save(tmp_path / "face.png")
    (tmp_path / "words.jpg").write_text("<b>words</b>")
    face, words = (upload(address, tmp_path / name) for name in ("face.png", "words.jpg"))
    for data, said in {
        (0, "fake", "x" * 1001): "`note` may hold 1,000 characters at most. Received: 1,001.",
        (0, "forged", ""): "forged",
        (0, None, ""): "Choose an image, and what it is.",
        (None, "fake", ""): "Choose an image, and what it is.",
        (1, "fake", ""): "must be a JPEG, PNG or WebP image",
    }.items():
        event, answer = report(address, None if data[0] is None else (face, words)[data[0]], *data[1:])
        assert event == "error"
        assert said in str(answer)
    witness = {"path": face["path"], "url": "http://127.0.0.1:1/", "meta": {"_type": "gradio.FileData"}}
    assert report(address, witness, "fake", "")[0] == 400
    assert report(address, face, "fake", witness)[0] == 400
    secret = {"path": str(tmp_path / "face.png"), "meta": {"_type": "gradio.FileData"}}
    assert report(address, secret, "fake", "")[0] in ("error", 400)
    pathlib.Path(face["path"]).unlink()
    assert report(address, face, "fake", "")[0] == "error"
    assert feedback.list_entries() == before


@pytest.mark.slow
def test_other_sites_can_not_report(served, tmp_path):
    address, _, feedback = served
    before = feedback.list_entries()
    draw_portrait(5).save(tmp_path / "face.png")
    face = upload(address, tmp_path / "face.png")
    for headers in ({"Host": "rebound.example"}, {"Origin": "https://other.example"}):
        assert report(address, face, "fake", "", **headers)[0] == 403
    assert report(address, face, "fake", "x" * 1_000_000)[0] == 413
    assert feedback.list_entries() == before


@pytest.mark.slow
def test_beyond_the_limit_of_an_hour_a_report_is_refused(candidate, tmp_path, monkeypatch):
    monkeypatch.setattr(wrong_verdict, "MAX_REPORTS_AN_HOUR", 2)
    feedback = open_feedback(tmp_path / "feedback")
    port = free_port()
    launched = page_server.launch_page(page_server.ModelKeeper(str(candidate.folder), detect=False), port, feedback)
    address = f"http://127.0.0.1:{port}"
    draw_portrait(6).save(tmp_path / "face.png")
    face = upload(address, tmp_path / "face.png")
    assert [report(address, face, "fake", "")[0] for _ in range(2)] == ["complete"] * 2
    event, answer = report(address, face, "fake", "")
    launched.close()
    assert event == "error"
    assert "This page keeps 2 reports an hour. Received: one more. Nothing was kept" in str(answer)
    assert [entry.count for entry in feedback.list_entries()] == [2]


@pytest.mark.slow
def test_the_limits_hold_for_requests_that_come_at_once_or_ask_for_no_queue(tmp_path, monkeypatch):
    monkeypatch.setattr(wrong_verdict, "MAX_REPORTS_AN_HOUR", 2)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    feedback = open_feedback(tmp_path / "feedback")
    keeper = page_server.ModelKeeper(str(copy_former(tmp_path / "model")), detect=False)
    port = free_port()
    launched = page_server.launch_page(keeper, port, feedback)
    address = f"http://127.0.0.1:{port}"
    draw_portrait(6).save(tmp_path / "face.png")
    face = upload(address, tmp_path / "face.png")
    for path in ("run/report", "api/report", "run/judge", "api/judge", "run/report/"):
        data = [face, "fake", "", None] if "report" in path else [face]
        assert requests.post(f"{address}/gradio_api/{path}", json={"data": data}).status_code == 404
    assert feedback.list_entries() == []
    with ThreadPoolExecutor(6) as pool:
        events = [event for event, _ in pool.map(lambda _: report(address, face, "fake", ""), range(6))]
    launched.close()
    assert sorted(events) == ["complete"] * 2 + ["error"] * 4
    assert [entry.count for entry in feedback.list_entries()] == [2]


def test_of_reports_at_once_no_more_are_kept_than_an_hour_may_have(tmp_path, monkeypatch):
    monkeypatch.setattr(wrong_verdict, "MAX_REPORTS_AN_HOUR", 2)
    keeper = page_server.ModelKeeper(str(copy_former(tmp_path / "model")), detect=False)
    reporter = wrong_verdict.Reporter(open_feedback(tmp_path / "feedback"), keeper.get)
    draw_portrait(6).save(tmp_path / "face.png")
    (tmp_path / "words.png").write_text("words")

    def send(name):
        try:
            return reporter.report(tmp_path / name, "fake", "", None)[:9]
        except TransientError:
            return "refused"
        except UnreadableImageError:
            return "unreadable"

    names = ["words.png"] * 3 + ["face.png"] * 5  # what is not kept does not count
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(send, names)) in (
            ["Thank you"] * 2 + ["refused"] * (3 + late) + ["unreadable"] * (3 - late) for late in range(4)
        )
    (entry,) = open_feedback(tmp_path / "feedback").list_entries()
    assert entry.count == 2


@pytest.mark.slow
def test_without_feedback_the_page_has_neither_the_form_nor_the_function(served, open_page, tmp_path):
    without = served[1]
    draw_portrait(1).save(tmp_path / "face.png")
    page = open_page(without)
    drop(page, tmp_path / "face.png")
    assert not page.get_by_text("This is wrong").count()
    assert report(without, upload(without, tmp_path / "face.png"), "fake", "")[0] == 404
    described = [requests.get(f"{address}/gradio_api/info").json()["named_endpoints"] for address in served[:2]]
    assert [set(one) for one in described] == [{"/judge", "/report"}, {"/judge"}]
    assert len(described[0]["/judge"]["returns"]) == len(described[1]["/judge"]["returns"]) == 3


def test_a_folder_of_others_is_refused_before_the_page_starts(candidate, tmp_path, capsys):
    (tmp_path / "holiday.jpg").touch()
    assert main(["serve", "--model", str(candidate.folder), "--feedback", str(tmp_path)]) == 2
    assert "which holds holiday.jpg and no feedback.json" in capsys.readouterr().err
