"""The version in production: which it is, how it moves, and the record of who moved it and why."""

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
from deepfake_core.registry.versions import ModelVersion, read_version, require_files, tag_version

log = logging.getLogger(__name__)

MAX_LOCK_SECONDS = 60
"""A lock on the aliases that is older was left by a process that died; moving them takes a second."""


def find_production(model_name: str) -> str | None:
    """Return the version that has the alias `production`, or None if there is none yet."""
    try:
        return str(mlflow.MlflowClient().get_model_version_by_alias(model_name, names.PRODUCTION).version)
    except MlflowException as exc:
        # An unknown alias is INVALID_PARAMETER_VALUE, an unknown model RESOURCE_DOES_NOT_EXIST.
        if exc.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            return None
        raise


def find_previous(model_name: str) -> str | None:
    """Return the version that a rollback leads to: the one that production replaced."""
    current = find_production(model_name)
    replaced = (
        mlflow.MlflowClient().get_model_version(model_name, current).tags.get(names.REPLACED) if current else None
    )
    return replaced if replaced not in (None, names.NO_VERSION) else None


def move_production(model_name: str, version: str, expected: str | None, reason: str, back: bool = False) -> None:
    """Move the alias `production` to a version, unless it has moved since the caller looked.

    Both versions' tags say who replaced whom, when, by whom and why. The alias `previous` is where a rollback leads:
    the version that the new production replaced.

    Args:
        expected: what the caller found in production, and compared with; None for nothing.
        back: True for a rollback, after which `version` has still replaced what it had replaced before.

    Raises:
        ProductionMovedError: if something else is in production by now.
        ModelError: if the version's model files were removed.
    """
    client = mlflow.MlflowClient()
    with hold_aliases(client, model_name):
        require_files(client.get_model_version(model_name, version))
        current = find_production(model_name)
        if current != expected:
            raise ProductionMovedError(
                f"The alias {names.PRODUCTION} of {model_name} must still be where it was when the models were "
                f"compared. Received: version {current}, no longer {expected}. Compare again."
            )
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        tags = {
            names.PRODUCTION_SINCE: now,
            names.PRODUCTION_BY: getpass.getuser(),
            names.PRODUCTION_BECAUSE: reason,
        }
        if not back:
            tags[names.REPLACED] = current or names.NO_VERSION
        tag_version(model_name, version, tags)
        if current:
            left = {names.PRODUCTION_UNTIL: now, names.REPLACED_BY: version, names.REPLACED_BECAUSE: reason}
            tag_version(model_name, current, left)
        client.set_registered_model_alias(model_name, names.PRODUCTION, version)
        previous = find_previous(model_name)
        if previous:
            client.set_registered_model_alias(model_name, names.PREVIOUS, previous)
        else:
            client.delete_registered_model_alias(model_name, names.PREVIOUS)
    log.info("%s: version %s is in production instead of %s: %s", model_name, version, current, reason)


def promote_by_hand(model_name: str, version: str, reason: str, force: bool = False) -> str | None:
    """Put a version that a person has chosen into production; return the version that was there.

    Raises:
        ModelError: if it is there already, or if there is an objection and `force` is not set.
        ProductionMovedError: if another process moves production meanwhile.
    """
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
    move_production(model_name, version, current, f"by hand: {reason}{forced}")
    return current


def roll_back(model_name: str, reason: str) -> tuple[str, str]:
    """Put the version that production replaced back into production; return it and the one it replaces.

    Housekeeping keeps the files of the version that the next rollback leads to. Rollbacks beyond that one reach those
    among the newest versions that it keeps.

    Raises:
        ModelError: if there is none to go back to, or if its model files were removed.
        ProductionMovedError: if another process moves production meanwhile.
    """
    current, previous = find_production(model_name), find_previous(model_name)
    if current is None or previous is None:
        raise ModelError(
            f"A rollback needs a version that production replaced. Received: version {current} of {model_name} in "
            "production, which replaced none. `deepfake promote N` puts any version there."
        )
    read_version(model_name, previous)
    move_production(model_name, previous, current, f"rolled back from version {current}: {reason}", back=True)
    return previous, current


def find_objections(version: ModelVersion, production: ModelVersion | None) -> list[str]:
    """Return the objections to putting a version into production."""
    objections = []
    if version.decision != names.PROMOTED:
        failed = [reason for reason in version.reasons if reason.startswith("NOT met")]
        objections.append(", ".join(failed) or "it was never compared with production")
    if version.is_drawn and production and not production.is_drawn:
        objections.append("it was trained on drawn images, production on photographs")
    return objections


@contextmanager
def hold_aliases(client: mlflow.MlflowClient, model_name: str) -> Iterator[None]:
    """Let one process at a time move aliases.

    MLflow's registry can't compare and set, but its models' names are unique, whatever stores them: whoever creates the
    model that serves as lock holds it.
    """
    lock = f"{model_name}-alias-lock"
    while True:
        try:
            client.create_registered_model(lock, description="An alias is being moved. It takes a second.")
            break
        except MlflowException as exc:
            if exc.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        with suppress(MlflowException):  # it may be gone by now
            age = time.time() - client.get_registered_model(lock).creation_timestamp / 1000
            if age > MAX_LOCK_SECONDS:
                log.warning("%s was left behind %d s ago by a process that died: it is removed", lock, age)
                client.delete_registered_model(lock)
        time.sleep(0.2)
    try:
        yield
    finally:
        client.delete_registered_model(lock)
