"""The model card: what a version is, what it was measured at, and what a reader must know before using it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from deepfake_core.config import CLASS_NAMES, EvaluationParameters
from deepfake_core.data.dataset import Dataset
from deepfake_core.evaluation.evaluation import Evaluation, per_100
from deepfake_core.evaluation.metrics import METRIC_TITLES
from deepfake_core.evaluation.promotion import Cost, PromotionDecision
from deepfake_core.evaluation.test_split import Measured
from deepfake_core.training.calibration import warn_of_few_reals

MIN_CLASS_IMAGES = 100
"""Below so many test images of a class, the report warns of chance."""


@dataclass(frozen=True)
class ModelFacts:
    """What identifies a registered version and how to make it again.

    Attributes:
        bounds: `lower`, `upper` and `max_error`, as `detector.json` has them; None if it has none.
        evaluation: how the threshold was chosen.
        candidates: one row per candidate trained, as `tabulate_candidates` makes it.
        settings: dotted names and values of the winner's parameters.
    """

    name: str
    version: str
    architecture: str
    run: str
    commit: str
    seed: int
    temperature: float
    bounds: Mapping[str, float] | None
    cost: Cost
    evaluation: EvaluationParameters
    candidates: pd.DataFrame
    settings: Mapping[str, Any]


def write_model_card(
    facts: ModelFacts, dataset: Dataset, measured: Measured, decision: PromotionDecision, robustness: pd.DataFrame
) -> str:
    """Return the registered version's description as Markdown, after Mitchell et al., "Model Cards for Model
    Reporting", FAT* 2019, section 4."""
    metrics = "\n".join(
        f"| {METRIC_TITLES[name]} | {estimate} |" for name, estimate in measured.evaluation.metrics.items()
    )
    sources = "\n".join(
        f"| {name} | {part.confusion.total} | {_show_rate(part, 'false_alarm_rate')} | {_show_rate(part, 'recall')} | "
        f"{_show_rate(part, 'sure_share')} | {_show_rate(part, 'error_when_sure')} | "
        f"{part.metrics.get('auc', 'one class')} |"
        for name, part in [*measured.evaluation.sources.items(), *_name_unseen(measured)]
    )
    worst = robustness.sort_values("auc_lost", ascending=False)[:3].itertuples()
    weak = "; ".join(f"{row.change} {row.strength:g}: AUC {row.auc:.3f}" for row in worst)
    after = 100 * robustness["false_alarm_rate"]
    counts = robustness.assign(after=after, before=after - 100 * robustness["false_alarms_added"])
    alarming = counts.sort_values("after", ascending=False)[:3].itertuples()
    alarms = "; ".join(
        f"{row.change} {row.strength:g}: {row.after:.0f} instead of {row.before:.0f}" for row in alarming
    )
    warnings = (
        "\n".join(f"- {warning}" for warning in list_warnings(dataset, measured, facts.evaluation)) or "- none found"
    )
    return (
        f"**{facts.architecture}**, distinguishes fake faces (1) from real ones (0). Input: one face, resized to "
        f"{measured.images.pixels.shape[1]} x {measured.images.pixels.shape[1]} pixels. Fake from P(fake) = "
        f"{measured.threshold:.4f} up; scores are calibrated with temperature {facts.temperature:.3f}.\n\n"
        f"**At this threshold**: {measured.evaluation.in_words}.{_describe_sure(measured)}\n\n"
        f"**Decision**: {decision.name}. {decision.text}\n\n"
        f"**Trained on** data set {dataset.version}: {', '.join(dataset.source_names)}.\n\n"
        f"**On the {len(measured.images)} test images**, with 95 % intervals:\n\n| metric | value |\n|---|---|\n"
        f"{metrics}\n\n| source | images | of 100 reals called fake | of 100 fakes found | "
        f"of 100 verdicts sure | of 100 sure ones wrong | AUC |\n"
        f"|---|---|---|---|---|---|---|\n{sources}\n\n"
        f"**Changes of the image that cost most**: {weak or 'not measured'}.\n\n"
        f"**Changes after which most of 100 reals are called fake**: {alarms or 'not measured'}.\n\n"
        f"**Warnings**\n\n{warnings}\n\n"
        "**Not for**: deciding about a person without a person's review; faces, edits and generators of other kinds "
        "than the sources hold.\n\n"
        f"**Made** by run {facts.run}, commit {facts.commit}, seed {facts.seed}.\n"
    )


def _name_unseen(measured: Measured) -> list[tuple[str, Evaluation]]:
    return [(f"{name}, never trained on", evaluation) for name, evaluation in measured.unseen.items()]


def _show_rate(evaluation: Evaluation, name: str) -> str:
    return per_100(evaluation.metrics[name]) if name in evaluation.metrics else "none to count"


def _describe_sure(measured: Measured) -> str:
    metrics = measured.evaluation.metrics
    if "sure_share" not in metrics:
        return ""
    wrong = f", of 100 of which {per_100(metrics['error_when_sure'])} are wrong" if "error_when_sure" in metrics else ""
    return f" Of 100 verdicts {per_100(metrics['sure_share'])} are sure{wrong}."


def list_warnings(dataset: Dataset, measured: Measured, evaluation: EvaluationParameters) -> list[str]:
    """Return what a reader must know before any metric."""
    warnings = []
    if dataset.is_drawn:
        warnings.append("Images of this data set are drawn: the metrics say nothing about real faces.")
    if measured.facts_are_strong:
        warnings.append(
            f"File facts alone (size, bytes per pixel, JPEG table, mean colour) reach AUC "
            f"{measured.file_facts.metrics['auc']} on the test images, the model {measured.evaluation.metrics['auc']}: "
            "it may have learned how the files were made, not how faces were forged."
        )
    if evaluation.threshold == "false_alarm_rate":
        val = dataset.split("val")
        val = val[~val["source"].isin(measured.unseen)]
        warnings += warn_of_few_reals((val["label"] == CLASS_NAMES[0]).to_numpy(), val, evaluation.false_alarm_rate)
    confusion = measured.evaluation.confusion
    if min(confusion.fakes, confusion.reals) < MIN_CLASS_IMAGES:
        warnings.append(
            f"The test split holds only {confusion.reals} real and {confusion.fakes} fake images: mind the intervals."
        )
    return warnings
