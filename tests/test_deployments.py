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
from deployments.stack import control, make_environment
from tasks.model import GPU_POOL
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
    assert pools["train/gpu"] == GPU_POOL
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
def stack(tmp_path, monkeypatch):
    """Start the whole stack as `make up` does, and end it as `make down` does; yield supervisord's control."""
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("STACK", str(tmp_path / "stack"))
    monkeypatch.setenv("PREFECT_SERVER_API_PORT", str(free_port()))
    monkeypatch.setenv("MLFLOW_PORT", str(free_port()))
    environment = make_environment()
    command = [sys.executable, ROOT / "deployments" / "stack.py"]
    try:
        up = subprocess.run([*command, "up"], capture_output=True, text=True)
        assert up.returncode == 0, up.stdout + up.stderr
        assert up.stdout.count("RUNNING") == 4
        monkeypatch.setenv("MLFLOW_TRACKING_URI", environment["MLFLOW_TRACKING_URI"])
        with temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}):
            yield lambda *arguments: control(environment, *arguments).stdout
    finally:
        down = subprocess.run([*command, "down"], capture_output=True, text=True)
    assert "has ended" in down.stdout
    for port in (environment["PREFECT_SERVER_API_PORT"], environment["MLFLOW_PORT"]):
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}")


def answers(address: str) -> bool:
    try:
        return httpx.get(address).is_success
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_retrain_runs_on_two_workers_and_fails_with_its_child(stack, tmp_path):
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

    stack("stop", "worker-gpu")
    first = trigger()
    (child,) = wait_until(lambda: children("train/gpu"), 120)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(child.id, Cancelled(), force=True)
    failed = wait_until(lambda: ended(first), 120)
    assert failed.state.is_failed()
    assert "train/gpu" in failed.state.message
    assert "ended as Cancelled" in failed.state.message
    assert registry.list_versions("deepfake-detector") == []

    pid = stack("pid", "mlflow-server").strip()
    (server,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(server), signal.SIGKILL)  # a part that crashes is started again
    wait_until(lambda: stack("pid", "mlflow-server").strip() not in (pid, "0"), 60)
    wait_until(lambda: answers(f"{os.environ['MLFLOW_TRACKING_URI']}/health"), 120)
    stack("start", "worker-gpu")
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
