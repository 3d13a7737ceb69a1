"""What `make up` starts, in use: two workers, alerts, Prefect's and MLflow's pages in a browser, and no secret left."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import mlflow
import pytest
from prefect.blocks.system import Secret
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Failed, Running

from deepfake_core.registry import fingerprint, production, versions
from deepfake_core.registry.detectors import register_detector
from deepfake_core.registry.runs import open_run
from deployments import alerts
from deployments.stack import control, make_environment
from tasks.announcement import announce, announce_drift
from tasks.data import KAGGLE_BLOCK
from tasks.remote import GPU_LIMIT
from tests.builders import NAME, copy_former, faces, free_port, jpeg, wait_until
from tests.kaggle_server import HIDDEN, KaggleServer

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.slow, pytest.mark.sweep]

ROOT = Path(__file__).parents[1]
TOKEN = "KGAT_5e1f0c3a9b7d"
PICTURES = os.environ.get("PICTURES")
"""Folder for the README's pictures; `make pictures` sets it."""


@dataclass
class Stack:
    """What `make up` started, and what its alerts told."""

    folder: Path
    prefect: str
    mlflow: str
    control: Callable[..., str]
    told: list[str] = field(default_factory=list)

    def was_told(self, *words: str) -> bool:
        return any(all(word in text for word in words) for text in self.told)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Start the whole stack as `make up` does, beside a Kaggle on loopback, and end it as `make down` does.

    `retrain/manual` has small parameters, Kaggle's token is in a Secret block, and alerts go to a receiver here.
    """
    folder = tmp_path_factory.mktemp("stack")
    (folder / "kaggle").mkdir()
    with pytest.MonkeyPatch.context() as patch, KaggleServer(folder / "kaggle", token=TOKEN) as kaggle:
        for name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_")) or name in HIDDEN]:
            patch.delenv(name)
        for name, value in kaggle.environment.items():
            patch.setenv(name, value)
        patch.delenv("KAGGLE_API_TOKEN")
        patch.setenv("STACK", str(folder / "stack"))
        patch.setenv("PREFECT_SERVER_API_PORT", str(free_port()))
        patch.setenv("MLFLOW_PORT", str(free_port()))
        kaggle.add_the_three(faces(30), faces(30, start=100))
        environment = make_environment()
        command = [sys.executable, ROOT / "deployments" / "stack.py"]
        try:
            up = subprocess.run([*command, "up"], capture_output=True, text=True)
            assert up.returncode == 0, up.stdout + up.stderr
            assert up.stdout.count("RUNNING") == 4
            assert f"no block is named {alerts.BLOCK}" in up.stdout
            patch.setenv("MLFLOW_TRACKING_URI", environment["MLFLOW_TRACKING_URI"])
            started = Stack(
                folder,
                environment["PREFECT_API_URL"].removesuffix("/api"),
                environment["MLFLOW_TRACKING_URI"],
                lambda *arguments: control(environment, *arguments).stdout,
            )
            with temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}), receive(started.told) as url:
                Secret(value=TOKEN).save(KAGGLE_BLOCK)
                Webhook(url=url).save(alerts.BLOCK)
                apply_alerts(late=timedelta(seconds=10))
                with get_client(sync_client=True) as client:
                    manual = client.read_deployment_by_name("retrain/manual")
                    small: dict[str, Any] = {
                        "data": {"data_dir": str(folder / "data")},
                        "training": {"candidates": ["cnn"], "image_size": 32, "augmentation": {"zoom": 0.2}},
                        "promotion": {"min_precision": 0, "min_recall": 0, "max_false_alarm_rate": 1},
                    }
                    client.update_deployment(manual.id, DeploymentUpdate(parameters=manual.parameters | small))
                yield started
        finally:
            down = subprocess.run([*command, "down"], capture_output=True, text=True)
        assert "has ended" in down.stdout
        for port in (environment["PREFECT_SERVER_API_PORT"], environment["MLFLOW_PORT"]):
            with pytest.raises(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}")


@contextmanager
def receive(told: list[str]) -> Iterator[str]:
    """Collect on loopback what a webhook sends; yield its address."""

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def apply_alerts(**spans: timedelta) -> None:
    with get_client(sync_client=True) as client:
        alerts.apply(client, alerts.make_automations(alerts.find_block(client), alerts.find_retrain(client), **spans))


@contextmanager
def without(stack: Stack, part: str) -> Iterator[None]:
    """Stop a part of the stack meanwhile."""
    stack.control("stop", part)
    try:
        yield
    finally:
        stack.control("start", part)


def find_runs(name: str) -> list[FlowRun]:
    """Return a deployment's flow runs, the newest first."""
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(name)
        runs = [run for run in client.read_flow_runs() if run.deployment_id == deployment.id]
    return sorted(runs, key=lambda run: run.created, reverse=True)


