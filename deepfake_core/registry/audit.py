"""The audit trail of production, in tags of MLflow: who moved it, when, from where, and why."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import mlflow
from pydantic import BaseModel, Field, ValidationError

from deepfake_core.registry import names
from deepfake_core.registry.versions import MAX_TEXT_CHARACTERS, tag_version

log = logging.getLogger(__name__)

MOVED_OUTSIDE = "moved outside, in MLflow itself"
MAX_RECORDED_VERSIONS = 500
"""A registered model's tag holds the numbers of as many versions."""


class Move(BaseModel):
    """What is to be said of a move of production that has begun."""

    former: str | None = Field(alias="from")
    at: str
    by: str
    because: str
    back: bool


def begin_move(
    model_name: str,
    version: str | None,
    rollbacks: list[str],
    former: str | None,
    by: str,
    reason: str,
    back: bool = False,
) -> Move:
    """Write what is to be said of a move, as one tag, and where rollbacks lead from then on; return the former.

    Where someone removed the alias, there is no version to write it to.
    """
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    move = Move.model_validate({"from": former, "at": now, "by": by, "because": reason, "back": back})
    leads = " ".join(one for one in rollbacks if one not in (version, names.NO_VERSION))
    if version:
        tag_version(model_name, version, {names.ROLLS_BACK_TO: leads, names.MOVE: move.model_dump_json(by_alias=True)})
    return move


def read_move(version: Any) -> Move | None:
    """Return what is to be said of a move that has begun; None if someone damaged the tag.

    Args:
        version: of MLflow's client, with the tag.
    """
    tag = version.tags[names.MOVE]
    try:
        return Move.model_validate_json(tag)
    except ValidationError:
        of = f"version {version.version} of {version.name}"
        log.warning("the tag %s of %s is damaged, and removed. It was: %.500s", names.MOVE, of, tag)
        return None


def record_move(model_name: str, version: str | None, move: Move, known: Mapping[str, Any]) -> None:
    """Write into the tags of both versions what is to be said of a move that was made; a deleted one has none.

    Args:
        version: in production now; None where someone removed the alias.
        known: the versions that exist, by their numbers.
    """
    if move.former in known:
        left = {names.PRODUCTION_UNTIL: move.at, names.REPLACED_BECAUSE: move.because}
        tag_version(model_name, str(move.former), left | {names.REPLACED_BY: version or names.NO_VERSION})
    if version:
        since = {names.PRODUCTION_BY: move.by, names.PRODUCTION_BECAUSE: move.because}
        if not move.back:
            since[names.REPLACED] = move.former or names.NO_VERSION
        tag_version(model_name, version, since | {names.PRODUCTION_SINCE: move.at})


def note_outside_move(model_name: str, what: str) -> None:
    """Add a sentence on an alias that someone moved in MLflow itself to what is still to be announced."""
    text, before = f"someone moved the alias {what}", read_model_tags(model_name).get(names.OUTSIDE_MOVE, "")
    log.warning("%s: %s: %s", model_name, MOVED_OUTSIDE, text)
    if before.endswith(text):  # a process was killed after this
        return
    text = f"{before}; {text}" if before else f"{MOVED_OUTSIDE}: {text}"
    mlflow.MlflowClient().set_registered_model_tag(model_name, names.OUTSIDE_MOVE, text[-MAX_TEXT_CHARACTERS:])


def read_model_tags(model_name: str) -> dict[str, str]:
    """Return the tags of a registered model; none if there is no such model."""
    found = mlflow.MlflowClient().search_registered_models(f"name = '{model_name}'")
    return found[0].tags if found else {}


def read_record(model_name: str) -> list[str]:
    """Return what was in production when a move was last completed, and where rollbacks led from there; or nothing."""
    return read_model_tags(model_name).get(names.RECORDED_PRODUCTION, "").split()
