"""A run's report, which a reviewer opens first, and the model card."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from deepfake_core.config import CLASS_NAMES, SPLITS
from deepfake_core.evaluation import TestResult
from deepfake_core.manifest import Dataset
from deepfake_core.metrics import FIGURES
from deepfake_core.pages import encode_figure, render_page
from deepfake_core.promotion import Comparison, Cost, Decision

HEADLINE = {name: FIGURES[name] for name in ("precision", "recall", "auc", "recall_at_5_percent_fpr", "ece")}

TITLES = {
    "confusion_matrix": "Verdicts at the threshold",
    "roc_and_precision_recall": "At other thresholds",
    "scores": "Scores by source",
    "reliability": "Calibration",
    "robustness": "Robustness",
    "worst_mistakes": "Worst mistakes",
    "typical_images": "Typical images",
}
SMALL_CLASS = 100
"""Below so many test images of a class, the report warns of chance."""


@dataclass(frozen=True)
class ModelFacts:
    """What identifies a registered version and how to make it again.

    Attributes:
        candidates: one row per candidate trained: `candidate`, `parameters`, `best_epoch`, `auc` on validation, and
            others worth a column.
        settings: dotted names and values of the winner's parameters.
    """

    name: str
    version: str
    architecture: str
    run: str
    commit: str
    seed: int
    temperature: float
    cost: Cost
    candidates: pd.DataFrame
    settings: Mapping[str, Any]


def render_report(
    facts: ModelFacts,
    dataset: Dataset,
    result: TestResult,
    robustness: pd.DataFrame,
    decision: Decision,
    comparison: Comparison | None,
    production: str | None,
    figures: Mapping[str, Figure],
    photographs: Mapping[str, Figure],
) -> str:
    """Return `report.html`, self-contained.

    Args:
        production: the version compared with.
        figures: by title; likewise `photographs`, which show images.
    """
    manifest = dataset.manifest
    return render_page(
        "model_report.html.jinja",
        facts=facts,
        dataset=dataset,
        counts=dataset.description["counts"],
        splits=SPLITS,
        class_names=CLASS_NAMES,
        result=result,
        warnings=list_warnings(dataset, result),
        rows=_list_parts(result),
        figure_names=FIGURES,
        decision=decision,
        comparison=comparison,
        production=production,
        compared=_list_compared(comparison),
        candidates=facts.candidates.to_dict("records"),
        robustness=robustness.to_dict("records"),
        figures={title: encode_figure(figure) for title, figure in figures.items()},
        photographs={title: encode_figure(figure, photographs=True) for title, figure in photographs.items()},
        torn=int((manifest[manifest["kept"]].groupby("group")["split"].nunique() > 1).sum()),
    )


def write_model_card(
    facts: ModelFacts, dataset: Dataset, result: TestResult, decision: Decision, robustness: pd.DataFrame
) -> str:
    """Return the registered version's description as Markdown, after Mitchell et al., "Model Cards for Model
    Reporting", FAT* 2019, section 4."""
    figures = "\n".join(f"| {FIGURES[name]} | {estimate} |" for name, estimate in result.evaluation.figures.items())
    sources = "\n".join(
        f"| {name} | {part.confusion.total} | {part.figures.get('auc', 'one class')} |"
        for name, part in result.evaluation.sources.items()
    )
    worst = robustness.sort_values("auc_lost", ascending=False)[:3].itertuples()
    weak = "; ".join(f"{row.change} {row.strength:g}: AUC {row.auc:.3f}" for row in worst)
    warnings = "\n".join(f"- {warning}" for warning in list_warnings(dataset, result)) or "- none found"
    return (
        f"**{facts.architecture}**, tells fake faces (1) from real ones (0). Input: one face, resized to "
        f"{result.images.pixels.shape[1]} x {result.images.pixels.shape[1]} pixels. Fake from P(fake) = "
        f"{result.threshold:.4f} up; scores are calibrated with temperature {facts.temperature:.3f}.\n\n"
        f"**Decision**: {'promoted' if decision.promoted else 'not promoted'}. {decision.text}\n\n"
        f"**Trained on** data set {dataset.version}: {', '.join(dataset.source_names)}.\n\n"
        f"**On the {len(result.images)} test images**, with 95 % intervals:\n\n| figure | value |\n|---|---|\n"
        f"{figures}\n\n| source | images | AUC |\n|---|---|---|\n{sources}\n\n"
        f"**Costs most of the changes tried**: {weak or 'not measured'}.\n\n**Warnings**\n\n{warnings}\n\n"
        "**Not for**: deciding about a person without one looking; faces, edits and generators of other kinds than "
        "the sources hold.\n\n"
        f"**Made** by run {facts.run}, commit {facts.commit}, seed {facts.seed}.\n"
    )


def list_warnings(dataset: Dataset, result: TestResult) -> list[str]:
    """Return what a reader must know before any figure."""
    warnings = []
    if dataset.is_drawn:
        warnings.append("Images of this data set are drawn: the figures say nothing about real faces.")
    if result.facts_are_strong:
        warnings.append(
            f"File facts alone (size, bytes per pixel, JPEG table, mean colour) reach AUC "
            f"{result.file_facts.figures['auc']} on the test images, the model {result.evaluation.figures['auc']}: "
            "it may have learned how the files were made, not how faces were forged."
        )
    confusion = result.evaluation.confusion
    fakes, reals = confusion.true_positives + confusion.false_negatives, confusion.false_positives
    reals += confusion.true_negatives
    if min(fakes, reals) < SMALL_CLASS:
        warnings.append(f"The test split holds only {reals} real and {fakes} fake images: mind the intervals.")
    return warnings


def _list_parts(result: TestResult) -> list[dict[str, Any]]:
    rows = list(result.evaluation.list_rows())
    for source, evaluation in result.unseen.items():
        rows.append(next(evaluation.list_rows("never trained on", source)))
    return rows


def _list_compared(comparison: Comparison | None) -> list[tuple[str, Any, Any]]:
    if comparison is None:
        return []
    ours, theirs = comparison.challenger, comparison.production
    rows = [(title, ours.figures.get(name), theirs.figures.get(name)) for name, title in FIGURES.items()]
    for source in ours.sources:
        for name in ("auc", "recall", "precision"):
            sides = (ours.sources[source].figures.get(name), theirs.sources[source].figures.get(name))
            rows.append((f"{FIGURES[name]} on {source}", *sides))
    return rows