def find_ended(run_id: UUID) -> FlowRun | None:
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)
    return run if run.state and run.state.is_final() else None


def answers(address: str) -> bool:
    try:
        return httpx.get(address).is_success
    except httpx.TransportError:
        return False


@pytest.mark.usefixtures("stack")
def test_schedules_make_runs():
    for name in ("retrain/weekly", "check-sources/daily", "production.health/hourly", "clean/weekly", "watch/daily"):
        assert wait_until(lambda name=name: find_runs(name))[0].state.is_scheduled()


def test_alerts_that_are_unchanged_stay(stack):
    def read() -> dict[str, str]:
        automations = httpx.post(f"{stack.prefect}/api/automations/filter", json={}).json()
        return {automation["name"]: automation["updated"] for automation in automations}

    before = read()
    assert len(before) == 6
    apply_alerts(late=timedelta(seconds=11))
    assert [name for name, updated in read().items() if updated != before[name]] == ["deepfake: a run is late"]


def test_a_run_that_waits_is_late_and_one_that_fails_says_why(stack):
    stack.control("stop", "worker-gpu")
    with get_client(sync_client=True) as client:
        manual = client.read_deployment_by_name("retrain/manual")
        started = client.create_flow_run_from_deployment(manual.id)  # tries again where a busy server is late
    (child,) = wait_until(lambda: find_runs("train/gpu"))
    wait_until(lambda: stack.was_told("train run", ": late", "No worker has taken it"))
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(child.id, Cancelled(), force=True)
    failed = wait_until(lambda: find_ended(started.id))
    assert failed.state.is_failed()
    assert "train/gpu" in failed.state.message
    assert "ended as Cancelled" in failed.state.message
    assert versions.list_versions(NAME) == []
    words = (f"retrain run {failed.name}: Failed", "ended as Cancelled", "run again", f"/runs/flow-run/{failed.id}")
    wait_until(lambda: stack.was_told(*words))


def test_what_becomes_of_versions_is_told(stack):
    """What is promoted tells so by itself, in the next test; a refusal and a rollback take more runs than one."""
    announce("not-promoted", NAME, "7", f"{NAME} version 7 was not promoted")
    announce("rolled-back", NAME, "5", f"Version 5 of {NAME} is back in production")
    wait_until(lambda: stack.was_told(f"{NAME} version 7", "was not promoted"))
    wait_until(lambda: stack.was_told(f"{NAME} version 5", "is back in production"))


def test_drift_is_told_and_starts_a_retrain_once_a_person_switched_that_on_if_it_lasts(stack):
    with without(stack, "worker-cpu"):
        before = len(find_runs(alerts.RETRAIN))
        announce_drift(NAME, "8", "JPEG quality of faces: has changed", lasts=True)  # it is off
        wait_until(lambda: stack.was_told(f"{NAME} version 8: drift", "JPEG quality of faces"))
        with get_client(sync_client=True) as client:
            (lasting,) = client.read_automations_by_name("deepfake: lasting drift starts a retrain")
            assert not lasting.enabled
            client.request("PATCH", f"/automations/{lasting.id}", json={"enabled": True})  # as Prefect's page does
            apply_alerts()
            assert client.read_automation(lasting.id).enabled  # deploying leaves it on
        announce_drift(NAME, "9", "once", lasts=False)
        announce_drift(NAME, "10", "twice", lasts=True)
        (started, *others) = wait_until(lambda: find_runs(alerts.RETRAIN)[: -before or None])
        assert not others
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(started.id, Cancelled(), force=True)
            client.request("PATCH", f"/automations/{lasting.id}", json={"enabled": False})


def test_old_runs_are_removed_and_a_card_has_one_training(stack):
    services = httpx.get(f"{stack.prefect}/api/admin/settings").json()["server"]["services"]
    assert set(services["db_vacuum"]["enabled"]) == {"events", "flow_runs"}
    with get_client(sync_client=True) as client:
        assert client.read_global_concurrency_limit_by_name(GPU_LIMIT).limit == 1


def test_a_part_that_crashes_is_started_again(stack):
    pid = stack.control("pid", "mlflow-server").strip()
    (server,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(server), signal.SIGKILL)
    wait_until(lambda: stack.control("pid", "mlflow-server").strip() not in (pid, "0"))
    wait_until(lambda: answers(f"{stack.mlflow}/health"))
    stack.control("start", "worker-gpu")


