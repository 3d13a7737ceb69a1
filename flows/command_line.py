"""The retrain flow's command line, built from the same parameter models as Prefect's form."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml
from prefect.client.orchestration import get_client
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_EPHEMERAL_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
)
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from rich.console import Console

from deepfake_core.config import (
    DataParameters,
    EvaluationParameters,
    PromotionParameters,
    TrainingParameters,
)
from deepfake_core.demo.archives import draw_archives
from deepfake_core.errors import ConfigurationError, ServiceError
from deepfake_core.storage.store import open_store

SAMPLE_DEFAULTS: dict[str, Any] = {"training": {"candidates": ["cnn"], "epochs": 12}}


class RetrainSettings(BaseSettings):
    """Run one retrain: download, index, deduplicate, split, merge, train, evaluate, log, promote."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        cli_prog_name="python -m flows.retrain",
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    config: Path | None = Field(default=None, description="YAML file of parameters. Flags beat the file.")
    sample: bool = Field(
        default=False,
        description="Draw three small archives instead of asking Kaggle. The metrics say nothing about real faces.",
    )
    data: DataParameters = DataParameters()
    training: TrainingParameters = TrainingParameters()
    evaluation: EvaluationParameters = EvaluationParameters()
    promotion: PromotionParameters = PromotionParameters()
    train_on: str = Field(
        default="", description="Name of the deployment that trains, such as train/gpu. Empty: train here."
    )
    force: bool = Field(default=False, description="Train even if data, parameters and code are a version's already.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from the file (passed by `read_settings`) and flags, never from the environment."""
        return (init_settings,)


def read_settings(arguments: Sequence[str]) -> RetrainSettings:
    """Read flags and the file that `--config` names; draw the archives that `--sample` asks for.

    Raises:
        ConfigurationError: for an unknown key or a value out of range, each named.
        SystemExit: for an unknown flag, as argparse does.
    """
    flags: CliSettingsSource = CliSettingsSource(RetrainSettings, cli_parse_args=list(arguments))
    given = flags()
    file = _read_file(Path(given["config"])) if given.get("config") else {}
    defaults = SAMPLE_DEFAULTS if given.get("sample") else {}
    values = {**defaults, **file, "training": {**defaults.get("training", {}), **file.get("training", {})}}
    try:
        settings = RetrainSettings(_cli_settings_source=flags, **values)
    except ValidationError as exc:
        raise ConfigurationError(_explain(exc)) from exc
    if not settings.sample:
        return settings
    if "sources" in settings.data.model_fields_set:
        raise ConfigurationError("--sample draws its own sources. Leave out either --sample or data.sources.")
    Console(stderr=True).print(
        "[bold]The images of this run are drawn, not photographs: its metrics say nothing about real faces.",
        soft_wrap=True,
    )
    sources = draw_archives(open_store(settings.data.data_dir).sample())
    return settings.model_copy(update={"data": settings.data.model_copy(update={"sources": sources})})


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ConfigurationError(f"--config must name a readable YAML file. Received: {path} ({exc})") from exc
    known = set(RetrainSettings.model_fields) - {"config", "sample"}
    if not isinstance(content, dict) or set(content) - known:
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ConfigurationError(
            f"The YAML file must be a mapping with the keys {', '.join(sorted(known))}. Received: {keys} in {path}"
        )
    return {name: value for name, value in content.items() if value is not None}


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        name = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            lines.append(f"{name}: there is no such parameter. Correct its name or leave it out")
        elif problem["type"] == "value_error":  # ours, which say what was received
            lines.append(f"{name}: {problem['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"{name}: {problem['msg']}. Received: {problem['input']!r}")
    return "Parameters must be known and in range.\n  " + "\n  ".join(lines) + "\nSee --help for all of them."


def check_prefect() -> None:
    """Fail at once if a Prefect server is configured and does not answer; without one, start a temporary one.

    Raises:
        ServiceError: with the address, and what to do.
    """
    if not PREFECT_API_URL.value() and PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        start_server()
    with get_client(sync_client=True) as client:
        address = client.api_url
        failure = client.api_healthcheck()
    if failure:
        raise ServiceError(
            f"Prefect must answer before anything runs. Received: {address}, which failed ({failure!r}). Start the "
            "server, correct PREFECT_API_URL, or unset it (and PREFECT_PROFILE) to run with a temporary one."
        )


def start_server() -> None:
    """Start Prefect's temporary server, which takes no Ctrl-C: a terminal sends it to all, and the run still needs it.

    Raises:
        ServiceError: if it does not answer in time.
    """
    server = SubprocessASGIServer()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # its process inherits this
    try:
        server.start()
    except httpx.TimeoutException:
        server.running = True  # it is there, and busy: the health check waits longer
    except RuntimeError as exc:
        server.stop()
        raise ServiceError(
            f"Prefect's temporary server must answer within {PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()} "
            f"seconds. Received: no answer from {server.address}. Wait until this machine is less busy, set "
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS to more, or set PREFECT_API_URL to a running server."
        ) from exc
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
