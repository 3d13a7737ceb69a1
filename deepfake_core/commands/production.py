"""What changes production, seals versions or frees their disk: `promote`, `refuse`, `rollback`, `seal`, `gc`."""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

from deepfake_core.errors import ConfigurationError, ModelError
from deepfake_core.serving.predictor import load_detector


def promote(options: argparse.Namespace) -> int:
    from deepfake_core.registry import production
    from deepfake_core.registry.connection import connect

    connect()
    current = production.find_production(options.model_name)
    if not confirm(options, f"Put version {options.version} into production instead of {current or 'none'}?"):
        return 1
    former = production.promote_by_hand(options.model_name, options.version, options.reason, options.force)
    print(f"Version {options.version} is in production instead of {former or 'none'}. `deepfake rollback` undoes it.")
    return 0


def refuse(options: argparse.Namespace) -> int:
    from deepfake_core.registry import approval
    from deepfake_core.registry.connection import connect

    connect()
    approval.refuse(options.model_name, options.version, options.reason)
    print(f"Version {options.version} is refused. `deepfake promote {options.version} --force` still promotes it.")
    return 0


def roll_back(options: argparse.Namespace) -> int:
    from deepfake_core.registry import aliases, production
    from deepfake_core.registry.connection import connect

    connect()
    current = production.find_production(options.model_name)
    previous = production.find_previous(options.model_name)
    if previous and not confirm(
        options, f"Put version {previous} back into production instead of {current or 'none'}?"
    ):
        return 1
    passed = aliases.explain_passed(options.model_name)
    restored, former = production.roll_back(options.model_name, options.reason)
    undo = f" `deepfake promote {former}` undoes it." if former else ""
    print(f"Version {restored} is back in production instead of {former or 'none'}{passed}.{undo}")
    return 0


def seal(options: argparse.Namespace) -> int:
    from deepfake_core.registry import detectors, names, seals
    from deepfake_core.registry.connection import connect
    from deepfake_core.registry.versions import read_version

    connect()
    version = read_version(options.model_name, options.version)
    with tempfile.TemporaryDirectory() as folder:
        copied = detectors.download_version(f"models:/{version.name}/{version.version}", Path(folder))
        digests = seals.hash_files(copied)
        description = load_detector(copied / "artifacts" / names.DETECTOR).description
    if names.SEAL in version.tags:
        print(f"Version {version.version} is sealed already, and its files are those that were registered.")
        return 0
    for name, digest in digests.items():
        print(f"{digest}  {name}")
    print(json.dumps(description, indent=2))
    if not confirm(options, f"Seal version {version.version} with these {len(digests)} files?"):
        return 1
    seals.seal_version(version.name, version.version, digests)
    print(f"Version {version.version} is sealed: from now on, nothing is used of it if any of these files changes.")
    return 0


def clean(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Column, Table

    try:
        from deepfake_core import housekeeping
        from deepfake_core.storage.store import open_store
    except ImportError as exc:
        raise ModelError(
            "`deepfake gc` needs packages that are not installed. Install deepfake-retraining[train]."
        ) from exc
    store = open_store(options.data_dir)
    if not store.folder.is_dir():
        raise ConfigurationError(f"--data-dir must be the data folder of a retrain. Received: {options.data_dir}")
    clean = partial(
        housekeeping.clean,
        store,
        options.model_name,
        options.keep,
        feedback=options.feedback,
        keep_rejected_days=options.keep_rejected_days,
        observations=options.observations,
        keep_observations_days=options.keep_observations_days,
    )
    removals = clean(dry_run=True)
    if not removals:
        print("Nothing to remove.")
        return 0
    table = Table(Column("what", overflow="fold"), "why", Column("MB", justify="right"))
    for removal in removals:
        table.add_row(removal.what, removal.why, f"{removal.bytes / 1e6:,.1f}")
    Console().print(table)
    if options.dry_run:
        print(f"{housekeeping.sum_up(removals)}; none was removed.")
        return 0
    if not confirm(options, f"Remove {housekeeping.sum_up(removals)}?"):
        return 1
    removed = clean(agreed=removals)
    print(f"Removed: {housekeeping.sum_up(removed)}.")
    return 0


def confirm(options: argparse.Namespace, question: str) -> bool:
    """Ask a person, unless `--yes` was given.

    Raises:
        ConfigurationError: if nobody answers.
    """
    if options.yes:
        return True
    try:
        answer = input(f"{question} [y/N] ")
    except EOFError as exc:
        raise ConfigurationError("A person must confirm. Received: no answer. Where nobody can, pass --yes.") from exc
    return answer.strip().lower() in ("y", "yes")
