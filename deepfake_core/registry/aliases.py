"""Which versions the aliases name, and where rollbacks lead."""

from collections.abc import Mapping
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from deepfake_core.errors import ModelError
from deepfake_core.registry import names
from deepfake_core.registry.audit import read_record
from deepfake_core.registry.versions import ModelVersion, read_version


def find_alias(model_name: str, alias: str) -> str | None:
    """Return the version that has an alias; None if none has it."""
    try:
        return str(mlflow.MlflowClient().get_model_version_by_alias(model_name, alias).version)
    except MlflowException as exc:
        # An unknown alias is INVALID_PARAMETER_VALUE, an unknown model RESOURCE_DOES_NOT_EXIST.
        if exc.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            return None
        raise


def find_production(model_name: str) -> str | None:
    """Return the version that has the alias `production`, or None if there is none yet."""
    return find_alias(model_name, names.PRODUCTION)


def read_production(model_name: str) -> ModelVersion:
    """Return the version in production.

    Raises:
        ModelError: if there is none.
    """
    current = find_production(model_name)
    if current is None:
        raise ModelError(f"There must be a production model. Received: none of the name {model_name}. Promote one.")
    return read_version(model_name, current)


def find_challenger(model_name: str) -> str | None:
    """Return the version that has the alias `challenger`, or None if there is none."""
    return find_alias(model_name, names.CHALLENGER)


def find_previous(model_name: str) -> str | None:
    """Return the version that a rollback leads to; None if there is none."""
    return next(iter(list_rollbacks(model_name)), None)


def list_rollbacks(model_name: str, with_deleted: bool = False) -> list[str]:
    """Return where rollbacks lead, one after the other: what production replaced, if it can still be served.

    Where the version in production was deleted, or lost its alias, that is what it had replaced.

    Args:
        with_deleted: versions too that were deleted, or whose model files were removed.
    """
    known, current = list_known(model_name), find_production(model_name)
    replaced = follow(current, known) if current else follow_record(model_name, read_record(model_name), known)
    return [one for one in replaced if with_deleted or (one in known and names.FILES_REMOVED not in known[one].tags)]


def explain_passed(model_name: str) -> str:
    """Return a remark on versions that the next rollback passes over; empty if it passes over none."""
    replaced, previous = list_rollbacks(model_name, with_deleted=True), find_previous(model_name)
    passed = replaced[: replaced.index(previous)] if previous else replaced
    return f" (passed over, as deleted or without model files: {', '.join(passed)})" if passed else ""


def list_known(model_name: str) -> dict[str, Any]:
    found = mlflow.MlflowClient().search_model_versions(f"name = '{model_name}'")
    return {str(version.version): version for version in found}


def follow_record(model_name: str, recorded: list[str], known: Mapping[str, Any]) -> list[str]:
    """Return where rollbacks led from the version that was recorded as production, though it may be deleted by now.

    Former code recorded the version alone.
    """
    if len(recorded) == 1 and recorded[0] in known:
        return follow(recorded[0], known)
    previous = None if recorded[1:] else find_alias(model_name, names.PREVIOUS)
    return [previous, *follow(previous, known)] if previous else recorded[1:]


def follow(version: str, known: Mapping[str, Any]) -> list[str]:
    """Return what a version replaced, latest first, as its tag says.

    Versions of former code have no such tag: theirs say which one they replaced, and which one replaced them.
    """
    if names.ROLLS_BACK_TO in known[version].tags:
        return known[version].tags[names.ROLLS_BACK_TO].split()
    chain = [version]
    while True:
        last = chain[-1]
        if last in known:
            before = [known[last].tags.get(names.REPLACED, names.NO_VERSION)]
        else:
            left = [one for one in known.values() if one.tags.get(names.REPLACED_BY) == last]
            left.sort(key=lambda one: one.tags.get(names.PRODUCTION_UNTIL, ""))
            before = [str(one.version) for one in left[-1:]]
        if not before or before[0] in (names.NO_VERSION, *chain):
            return chain[1:]
        chain += before
