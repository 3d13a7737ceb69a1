"""The version in production: how it moves, whatever is killed meanwhile or moved in MLflow itself."""

import getpass
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import mlflow
from mlflow.exceptions import MlflowException

from deepfake_core.errors import ModelError, ProductionMovedError
from deepfake_core.evaluation.promotion import REASON_SEPARATOR
from deepfake_core.registry import names
from deepfake_core.registry.aliases import (
    explain_passed,
    find_alias,
    find_challenger,
    find_previous,
    find_production,
    follow_record,
    list_known,
    list_rollbacks,
)
from deepfake_core.registry.audit import (
    MAX_RECORDED_VERSIONS,
    MOVED_OUTSIDE,
    begin_move,
    note_outside_move,
    read_model_tags,
    read_move,
    read_record,
    record_move,
)
from deepfake_core.registry.versions import find_objections, read_version, record_answer, require_files

log = logging.getLogger(__name__)

MAX_LOCK_SECONDS = 60
"""A lock on the aliases that is older was left by a process that died; moving them takes a second."""


def move_production(model_name: str, version: str, expected: str | None, reason: str, back: bool = False) -> None:
    """Move the alias `production` to a version, unless it has moved since the caller looked.

    Both versions' tags say who replaced whom, when, by whom and why. The alias `previous` is where a rollback leads:
    the version that the new production replaced. What is to be said is written first, as one tag. Wherever this is
    killed, production is whole, `previous` is another version, and the next move writes the tags that are missing.

    Args:
        expected: what the caller found in production, and compared with; None for nothing.
        back: True for a rollback, after which `version` has still replaced what it had replaced before.

    Raises:
        ProductionMovedError: if something else is in production by now.
        ModelError: if the version's model files were removed.
    """
    client = mlflow.MlflowClient()
    with hold_aliases(client, model_name):
        current = find_production(model_name)
        if current != expected:
            raise ProductionMovedError(
                f"The alias {names.PRODUCTION} of {model_name} must still be where it was when the models were "
                f"compared. Received: version {current}, no longer {expected}. Compare again."
            )
        _move(client, model_name, version, current, reason, back)


def _move(
    client: mlflow.MlflowClient, model_name: str, version: str, current: str | None, reason: str, back: bool = False
) -> None:
    require_files(client.get_model_version(model_name, version))
    rollbacks = list_rollbacks(model_name)
    if back:
        rollbacks = rollbacks[rollbacks.index(version) + 1 :]
    elif current:
        rollbacks = [current, *rollbacks]
    begin_move(model_name, version, rollbacks, current, getpass.getuser(), reason, back)
    if find_alias(model_name, names.PREVIOUS) == version:
        client.delete_registered_model_alias(model_name, names.PREVIOUS)
    client.set_registered_model_alias(model_name, names.PRODUCTION, version)
    log.info("%s: version %s is in production instead of %s: %s", model_name, version, current, reason)
    try:
        _complete_move(client, model_name)
    except MlflowException as exc:
        why = str(exc).splitlines()[0]
        log.warning("%s: production has moved, its tags are completed by the next move (%s)", model_name, why)


@contextmanager
def take_outside_moves(model_name: str) -> Iterator[str | None]:
    """Give what to say of aliases that someone moved in MLflow itself, until a body succeeds; None if nobody did.

    What was moved is in the audit trail by then.
    """
    client = mlflow.MlflowClient()
    with hold_aliases(client, model_name):
        text = read_model_tags(model_name).get(names.OUTSIDE_MOVE)
        yield text
        if text:
            client.delete_registered_model_tag(model_name, names.OUTSIDE_MOVE)


def complete_move(model_name: str) -> None:
    """Write what a move of production that was killed left unsaid: tags of both versions, and the alias `previous`.

    Likewise what is to be said of a move that someone made in MLflow itself.
    """
    with hold_aliases(mlflow.MlflowClient(), model_name):
        pass


