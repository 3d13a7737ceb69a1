"""The seal of a version: the SHA-256 of each of its files, recorded as a tag when it was registered."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepfake_core.errors import ModelError
from deepfake_core.registry import names
from deepfake_core.registry.versions import tag_version
from deepfake_core.storage.files import hash_file

log = logging.getLogger(__name__)


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256, in hex, of each file below a folder, by its path in the folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): hash_file(file) for file in files}


def write_seal(digests: Mapping[str, str]) -> dict[str, str]:
    """Return the tag that seals a version with these files."""
    return {names.SEAL: json.dumps(digests, sort_keys=True)}


def seal_version(model_name: str, version: str, digests: Mapping[str, str]) -> None:
    """Seal a version that was registered without a seal, after a person has looked at its files."""
    tag_version(model_name, version, write_seal(digests))


def check_seal(version: Any, folder: Path) -> None:
    """Refuse a copy of a version's files that are not those which were registered.

    A version without a seal, as earlier code registered it, gets a warning.

    Args:
        version: of MLflow's client.

    Raises:
        ModelError: if a file has changed, is missing, or was added.
    """
    if names.SEAL not in version.tags:
        log.warning(
            "Version %s of %s is not sealed: nothing shows that its files are those that were registered. "
            "`deepfake seal %s` shows them and seals it.",
            version.version,
            version.name,
            version.version,
        )
        return
    sealed, found = _read_seal(version), hash_files(folder)
    wrong = [f"{name} is missing" for name in sorted(sealed.keys() - found.keys())]
    wrong += [f"{name} was added" for name in sorted(found.keys() - sealed.keys())]
    wrong += [f"{name} has changed" for name in sorted(sealed.keys() & found.keys()) if sealed[name] != found[name]]
    if wrong:
        raise ModelError(
            f"A version's files must be those that were registered. Received: version {version.version} of "
            f"{version.name}, of which {', '.join(wrong)}. Nothing of it was loaded. Find out who or what changed its "
            "files in MLflow's artifact store. Restore them from a backup, or use another version."
        )


def _read_seal(version: Any) -> dict[str, str]:
    try:
        sealed = json.loads(version.tags[names.SEAL])
    except ValueError:
        sealed = None
    if isinstance(sealed, dict) and sealed and all(isinstance(digest, str) for digest in sealed.values()):
        return sealed
    raise ModelError(
        "The seal of a version must be its files' names and SHA-256. Received: a changed tag "
        f"{names.SEAL} of version {version.version} of {version.name}. Nothing of it was loaded. Use another version. "
        f"If its files are known to be right, delete the tag and run `deepfake seal {version.version}`."
    )


def require_seal(version: Any) -> None:
    """Refuse a version that is not sealed, since its code is about to be run.

    Args:
        version: of MLflow's client, or a `ModelVersion`.
    """
    if names.SEAL not in version.tags:
        raise ModelError(
            f"A version must be sealed before its own code is run. Received: version {version.version} of "
            f"{version.name}, which earlier code registered without a seal. Look at its files and seal it: `deepfake "
            f"seal {version.version}`."
        )
