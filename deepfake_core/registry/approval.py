"""A version that waits for approval: what a person is asked, and what becomes of it if nobody answers."""

import logging
from datetime import UTC, datetime

import mlflow

from deepfake_core.errors import ModelError
from deepfake_core.evaluation.metrics import METRIC_TITLES
from deepfake_core.registry import names
from deepfake_core.registry.production import hold_aliases
from deepfake_core.registry.versions import ModelVersion, find_pages, read_version, record_answer

log = logging.getLogger(__name__)

SECONDS_TO_REFUSE = 2 * 3600
"""In which `production.health`, which runs hourly, refuses a version that nobody approved."""


def describe_question(version: ModelVersion) -> str:
    """Return as Markdown what a person needs to know to approve or refuse a version."""
    rows = [(title, version.estimate(name)) for name, title in METRIC_TITLES.items()]
    metrics = "\n".join(f"| {title} | {estimate} |" for title, estimate in rows if estimate)
    reasons = "\n".join(f"- {reason}" for reason in version.reasons)
    pages = " · ".join(f"[{title}]({address})" for title, address in find_pages(version).items())
    drawn = "It was trained on drawn images: the metrics say nothing about real faces.\n\n" if version.is_drawn else ""
    return (
        f"## Shall {version.name} version {version.version} go into production?\n\n"
        f"It was compared with version {version.tags.get(names.COMPARED_WITH, names.NO_VERSION)}. "
        f"Without an answer until {_read_limit(version):%Y-%m-%d %H:%M} UTC it is refused.\n\n{reasons}\n\n{drawn}"
        + (f"| on the test split | 95 % interval |\n| --- | --- |\n{metrics}\n\n" if metrics else "")
        + f"{pages}\n"
    )


def limit_seconds(version: ModelVersion) -> int:
    """Return for how long to wait for an answer: longer than until `refuse_unanswered` has refused the version."""
    left = _read_limit(version) - datetime.now(UTC)
    return max(0, round(left.total_seconds())) + SECONDS_TO_REFUSE


def _read_limit(version: ModelVersion) -> datetime:
    return datetime.fromisoformat(version.tags[names.ANSWER_UNTIL])


def list_waiting(model_name: str) -> list[ModelVersion]:
    """Return the versions that wait for approval."""
    waits = f"name = '{model_name}' and tags.{names.DECISION} = '{names.WAITS}'"
    return [
        read_version(model_name, str(found.version)) for found in mlflow.MlflowClient().search_model_versions(waits)
    ]


def explain_answered(model_name: str, version: str) -> str:
    """Return why a version waits for approval no longer; empty if it does."""
    try:
        asked = read_version(model_name, version)
    except ModelError:
        return "It was deleted"
    return "" if asked.decision == names.WAITS else f"It was decided elsewhere: {asked.decision}, {asked.reasons[-1]}"


def refuse(model_name: str, version: str, reason: str) -> None:
    """Refuse a version that waits for approval; the reason is recorded with it.

    Raises:
        ModelError: if it does not wait, or was approved.
    """
    with hold_aliases(mlflow.MlflowClient(), model_name):
        waiting = read_version(model_name, version)
        known = names.PROMOTED if names.PRODUCTION_SINCE in waiting.tags else waiting.decision
        if known != names.WAITS:
            raise ModelError(
                f"Only a version that waits for approval can be refused. Received: version {version} of {model_name}, "
                f"which is {known or 'not decided yet'}. `deepfake rollback` takes one out of production."
            )
        _record_refusal(waiting, reason)


def refuse_unanswered(model_name: str) -> list[str]:
    """Refuse the versions whose time for an answer is over; return them.

    One that was in production was approved by a process that was killed before it could record so: it does now.
    """
    refused = []
    with hold_aliases(mlflow.MlflowClient(), model_name):
        for waiting in list_waiting(model_name):
            if names.PRODUCTION_SINCE in waiting.tags:
                record_answer(waiting, names.PROMOTED, waiting.tags[names.PRODUCTION_BECAUSE])
            elif datetime.now(UTC) > _read_limit(waiting):
                _record_refusal(waiting, f"nobody approved it until {waiting.tags[names.ANSWER_UNTIL]}")
                refused.append(waiting.version)
    return refused


def _record_refusal(waiting: ModelVersion, reason: str) -> None:
    record_answer(waiting, names.NOT_PROMOTED, f"refused: {reason}")
    log.info("%s: version %s is refused: %s", waiting.name, waiting.version, reason)
