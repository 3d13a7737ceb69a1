"""deployments/prefect.yaml: what it names exists, and a real server with two process workers runs it."""

import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args
from uuid import UUID

import httpx
import mlflow
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled

from deepfake_core import registry
from deepfake_core.config import Architecture
from tests.conftest import faces, free_port, wait_until, write_zip

ROOT = Path(__file__).parents[1]
CONFIGURATION = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
DEPLOYMENTS = CONFIGURATION["deployments"]


def load_flow(deployment: dict):
    file, name = deployment["entrypoint"].split(":")
    return load_flow_from_entrypoint(f"{ROOT / file}:{name}", use_placeholder_flow=False)


def test_the_deployments_and_two_pools_are_there():
    named = {(load_flow(deployment).name, deployment["name"]): deployment for deployment in DEPLOYMENTS}
    pools = {f"{flow}/{name}": deployment["work_pool"]["name"] for (flow, name), deployment in named.items()}
    assert pools == {
        "retrain/weekly": "cpu",
        "retrain/manual": "cpu",
        "check-sources/daily": "cpu",
        "prepare/manual": "cpu",
        "train/gpu": "gpu",
        "promote/manual": "cpu",
        "rollback/manual": "cpu",
        "production.health/hourly": "cpu",
        "leave-one-out/manual": "gpu",
        "score/manual": "cpu",
    }
    assert named["retrain", "weekly"]["schedules"][0]["cron"]
    assert named["production.health", "hourly"]["schedules"][0]["cron"]
    assert named["check-sources", "daily"]["schedules"][0]["cron"]
    quick = {"promote", "rollback", "production.health", "check-sources"}
    for (flow, _), deployment in named.items():
        assert flow in quick or deployment["concurrency_limit"]["limit"] == 1


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["entrypoint"])
def test_every_parameter_of_a_deployment_exists(deployment):
    known = inspect.signature(load_flow(deployment).fn).parameters
    assert set(deployment.get("parameters", {})) <= set(known)


def test_the_form_shows_descriptions_bounds_and_choices():
    schema = load_flow(DEPLOYMENTS[0]).parameters.model_dump()
    training = schema["definitions"]["TrainingParameters"]["properties"]
    assert training["epochs"]["anyOf"][0]["minimum"] == 1
    assert training["epochs"]["description"].endswith("(at least 1, at most 10,000).")
    assert training["candidates"]["items"]["enum"] == list(get_args(Architecture))
    assert schema["properties"]["train_on"]["description"].startswith("Name of the deployment that trains")
    for model in schema["definitions"].values():
        for name, field in model["properties"].items():
            assert field.get("description") or "$ref" in str(field), name


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Start a Prefect server on loopback with all deployments applied; yield a function that starts a worker."""
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    started: list[subprocess.Popen] = []

    def start(*command: str) -> None:
        log = (tmp_path / f"{'-'.join(command[:4])}.log").open("w")
        process = subprocess.Popen(
            ["prefect", *command], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        started.append(process)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment["MLFLOW_TRACKING_URI"])
    monkeypatch.chdir(tmp_path)
    try:
        registry.connect().create_experiment(registry.EXPERIMENT, artifact_location=str(tmp_path / "mlruns"))
        start("server", "start", "--port", str(port))
        wait_until(lambda: is_healthy(environment["PREFECT_API_URL"]), 120)
        make = ["make", "deploy", "--assume-old", ".venv/installed", f"BIN={Path(sys.executable).parent}"]
        subprocess.run(make, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=180)
        with temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}):
            yield lambda pool: start("worker", "start", "--pool", pool)
    finally:
        for process in reversed(started):
            os.killpg(process.pid, signal.SIGTERM)
        for process in started:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def is_healthy(api: str) -> bool:
    try:
        return httpx.get(f"{api}/health").is_success
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_retrain_runs_on_two_workers_and_fails_with_its_child(server, tmp_path):
    source = {"name": str(write_zip(tmp_path / "faces.zip", faces(40)))}
    parameters = {
        "data": {"sources": [source], "data_dir": str(tmp_path / "data")},
        "training": {"candidates": ["cnn"], "image_size": 32, "epochs": 1, "augmentation": {"zoom": 0.2}},
        "promotion": {"min_precision": 0, "min_recall": 0},
    }

    def trigger() -> UUID:
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name("retrain/manual")
            return client.create_flow_run_from_deployment(
                deployment.id, parameters=deployment.parameters | parameters
            ).id

    def children(name: str) -> list[FlowRun]:
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(name)
            return [run for run in client.read_flow_runs() if run.deployment_id == deployment.id]

    def ended(run_id: UUID) -> FlowRun | None:
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(run_id)
        return run if run.state and run.state.is_final() else None

    server("cpu")
    first = trigger()
    (child,) = wait_until(lambda: children("train/gpu"), 120)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(child.id, Cancelled(), force=True)
    failed = wait_until(lambda: ended(first), 120)
    assert failed.state.is_failed()
    assert "train/gpu" in failed.state.message
    assert "ended as Cancelled" in failed.state.message
    assert registry.list_versions("deepfake-detector") == []

    server("gpu")
    second = trigger()
    completed = wait_until(lambda: ended(second), 240)
    assert completed.state.is_completed(), completed.state
    (trained,) = [run for run in children("train/gpu") if run.id != child.id]
    assert trained.work_pool_name == "gpu"
    assert trained.state.is_completed()
    registry.connect()
    assert registry.find_production("deepfake-detector") == "1"
    version = registry.read_version("deepfake-detector", "1")
    assert version.tags["flow_run_id"] == str(trained.id)
    logged = mlflow.MlflowClient().get_run(version.run_id).data.params
    assert logged["training.augmentation.zoom"] == "0.2"  # what was set reached the other worker, and nothing else did
    assert logged["training.augmentation.rotation"] == "20.0"
    with get_client(sync_client=True) as client:
        messages = [log.message for log in client.read_logs()]
    assert any("80 usable images" in message for message in messages), "core logs must reach Prefect's UI"