def test_a_run_that_falls_silent_is_crashed_and_told(stack):
    apply_alerts(late=timedelta(minutes=1), silent_for=timedelta(seconds=10))
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("check-sources/daily")
        run = client.create_flow_run_from_deployment(deployment.id, state=Running())
    emit_event(
        "prefect.flow-run.heartbeat",
        resource={"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.name": run.name},
        related=[
            alerts.OWN_FLOWS,
            {
                "prefect.resource.id": f"prefect.flow.{run.flow_id}",
                "prefect.resource.role": "flow",
                "prefect.resource.name": "check-sources",
            },
        ],
    )
    crashed = wait_until(lambda: find_ended(run.id))
    apply_alerts()
    assert crashed.state.is_crashed()
    assert "fell silent" in crashed.state.message
    wait_until(lambda: stack.was_told(f"check-sources run {run.name}: Crashed", "fell silent"))


def test_an_alert_holds_no_secrets(stack):
    """Neither one of ours, whose token can't be sent, nor what others' errors put into a message."""
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("check-sources/daily")
        Secret(value=f"“{TOKEN}”").save(KAGGLE_BLOCK, overwrite=True)
        try:
            run = client.create_flow_run_from_deployment(deployment.id)
            failed = wait_until(lambda: find_ended(run.id))
        finally:
            Secret(value=TOKEN).save(KAGGLE_BLOCK, overwrite=True)
        assert failed.state.is_failed()
        wait_until(lambda: stack.was_told(f"run {run.name}: Failed", "number 1 is LEFT DOUBLE QUOTATION MARK"))
        other = client.create_flow_run_from_deployment(deployment.id, state=Running())
        message = "odd: Bearer KGAT_0f1e2d /a.zip?X-Goog-Signature=0f1e2d https://me:0f1e2d@proxy.invalid/ end"
        client.set_flow_run_state(other.id, Failed(message=message), force=True)
    wait_until(lambda: stack.was_told(f"run {other.name}: Failed", "odd: Bearer [removed] [removed] [removed] end"))
    assert not [text for text in stack.told if TOKEN in text or "0f1e2d" in text]


@pytest.mark.browser
def test_a_person_retrains_in_the_browser(stack, chromium):
    """From the form to the artifacts in Prefect, and from there to the run and the version in MLflow."""
    with get_client(sync_client=True) as client:
        manual = client.read_deployment_by_name("retrain/manual")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(0)  # the test's own limit is enough

        page.goto(f"{stack.prefect}/deployments/deployment/{manual.id}")
        page.get_by_role("button", name="Run", exact=True).click()
        page.get_by_text("Custom run").click()
        epochs = page.locator(".schema-form-property", has=page.get_by_text("Epochs (Optional)", exact=True)).last
        epochs.get_by_text("(at least 1, at most 10,000)").wait_for()
        epochs.get_by_role("button", name="int").click()
        epochs.locator("input").fill("2")
        epochs.scroll_into_view_if_needed()
        take_picture(page, "form")
        before = len(find_runs("retrain/manual"))
        submit(page)
        run = wait_until(lambda: find_runs("retrain/manual")[: -before or None])[0]

        page.goto(f"{stack.prefect}/runs/flow-run/{run.id}")
        page.locator(".state-badge", has_text="Running").first.wait_for()
        page.goto("about:blank")  # without a GPU, drawing the graph takes half a core
        ended = wait_until(lambda: find_ended(run.id))
        assert ended.state.is_completed(), ended.state
        assert ended.parameters["training"]["epochs"] == 2
        page.goto(f"{stack.prefect}/runs/flow-run/{run.id}")
        page.locator(".state-badge", has_text="Completed").first.wait_for()
        page.get_by_text(f"{NAME} version 1: promoted").first.wait_for()
        take_picture(page, "run")
        page.get_by_text("Artifacts", exact=True).first.click()
        page.locator("a[href*='artifacts/artifact']").last.click()
        page.get_by_role("heading", name=f"{NAME} version 1: promoted").wait_for()
        take_picture(page, "outcome")

        page.goto(page.get_by_role("link", name="metrics and curves").get_attribute("href"))
        page.get_by_role("button", name="Close").click()  # of the assistant that MLflow opens at first
        page.get_by_text("test/auc", exact=True).first.wait_for()
        page.goto(f"{stack.mlflow}/#/models/{NAME}/versions/1")
        page.get_by_text("@ production").first.wait_for()
        take_picture(page, "mlflow-version")
        browser.close()
    wait_until(lambda: stack.was_told(f"{NAME} version 1", "is now in production"))
    assert mlflow.MlflowClient().get_run(versions.read_version(NAME, "1").run_id).data.params["training.epochs"] == "2"