def _complete_move(client: mlflow.MlflowClient, model_name: str) -> None:
    current, known, recorded = find_production(model_name), list_known(model_name), read_record(model_name)
    for version, found in known.items():
        if version != current and names.MOVE in found.tags:  # it was killed before the alias moved
            client.delete_model_version_tag(model_name, version, names.MOVE)
    if not (current or recorded):
        return
    now, begun = current or names.NO_VERSION, current is not None and names.MOVE in known[current].tags
    move = read_move(known[now]) if begun else None
    if current and not recorded and names.PRODUCTION_SINCE not in known[current].tags:
        recorded = [names.NO_VERSION]
    if recorded and recorded[0] != now and not move:
        note_outside_move(model_name, f"{names.PRODUCTION} from version {recorded[0]} to {now}")
        rollbacks = [recorded[0], *follow_record(model_name, recorded, known)]
        move = begin_move(model_name, current, rollbacks, recorded[0], "unknown", MOVED_OUTSIDE)
    if move:
        record_move(model_name, current, move, known)
    challenger = find_challenger(model_name)
    if move and current and challenger and int(challenger) <= int(current):
        client.delete_registered_model_alias(model_name, names.CHALLENGER)
    previous, found = find_previous(model_name), find_alias(model_name, names.PREVIOUS)
    if recorded and not move and previous and found not in (None, previous):
        note_outside_move(model_name, f"{names.PREVIOUS} from version {previous} to {found}; it is put back")
    if previous:
        client.set_registered_model_alias(model_name, names.PREVIOUS, previous)
    else:
        client.delete_registered_model_alias(model_name, names.PREVIOUS)
    record = [now, *list_rollbacks(model_name, with_deleted=True)][:MAX_RECORDED_VERSIONS]
    if record != recorded:
        client.set_registered_model_tag(model_name, names.RECORDED_PRODUCTION, " ".join(record))
    if begun or (move and current):
        client.delete_model_version_tag(model_name, now, names.MOVE)


def name_challenger(model_name: str, version: str) -> None:
    """Give the alias `challenger` to a version that was not promoted, unless it is in production."""
    if find_production(model_name) != version:
        mlflow.MlflowClient().set_registered_model_alias(model_name, names.CHALLENGER, version)


def promote_by_hand(model_name: str, version: str, reason: str, force: bool = False) -> str | None:
    """Put a version that a person has chosen into production; return the version that was there.

    Raises:
        ModelError: if it is there already, or if there is an objection and `force` is not set.
    """
    client = mlflow.MlflowClient()
    with hold_aliases(client, model_name):
        chosen, current = read_version(model_name, version), find_production(model_name)
        objections = find_objections(chosen, read_version(model_name, current) if current else None)
        if version == current:
            raise ModelError(f"A version must not be in production yet. Received: {version}, which is.")
        if objections and not force:
            raise ModelError(
                f"A version must be suitable, unless it is forced. Received: version {version} of {model_name}: "
                f"{REASON_SEPARATOR.join(objections)}. Choose another, or force it (--force)."
            )
        forced = f" (forced, though {REASON_SEPARATOR.join(objections)})" if objections else ""
        _move(client, model_name, version, current, f"by hand: {reason}{forced}")
        if chosen.decision == names.WAITS:
            record_answer(chosen, names.PROMOTED, f"approved: {reason}{forced}")
    return current


def roll_back(model_name: str, reason: str) -> tuple[str, str | None]:
    """Put back into production the version that production replaced; return it and the one it replaces.

    A version that was deleted, or whose model files were removed, is passed over. Housekeeping keeps the files of the
    version that the next rollback leads to. Rollbacks beyond that one reach those among the newest that it keeps.

    Raises:
        ModelError: if there is none to go back to.
        ProductionMovedError: if another process moves production meanwhile.
    """
    complete_move(model_name)
    current, previous = find_production(model_name), find_previous(model_name)
    if previous is None:
        raise ModelError(
            f"A rollback needs a version that production replaced. Received: version {current} of {model_name} in "
            f"production, which replaced none{explain_passed(model_name)}. `deepfake promote N` puts any version there."
        )
    because = f"rolled back from version {current}: {reason}{explain_passed(model_name)}"
    move_production(model_name, previous, current, because, back=True)
    return previous, current


@contextmanager
def hold_aliases(client: mlflow.MlflowClient, model_name: str) -> Iterator[None]:
    """Let one process at a time move aliases, or answer for a version; what a killed move left unsaid is written first.

    MLflow's registry can't compare and set, but its models' names are unique, whatever stores them: whoever creates the
    model that serves as lock holds it.
    """
    lock = f"{model_name}-alias-lock"
    while True:
        try:
            client.create_registered_model(lock, description="An alias is being moved. It takes a second.")
            break
        except MlflowException as exc:
            # The latter if it was given back while MLflow looked up who holds it.
            if exc.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
                raise
        with suppress(MlflowException):  # it may be gone by now
            age = time.time() - client.get_registered_model(lock).creation_timestamp / 1000
            if age > MAX_LOCK_SECONDS:
                log.warning("%s was left behind %d s ago by a process that died: it is removed", lock, age)
                client.delete_registered_model(lock)
        time.sleep(0.2)
    try:
        _complete_move(client, model_name)
        yield
    finally:
        with suppress(MlflowException):  # whoever comes next removes it; the failure that led here must be seen
            client.delete_registered_model(lock)
