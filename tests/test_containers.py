"""The image, the stack in containers and the Kubernetes job, as far as they can be checked without an engine."""

import asyncio
import configparser
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
import yaml
from dotenv import dotenv_values
from kubernetes_asyncio import client as kubernetes
from mlflow.server.security_utils import is_allowed_host_header
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.server.schemas.actions import WorkPoolCreate
from prefect_kubernetes import KubernetesWorker
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from deployments.deploy import apply_pool
from deployments.stack import make_environment

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deployments"
BIN = Path(sys.executable).parent
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
TEMPLATE = json.loads((FOLDER / "kubernetes-gpu.json").read_text())
SHARED = dotenv_values(FOLDER / "stack.env")
WORKERS = ("worker-cpu", "worker-gpu")


def read_compose(**environment: str) -> dict:
    """Return compose.yaml with its variables filled in, as far as it uses Docker's syntax for them."""
    values = {**SHARED, "POSTGRES_PASSWORD": "secret", **environment}

    def fill(variable: re.Match[str]) -> str:
        name, default = re.fullmatch(r"(\w+)(?::-(.*)|:\?.*)?", variable[1]).groups()
        return values.get(name) or default

    return yaml.safe_load(re.sub(r"\$\{(.+?)\}", fill, (FOLDER / "compose.yaml").read_text()))


def read_dockerfile(instruction: str) -> str:
    (value,) = re.findall(rf"(?m)^{instruction} (.+)$", DOCKERFILE)
    return value


def read_lock(path: Path) -> dict[str, str]:
    return dict(re.findall(r"(?m)^([\w.-]+)(?:\[.*\])?==([\w.+-]+)", path.read_text()))


@pytest.mark.process
def test_the_dockerfile_has_no_warnings():
    hadolint = BIN / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint has no build for this platform")
    linted = subprocess.run([hadolint, FOLDER / "Dockerfile"], capture_output=True, text=True)
    assert (linted.returncode, linted.stdout) == (0, "")


