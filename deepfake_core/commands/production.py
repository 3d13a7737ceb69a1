"""What changes production or frees its disk: `promote`, `rollback`, `gc`."""

import argparse

from deepfake_core.errors import ConfigurationError, ModelError


def promote(options: argparse.Namespace) -> int:
    from deepfake_core.registry import production
    from deepfake_core.registry.connection import connect

    connect()
    current = production.find_production(options.model_name)
    if not _confirm(options, f"Put version {options.version} into production instead of {current or 'none'}?"):
        return 1
    former = production.promote_by_hand(options.model_name, options.version, options.reason, options.force)
    print(f"Version {options.version} is in production instead of {former or 'none'}. `deepfake rollback` undoes it.")
    return 0


def roll_back(options: argparse.Namespace) -> int:
    from deepfake_core.registry import production
    from deepfake_core.registry.connection import connect

    connect()
    current = production.find_production(options.model_name)
    previous = production.find_previous(options.model_name)
    if previous and not _confirm(
        options, f"Put version {previous} back into production instead of {current or 'none'}?"
    ):
        return 1
    passed = production.explain_passed(options.model_name)
    restored, former = production.roll_back(options.model_name, options.reason)
    undo = f" `deepfake promote {former}` undoes it." if former else ""
    print(f"Version {restored} is back in production instead of {former or 'none'}{passed}.{undo}")
    return 0


def clean(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Column, Table

    try:
        from deepfake_core import housekeeping
        from deepfake_core.storage.store import open_store
    except ImportError as exc:
        raise ModelError(
            "Housekeeping needs what retrains are made with. Received: an installation without. Install "
            "deepfake-retraining[train]."
        ) from exc
    store = open_store(options.data_dir)
    if not store.folder.is_dir():
        raise ConfigurationError(f"--data-dir must be the data folder of a retrain. Received: {options.data_dir}")
    removals = housekeeping.clean(store, options.model_name, options.keep, dry_run=True)
    if not removals:
        print("Nothing to remove.")
        return 0
    table = Table(Column("what", overflow="fold"), "why", Column("MB", justify="right"))
    for removal in removals:
        table.add_row(removal.what, removal.why, f"{removal.bytes / 1e6:,.1f}")
    Console().print(table)
    if options.dry_run:
        print(f"{_sum_up(removals)}; none was removed.")
        return 0
    if not _confirm(options, f"Remove {_sum_up(removals)}?"):
        return 1
    removed = housekeeping.clean(store, options.model_name, options.keep, agreed=removals)
    print(f"Removed: {_sum_up(removed)}.")
    return 0


def _sum_up(removals: list) -> str:
    return f"{len(removals)} items, {sum(removal.bytes for removal in removals) / 1e6:,.1f} MB"


def _confirm(options: argparse.Namespace, question: str) -> bool:
    if options.yes:
        return True
    try:
        answer = input(f"{question} [y/N] ")
    except EOFError as exc:
        raise ModelError("A person must confirm. Received: no answer. Where nobody can, pass --yes.") from exc
    return answer.strip().lower() in ("y", "yes")
