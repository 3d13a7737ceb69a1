"""What came out of a retrain, as text: Markdown for Prefect's pages, tables for the terminal."""

import os
import textwrap
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from deepfake_core.config import CLASS_NAMES
from deepfake_core.data.dataset import Dataset
from deepfake_core.evaluation.evaluation import Evaluation, per_100
from deepfake_core.evaluation.metrics import METRIC_TITLES
from deepfake_core.evaluation.test_split import Measured
from deepfake_core.registry import challenge, names
from deepfake_core.registry.connection import DEFAULT_TRACKING_URI
from deepfake_core.registry.runs import find_local_artifact
from deepfake_core.registry.versions import ModelVersion, find_pages
from deepfake_core.reports.model_report import HEADLINE

DRAWN_WARNING = "These images are drawn: the metrics say nothing about real faces."


def describe_challenge(outcome: challenge.Outcome, model_name: str, version: str, measured: Measured) -> str:
    """Return as Markdown whether a challenger was promoted, why, and its metrics."""
    metrics = measured.evaluation.metrics
    headline = "\n".join(f"- {title}: {metrics[key]}" for key, title in HEADLINE.items() if key in metrics)
    decision = outcome.decision.describe(model_name, version, outcome.production)
    words = measured.evaluation.in_words
    return f"{decision}\nOn {len(measured.images)} test images, {words}.\n\n{headline}\n"


def describe_retrain(dataset: Dataset, version: ModelVersion) -> str:
    """Return as Markdown what a retrain decided, its metrics and data, and links to MLflow's pages."""
    estimates = {title: version.estimate(key) for key, title in HEADLINE.items()}
    metrics = "\n".join(f"| {title} | {estimate} |" for title, estimate in estimates.items() if estimate)
    reasons = "\n".join(f"- {reason}" for reason in version.reasons)
    images = ", ".join(f"{split} {len(dataset.split(split)):,}" for split in dataset.splits)
    pages = " · ".join(f"[{title}]({address})" for title, address in find_pages(version).items())
    drawn = f"\n**{DRAWN_WARNING}**\n" if dataset.is_drawn else ""
    return (
        f"## {version.name} version {version.version}: {version.decision}\n\n{reasons}\n{drawn}\n"
        f"| on the test split | 95 % interval |\n| --- | --- |\n{metrics}\n\n"
        f"Data set {dataset.version}: {images} images of {dataset.description['counts']['files']:,} files found.\n\n"
        f"{f'In MLflow: {pages}' if pages else ''}\n"
    )


def list_left_out(found: Mapping[str, tuple[Evaluation, Evaluation]]) -> list[dict[str, str]]:
    """Return a row per source that was left out of training, as text.

    Args:
        found: by source: on the test split of the others, and on it.
    """
    return [
        {
            "left out": source,
            "AUC on the others": str(seen.metrics["auc"]),
            "AUC on it": str(own.metrics["auc"]),
            "of it, at the threshold": own.in_words,
            "wrong where sure": str(own.metrics.get("error_when_sure", "-")),
        }
        for source, (seen, own) in found.items()
    ]


def print_outcome(dataset: Dataset, version: ModelVersion) -> None:
    """Print what a retrain found, reached and decided."""
    console = Console()
    console.print(_tabulate_files(dataset))
    splits = Table("images", *dataset.splits, title=f"Data set {dataset.version}")
    for label in CLASS_NAMES:
        splits.add_row(label, *(str(counts[label]) for counts in dataset.splits.values()))
    console.print(splits)

    result = Table("", "on the test split (95 % interval)", title=f"{version.name} version {version.version}")
    for name, title in {"false_alarm_rate": "of 100 reals called fake", "recall": "of 100 fakes found"}.items():
        if estimate := version.estimate(name):
            result.add_row(title, per_100(estimate))
    for name in ("sure_share", "error_when_sure", "accuracy", "precision", "auc"):
        if estimate := version.estimate(name):
            result.add_row(METRIC_TITLES[name], f"{estimate.value:.4f} ({estimate.low:.3f} to {estimate.high:.3f})")
    result.add_section()
    result.add_row(version.decision, "\n".join(version.reasons))
    console.print(result)
    if dataset.is_drawn:
        console.print(f"[bold]{DRAWN_WARNING}")


def _tabulate_files(dataset: Dataset) -> Table:
    counts = dataset.description["counts"]
    columns = {**counts["sources"], "all": {"files": counts["files"], **counts["reasons"]}}
    stages = ["files", *sorted(set(counts["reasons"]) - {"kept"}), "kept"]
    table = Table("", *(textwrap.fill(name, 16) for name in columns), title="Files found, and what became of them")
    for stage in stages:
        table.add_row(stage.replace("_", " "), *(str(column.get(stage, 0)) for column in columns.values()))
    return table


def print_next_steps(dataset: Dataset, version: ModelVersion) -> None:
    """Print the commands and pages that look further."""
    image = dataset.path / dataset.split("test")["path"].iloc[0]
    tracking = '"$MLFLOW_TRACKING_URI"' if os.environ.get("MLFLOW_TRACKING_URI") else DEFAULT_TRACKING_URI
    commands = {
        "runs, metrics and versions in a browser": f".venv/bin/mlflow ui --backend-store-uri {tracking}",
        "why each version was promoted or not": ".venv/bin/deepfake versions",
        "the production model's verdict on an image": f".venv/bin/deepfake predict {os.path.relpath(image)}",
        "schedules, forms and workers: the whole stack on this machine, in a browser": "make up",
    }
    print("\nTo look further:")
    if not image.is_file():  # it is in a tar
        del commands["the production model's verdict on an image"]
    for purpose, command in commands.items():
        print(f"  # {purpose}\n  {command}")
    print(f"  # what the data set holds, and what a model could cheat by\n  {dataset.report.as_uri()}")
    report = find_local_artifact(version.run_id, names.REPORT)
    if report:
        print(f"  # this version: verdict, metrics, comparison, mistakes\n  {report.as_uri()}")