@pytest.mark.process
def test_compose_fits_its_specification():
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", FOLDER / "compose.yaml"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.process
def test_docker_compose_reads_it_and_asks_for_a_password():
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("no docker client with compose here")
    command = [docker, "compose", "--env-file", FOLDER / "stack.env", "--file", FOLDER / "compose.yaml", "config"]
    environment = {name: value for name, value in os.environ.items() if name != "POSTGRES_PASSWORD"}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode
    assert "POSTGRES_PASSWORD" in refused.stderr
    environment["POSTGRES_PASSWORD"] = "secret"
    read = subprocess.run([*command, "--format", "json"], env=environment, capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    assert set(json.loads(read.stdout)["services"]) == set(read_compose()["services"])


def test_the_image_has_the_locked_versions_and_cuda_besides():
    locked, image = read_lock(ROOT / "requirements.lock"), read_lock(FOLDER / "gpu.lock")
    assert {name: version for name, version in image.items() if name in locked} == {
        name: locked[name] for name in image if name in locked
    }
    assert {name.split("-")[0] for name in set(image) - set(locked)} == {"nvidia"}
    assert not {name for name in locked if name.startswith("nvidia-") and name != "nvidia-ml-py"}
    assert "pytest" not in image
    assert f"tensorflow:{image['tensorflow']}-gpu is no base" in DOCKERFILE  # look again at the next one
    (python,) = re.findall(r"--python-version (\S+)", (ROOT / "Makefile").read_text())
    assert read_dockerfile("FROM").startswith(f"python:{python}-slim")


def test_local_stack_and_containers_start_the_same_parts():
    supervisor = configparser.RawConfigParser()
    supervisor.read(FOLDER / "supervisord.conf")
    local = {
        name.removeprefix("program:"): supervisor[name]["command"].replace("%(ENV_BIN)s/", "").split()
        for name in supervisor.sections()
        if name.startswith("program:")
    }
    services = read_compose()["services"]
    assert set(services) - set(local) == {"postgres", "deploy"}
    for name, command in local.items():
        assert services[name]["command"] == command + (["--with-healthcheck"] if name in WORKERS else [])
    assert services["deploy"]["command"][-1] in (ROOT / "Makefile").read_text()


@pytest.mark.process
def test_ports_and_flags_stand_in_one_file(monkeypatch):
    for name in SHARED:
        assert f"${{{name}" in (FOLDER / "compose.yaml").read_text(), name
        monkeypatch.delenv(name, raising=False)
    environment = make_environment()
    assert SHARED.items() <= environment.items()
    assert environment["PREFECT_API_URL"] == f"http://127.0.0.1:{SHARED['PREFECT_SERVER_API_PORT']}/api"
    monkeypatch.setenv("MLFLOW_PORT", "5055")
    assert make_environment()["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5055"

    services = read_compose(MLFLOW_PORT="5055", PREFECT_SERVER_API_PORT="4255")["services"]
    assert services["mlflow-server"]["ports"] == ["127.0.0.1:5055:5055"]
    assert services["prefect-server"]["ports"] == ["127.0.0.1:4255:4255"]
    for name in WORKERS:
        assert services[name]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow-server:5055"
        assert services[name]["environment"]["PREFECT_API_URL"] == "http://prefect-server:4255/api"
    text = "".join(
        path.read_text() for path in (FOLDER / "compose.yaml", FOLDER / "supervisord.conf", ROOT / "Makefile")
    )
    assert SHARED["PREFECT_SERVER_API_PORT"] not in text
    assert SHARED["MLFLOW_PORT"] not in text


def test_mlflow_answers_to_the_names_that_containers_and_browsers_call_it_by():
    environment = read_compose()["services"]["mlflow-server"]["environment"]
    allowed = environment["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    for host in ("mlflow-server", "127.0.0.1", "localhost"):
        assert is_allowed_host_header(allowed, f"{host}:{SHARED['MLFLOW_PORT']}")


def test_parts_wait_for_what_they_need_are_watched_and_hold_no_secret():
    compose = read_compose(POSTGRES_PASSWORD="p@ss:w/rd")
    services = compose["services"]
    for name, service in services.items():
        assert service["restart"] == ("no" if name == "deploy" else "unless-stopped")
        assert ("healthcheck" in service) == (name != "deploy"), name
        for needed, how in service.get("depends_on", {}).items():
            once = services[needed]["restart"] == "no"
            assert how["condition"] == ("service_completed_successfully" if once else "service_healthy")
    for name in WORKERS:
        kaggle = {key: value for key, value in services[name]["environment"].items() if key.startswith("KAGGLE_")}
        assert kaggle == dict.fromkeys(("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"))  # passed through
    secrets = [
        (name, key)
        for name, service in services.items()
        for key, value in (service.get("environment") or {}).items()
        if "p@ss:w/rd" in str(value)
    ]
    assert secrets == [
        ("postgres", "POSTGRES_PASSWORD"),
        ("prefect-server", "PGPASSWORD"),
        ("mlflow-server", "PGPASSWORD"),
    ]
    (gpu,) = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpu == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "deploy" not in services["worker-cpu"]


def test_volumes_lie_where_the_image_has_folders_of_its_user():
    checkout, user = read_dockerfile("WORKDIR"), read_dockerfile("USER")
    services = read_compose()["services"]
    mounted = [volume.split(":") for name in ("mlflow-server", *WORKERS) for volume in services[name]["volumes"]]
    assert mounted == [["artifacts", f"{checkout}/stack/artifacts"], *[["data", f"{checkout}/data"]] * 2]
    assert set(read_compose()["volumes"]) == {"postgres", "artifacts", "data"}
    assert f"PYTHONPATH={checkout} " in DOCKERFILE
    assert "install --directory --owner=deepfake data stack stack/artifacts" in DOCKERFILE
    assert f"useradd --uid {user} " in DOCKERFILE


def test_the_job_template_is_prefects_own_with_a_gpu_a_volume_and_a_secret():
    ours, pod = copy.deepcopy(TEMPLATE), {}
    spec = ours["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    for name in ("volumes", "securityContext", "tolerations"):
        pod[name] = spec.pop(name)
    for name in ("envFrom", "volumeMounts"):
        pod[name] = container.pop(name)
    pod["gpu"] = container["resources"]["limits"].pop("nvidia.com/gpu")
    properties = ours["variables"]["properties"]
    assert (properties.pop("data_claim")["type"], properties.pop("secret")["type"]) == ("string", "string")
    assert properties["image"]["default"] == SHARED["IMAGE"]
    properties["image"]["default"] = None
    assert ours == KubernetesWorker.get_default_base_job_template()
    assert pod["gpu"] == "1"
    assert pod["securityContext"] == {"runAsNonRoot": True, "fsGroup": int(read_dockerfile("USER"))}
    WorkPoolCreate(name="gpu", type="kubernetes", base_job_template=TEMPLATE)  # the server's own validation


@pytest.mark.slow
@pytest.mark.process
def test_a_training_becomes_a_job_with_one_gpu_and_the_data_folder():
    deployments = yaml.safe_load((FOLDER / "prefect.yaml").read_text())["deployments"]
    (train,) = [deployment for deployment in deployments if deployment["entrypoint"].startswith("flows/train.py")]
    variables = {"data_claim": "faces", "secret": "credentials", "memory_limit": "16Gi"}
    job = asyncio.run(render_job(train["work_pool"]["job_variables"] | variables))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/gpu": "1"}
    assert container["volumeMounts"] == [{"name": "data", "mountPath": f"{read_dockerfile('WORKDIR')}/data"}]
    assert pod["volumes"] == [{"name": "data", "persistentVolumeClaim": {"claimName": "faces"}}]
    assert container["envFrom"] == [{"secretRef": {"name": "credentials"}}]
    assert container["image"] == SHARED["IMAGE"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment["PREFECT_LOGGING_EXTRA_LOGGERS"] == "deepfake_core"
    assert container["args"][0] == "prefect"

    # Kubernetes' own classes know every field: what they don't would get lost here.
    del pod["completions"], pod["parallelism"]  # Prefect's template has them in the wrong place
    assert asyncio.run(keep_known_fields(job)) == job


async def render_job(variables: dict) -> dict:
    configuration = await KubernetesWorkerJobConfiguration.from_template_and_values(TEMPLATE, variables)
    configuration.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="training"))
    return configuration.job_manifest


async def keep_known_fields(content: dict, kind: str = "V1Job") -> dict:
    async with kubernetes.ApiClient() as api:
        response = SimpleNamespace(data=json.dumps(content))
        return api.sanitize_for_serialization(api.deserialize(response, kind))


def test_the_ray_cluster_has_the_fields_that_kuberay_knows_and_runs_the_image():
    """Its pods are checked by Kubernetes' own classes; the rest by names from KubeRay's documentation."""
    cluster = yaml.safe_load((FOLDER / "ray-cluster.yaml").read_text())
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    spec = cluster["spec"]
    assert set(spec) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    assert spec["rayVersion"] == read_lock(FOLDER / "gpu.lock")["ray"]
    (workers,), head = spec["workerGroupSpecs"], spec["headGroupSpec"]
    assert set(head) == {"rayStartParams", "template"}
    assert set(workers) == {*head, "groupName", "replicas", "minReplicas", "maxReplicas"}
    for group in (head, workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert asyncio.run(keep_known_fields(group["template"], "V1PodTemplateSpec")) == group["template"]
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == SHARED["IMAGE"]
        assert container["volumeMounts"] == [{"name": "data", "mountPath": f"{read_dockerfile('WORKDIR')}/data"}]
        claim = TEMPLATE["variables"]["properties"]["data_claim"]["default"]
        assert pod["volumes"] == [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]


@pytest.mark.usefixtures("prefect_api")
def test_the_gpu_pool_takes_the_template_and_keeps_its_type():
    with get_client(sync_client=True) as client:
        apply_pool(client, "gpu-of-a-cluster", "kubernetes")
        apply_pool(client, "gpu-of-a-cluster")  # as `make deploy` does
        pool = client.read_work_pool("gpu-of-a-cluster")
        assert (pool.type, pool.base_job_template) == ("kubernetes", TEMPLATE)
        with pytest.raises(SystemExit, match=r"must be process\. Received: kubernetes"):
            apply_pool(client, "gpu-of-a-cluster", "process")


@pytest.mark.sweep
@pytest.mark.process
@pytest.mark.slow
def test_the_image_has_the_files_that_deploying_and_every_flow_need(tmp_path):
    """From what .dockerignore lets through, every flow and what deploys them can be imported."""
    image = tmp_path / "image"
    (ignored, *kept, compiled) = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    assert (ignored, compiled) == ("*", "**/__pycache__")
    for line in kept:
        source, target = ROOT / line.removeprefix("!"), image / line.removeprefix("!")
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    modules = sorted(f"flows.{path.stem}" for path in (ROOT / "flows").glob("[a-z]*.py"))
    command = f"import {', '.join(modules)}, deployments.deploy, deployments.alerts; print(flows.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(image)}
    imported = subprocess.run(
        [sys.executable, "-c", command], cwd=image, env=environment, capture_output=True, text=True
    )
    assert imported.stdout.strip() == str(image / "flows" / "__init__.py"), imported.stderr
    for deployment in yaml.safe_load((image / "deployments" / "prefect.yaml").read_text())["deployments"]:
        assert (image / deployment["entrypoint"].split(":")[0]).is_file()
