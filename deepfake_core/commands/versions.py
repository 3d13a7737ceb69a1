"""What is known of registered versions: `versions`, `compare`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from deepfake_core.evaluation.promotion import Comparison


def list_versions(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Column, Table

    from deepfake_core.registry import versions

    found = versions.list_versions(options.model_name)
    table = Table("version", "created, data set", "on its test split", Column("decision", overflow="fold"))
    table.show_lines = True
    for version in found:
        shown = ("false_alarm_rate", "recall", "precision", "auc")
        metrics = {name: version.metrics.get(f"test/{name}") for name in shown}
        table.add_row(
            "\n".join((version.version, *version.aliases)),
            f"{version.created}\n{version.dataset_version}",
            "\n".join(f"{name} {value:.4f}" for name, value in metrics.items() if value is not None),
            "\n".join(version.list_history()),
        )
    if found:
        Console().print(table)
    else:
        print(f"No version of {options.model_name} yet: `make demo` or `python -m flows.retrain` makes one.")
    return 0


def compare(options: argparse.Namespace) -> int:
    from rich.console import Console

    from deepfake_core.registry import versions
    from deepfake_core.registry.connection import connect
    from deepfake_core.registry.scores import compare_logged_scores

    connect()
    first, second = (versions.read_version(options.model_name, number) for number in options.versions)
    if options.split:
        from deepfake_core.serving.comparison import compare_on_folder

        comparison, unreadable = compare_on_folder(first, second, options.split)
        if unreadable:
            print(f"{unreadable} files could not be read and are left out.", file=sys.stderr)
    else:
        comparison = compare_logged_scores(first, second)
    Console().print(_tabulate_comparison(comparison, options.versions))
    if comparison.difference:
        print(
            f"On {comparison.challenger.confusion.total} images, version {first.version}'s AUC is "
            f"{comparison.difference} above version {second.version}'s; it is better with probability "
            f"{comparison.probability:.3f}."
        )
    if not options.split:
        print("Where one version was trained on another data set, it may have seen some of these images.")
    return 0


def _tabulate_comparison(comparison: "Comparison", numbers: Sequence[str]) -> "Table":
    from rich.table import Column, Table

    from deepfake_core.evaluation.metrics import METRIC_TITLES

    ours, theirs = comparison.challenger, comparison.production
    rows: list[tuple[str, Mapping, Mapping, str]] = [
        (title, ours.metrics, theirs.metrics, name) for name, title in METRIC_TITLES.items()
    ]
    rows += [
        (f"{METRIC_TITLES[name]} on {source}", part.metrics, theirs.sources[source].metrics, name)
        for source, part in ours.sources.items()
        for name in ("false_alarm_rate", "recall", "auc")
    ]
    table = Table(Column("95 % intervals", overflow="fold"), *(f"version {number}" for number in numbers))
    for title, mine, other, name in rows:
        if name in mine or name in other:
            table.add_row(title, str(mine.get(name, "-")), str(other.get(name, "-")))
    return table