def submit(page: Any) -> None:
    """Press Submit until the form is gone, as a person does where a busy server did not answer."""
    button = page.get_by_role("button", name="Submit")
    while button.count():
        button.click()
        with suppress(sync_api.TimeoutError):
            button.wait_for(state="detached", timeout=60_000)


def take_picture(page: Any, name: str) -> None:
    if PICTURES:
        page.wait_for_timeout(2000)  # charts are drawn bit by bit
        page.screenshot(path=Path(PICTURES) / f"{name}.png")


def test_the_command_line_retrains_on_two_workers(stack):
    """What the browser trained is not trained again, unless the checkout has uncommitted changes."""
    before = versions.list_versions(NAME)
    parameters = json.dumps(
        {"training": {"candidates": ["cnn"], "image_size": 32, "epochs": 2, "augmentation": {"zoom": 0.2}}}
    )
    command = ["prefect", "deployment", "run", "retrain/manual", "--params", parameters, "--watch"]
    done = subprocess.run(
        [str(Path(sys.executable).with_name(command[0])), *command[1:]],
        env={**os.environ, "PREFECT_API_URL": f"{stack.prefect}/api"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = find_runs("retrain/manual")[0]
    assert run.state.is_completed(), run.state
    if before and not fingerprint.read_git_commit().endswith("-dirty"):
        assert run.state.message.startswith("Nothing changed since version 1 (promoted)")
        assert len(versions.list_versions(NAME)) == len(before)
    trained = find_runs("train/gpu")[0]
    assert trained.work_pool_name == "gpu"
    assert trained.state.is_completed()
    newest = versions.list_versions(NAME)[0]
    assert newest.tags["flow_run_id"] == str(trained.id)
    logged = mlflow.MlflowClient().get_run(newest.run_id).data.params
    assert logged["training.augmentation.zoom"] == "0.2"  # what was set reached the other worker, and nothing else did
    assert logged["training.augmentation.rotation"] == "20.0"


@pytest.mark.browser
def test_a_person_approves_in_the_browser(stack, chromium, tmp_path):
    """A version that waits is asked about by a run that holds no worker; the answer moves production."""
    name, detector = "asked", copy_former(tmp_path / "detector")
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat(timespec="seconds")
    waits = {
        "decision": "waits for approval",
        "reasons": "NOT met: AUC 0.9",
        "compared_with": "1",
        "answer_until": soon,
    }
    for tags in ({"decision": "promoted"}, waits):
        with open_run("cnn") as run_id:
            register_detector(run_id, detector, name, jpeg(1), tags)
    production.move_production(name, "1", None, "first")
    with get_client(sync_client=True) as prefect:
        deployment = prefect.read_deployment_by_name("approve/manual")
        run = prefect.create_flow_run_from_deployment(deployment.id, parameters={"version": 2, "model_name": name})
    wait_until(lambda: find_runs("approve/manual")[0].state.name == "Suspended")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(0)
        page.goto(f"{stack.prefect}/runs/flow-run/{run.id}")
        page.get_by_role("button", name="Resume").first.click()
        page.get_by_text(f"Shall {name} version 2 go into production?").wait_for()
        page.locator(".schema-form-property", has=page.get_by_text("Reason", exact=True)).locator("textarea").fill(
            "seen"
        )
        page.get_by_role("switch").click()
        take_picture(page, "approval")
        submit(page)
        ended = wait_until(lambda: find_ended(run.id))
        browser.close()
    assert ended.state.is_completed(), ended.state
    assert production.find_production(name) == "2"
    assert versions.read_version(name, "2").reasons[-1] == "approved: seen"
    wait_until(lambda: stack.was_told(f"Version 2 of {name} is promoted, as a person decided: seen"))


def test_no_secret_is_left_behind(stack):
    """Whatever runs, logs, databases, artifacts and alerts keep: Kaggle's token is nowhere, in no encoding of it."""
    files = {path: path.read_bytes() for path in stack.folder.rglob("*") if path.is_file()}
    assert any(b"usable images" in content for content in files.values()), "the logs must be among what is searched"
    secrets = (TOKEN.encode(), base64.b64encode(TOKEN.encode()).rstrip(b"="))
    assert not [path for path, content in files.items() if any(secret in content for secret in secrets)]
    assert not [text for text in stack.told if TOKEN in text]
