"""deployments/prefect.yaml: what it names exists."""

import inspect
from pathlib import Path
from typing import get_args

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.schema_tools.validation import validate

from deepfake_core.config import Architecture
from tasks.model import GPU_POOL

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
        "approve/manual": "cpu",
        "rollback/manual": "cpu",
        "production.health/hourly": "cpu",
        "leave-one-out/manual": "gpu",
        "score/manual": "cpu",
        "clean/weekly": "cpu",
        "feedback/review": "cpu",
        "watch/daily": "cpu",
    }
    assert pools["train/gpu"] == GPU_POOL
    assert named["retrain", "weekly"]["schedules"][0]["cron"]
    assert named["production.health", "hourly"]["schedules"][0]["cron"]
    assert named["check-sources", "daily"]["schedules"][0]["cron"]
    assert named["clean", "weekly"]["schedules"][0]["cron"]
    assert named["watch", "daily"]["schedules"][0]["cron"]
    quick = {"promote", "approve", "rollback", "production.health", "check-sources", "feedback"}
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


@pytest.mark.parametrize(
    ("sources", "is_valid"),
    [
        ([{"name": "alice/faces"}, {"name": "bob/faces"}], True),
        ([{"name": "./faces", "real_folder": ["Celeb-real", "YouTube-*"], "follow_links": True}], True),
        ([{"name": "~/faces", "real_folder": "original"}], True),
        ([{"name": "alice/faces"}, {"name": "alice/faces"}], False),
        ([{"name": "faces"}], False),
        ([{"name": "alice/faces/3"}], False),
        ([{"name": "alice/faces", "real_folder": ["a/b"]}], False),
        ([{"name": "alice/faces", "fake_folder": []}], False),
        ([], False),
    ],
)
def test_the_form_refuses_what_would_fail_later(sources, is_valid):
    schema = load_flow(DEPLOYMENTS[0]).parameters.model_dump()
    errors = validate({"data": {"sources": sources}}, schema)  # as Prefect's server does
    assert (not errors) == is_valid
