"""Registered versions, as plain values."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from deepfake_core.errors import ModelError
from deepfake_core.evaluation.evaluation import Estimate
from deepfake_core.evaluation.promotion import NOT_MET, REASON_SEPARATOR
from deepfake_core.registry import names
from deepfake_core.registry.connection import DEFAULT_TRACKING_URI, connect

MAX_TEXT_CHARACTERS = 5000
"""What MLflow's databases hold of a description, or of a registered model's tag."""


@dataclass(frozen=True)
class ModelVersion:
    """A registered version.

    Attributes:
        tags: by the names in `names`; what is read often has a property.
        metrics: of its run; none if the run is gone.
        created: local time, to the minute.
        card: its description, the model card; empty until its report is written.
    """

    name: str
    version: str
    run_id: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    created: str
    card: str = ""

    @property
    def decision(self) -> str:
        """`promoted`, `not promoted` or `waits for approval`; empty if it was never compared with production."""
        return self.tags.get(names.DECISION, "")

    @property
    def reasons(self) -> list[str]:
        """Why it was promoted or not, each readable on its own."""
        return [reason for reason in self.tags.get(names.REASONS, "").split(REASON_SEPARATOR) if reason]

    @property
    def is_finished(self) -> bool:
        """Whether it was compared with production, and its report was written: the card is written last."""
        return bool(self.decision and self.card)

    @property
    def is_drawn(self) -> bool:
        """Whether it was trained on drawn images."""
        return self.tags.get(names.DRAWN_IMAGES) == "true"

    @property
    def dataset_version(self) -> str:
        return self.tags.get(names.DATASET_VERSION, "")

    def list_history(self) -> list[str]:
        """Return what became of it, a line each: decision and reasons, its time in production, removed files."""
        lines, tags = [self.decision or "not decided yet", *self.reasons], self.tags
        if names.PRODUCTION_SINCE in tags:
            lines.append(f"in production {tags[names.PRODUCTION_SINCE]}, by {tags.get(names.PRODUCTION_BY, 'unknown')}")
            because = tags.get(names.PRODUCTION_BECAUSE, "")
            if because and because != tags.get(names.REASONS):
                lines.append(because)
        if names.REPLACED_BY in tags:
            until = tags.get(names.PRODUCTION_UNTIL, "at an unknown time")
            lines.append(f"replaced {until} by version {tags[names.REPLACED_BY]}")
        if names.FILES_REMOVED in tags:
            lines.append(f"model files removed {tags[names.FILES_REMOVED]}")
        elif names.SEAL not in tags:
            lines.append(f"not sealed: `deepfake seal {self.version}` shows its files and records their SHA-256")
        return lines

    def estimate(self, metric: str) -> Estimate | None:
        """Return a metric on its test split with the interval; None if its run does not hold it."""
        ends = [self.metrics.get(f"test/{metric}{end}") for end in ("", "_low", "_high")]
        return None if None in ends else Estimate(*ends)  # type: ignore[arg-type]


def find_pages(version: ModelVersion) -> dict[str, str]:
    """Return the addresses of MLflow's pages about a version, by what they show; none if no server is tracking."""
    uri = (os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_TRACKING_URI).rstrip("/")
    if not uri.startswith(("http://", "https://")):
        return {}
    scheme, _, address = uri.partition("://")
    uri = f"{scheme}://{address.rpartition('@')[2]}"  # without a password
    pages = {"version": f"{uri}/#/models/{version.name}/versions/{version.version}"}
    if run := find_run(version.run_id):
        address = f"{uri}/#/experiments/{run.info.experiment_id}/runs/{version.run_id}"
        pages |= {"metrics and curves": address, "report": f"{address}/artifacts/{names.REPORT}"}
    return pages


def find_run(run_id: str) -> Any:
    """Return a run; None if it was removed, or if there is none of this id."""
    try:
        return mlflow.MlflowClient().get_run(run_id)
    except MlflowException as exc:
        if exc.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def describe_version(model_name: str, version: str, card: str) -> None:
    """Set a version's description: its model card, as Markdown, cut to what MLflow's databases hold."""
    if len(card) > MAX_TEXT_CHARACTERS:
        card = f"{card[: MAX_TEXT_CHARACTERS - 40].rsplit(chr(10), 1)[0]}\n\nCut; report.html has all."
    mlflow.MlflowClient().update_model_version(model_name, version, card)


def tag_version(model_name: str, version: str, tags: Mapping[str, str]) -> None:
    for name, value in tags.items():
        mlflow.MlflowClient().set_model_version_tag(model_name, version, name, value)


def record_answer(version: ModelVersion, decision: str, answer: str) -> None:
    """Record what became of a version that waited for approval: the answer is its last reason."""
    reasons = REASON_SEPARATOR.join([*version.reasons, answer.replace(REASON_SEPARATOR, ", ")])
    card = version.card.replace(f"**Decision**: {names.WAITS}.", f"**Decision**: {decision}, {answer}.")
    describe_version(version.name, version.version, card)
    tag_version(version.name, version.version, {names.REASONS: reasons, names.DECISION: decision})


def list_versions(model_name: str) -> list[ModelVersion]:
    """Return every version, newest first."""
    client = connect()
    found = client.search_model_versions(f"name = '{model_name}'")
    return [
        read_version(model_name, str(version.version))
        for version in sorted(found, key=lambda version: int(version.version), reverse=True)
    ]


def read_version(model_name: str, version: str) -> ModelVersion:
    """Return one version with its run's metrics, if the run is still there.

    Raises:
        ModelError: if there is none of this number.
    """
    client = mlflow.MlflowClient()
    try:
        found = client.get_model_version(model_name, version)
    except MlflowException as exc:
        if exc.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise ModelError(
            f"A version must be a number that the registry knows. Received: {version!r} of {model_name}, at "
            f"{mlflow.get_tracking_uri()}. `deepfake versions` lists them."
        ) from exc
    run_id = str(found.run_id)
    run = find_run(run_id)
    return ModelVersion(
        name=model_name,
        version=version,
        run_id=run_id,
        aliases=tuple(sorted(found.aliases)),
        tags=found.tags,
        metrics=run.data.metrics if run else {},
        created=time.strftime("%Y-%m-%d %H:%M", time.localtime(found.creation_timestamp / 1000)),
        card=found.description or "",
    )


def find_version(model_name: str, flow_run_id: str) -> str:
    """Return the version that a flow run registered.

    Raises:
        ModelError: if it registered none in the MLflow that this process knows.
    """
    found = mlflow.MlflowClient().search_model_versions(
        f"name = '{model_name}' and tags.{names.FLOW_RUN_ID} = '{flow_run_id}'"
    )
    if not found:
        raise ModelError(
            f"Training must register its model where this process looks. Received: no version of {model_name} by "
            f"flow run {flow_run_id} at {mlflow.get_tracking_uri()}. Set the same MLFLOW_TRACKING_URI on all workers."
        )
    return str(max(int(version.version) for version in found))


def require_files(version: Any) -> None:
    """Refuse a version of MLflow's client whose model files housekeeping removed."""
    removed = version.tags.get(names.FILES_REMOVED)
    if removed:
        raise ModelError(
            f"A version's model files must still be there. Received: version {version.version} of {version.name}, "
            f"whose files were removed {removed}; metrics and report are kept. Choose another version "
            f"(`deepfake versions`), or train it again with `force`: run {version.run_id} lists data and parameters."
        )


def find_objections(version: ModelVersion, production: ModelVersion | None) -> list[str]:
    """Return the objections to putting a version into production."""
    objections = []
    if version.decision == names.WAITS:
        now, compared = production.version if production else names.NO_VERSION, version.tags[names.COMPARED_WITH]
        if now != compared:
            objections.append(f"it was compared with version {compared}, and {now} is in production now")
    elif version.decision != names.PROMOTED:
        failed = [reason for reason in version.reasons if reason.startswith(NOT_MET)]
        objections.append(", ".join(failed) or "it was never compared with production")
    if version.is_drawn and production and not production.is_drawn:
        objections.append("it was trained on drawn images, production on photographs")
    return objections


def has_versions(model_name: str) -> bool:
    return bool(mlflow.MlflowClient().search_model_versions(f"name = '{model_name}'", max_results=1))
