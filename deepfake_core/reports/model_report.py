"""A run's report, which a reviewer opens first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from deepfake_core.config import CLASS_NAMES, EvaluationParameters
from deepfake_core.data.dataset import Dataset
from deepfake_core.decoding import decode_image
from deepfake_core.detector import Detector, call_fake
from deepfake_core.evaluation.evaluation import per_100
from deepfake_core.evaluation.metrics import METRIC_TITLES, SURE_METRICS
from deepfake_core.evaluation.promotion import Comparison
from deepfake_core.evaluation.regression import Regression
from deepfake_core.evaluation.test_split import Measured
from deepfake_core.registry.candidates import TrainedCandidate
from deepfake_core.registry.challenge import Outcome
from deepfake_core.reports import plots
from deepfake_core.reports.model_card import ModelFacts, list_warnings, write_model_card
from deepfake_core.reports.pages import encode_figure, encode_picture, render_page
from deepfake_core.training.calibration import CONFIDENCE

HEADLINE = {
    name: METRIC_TITLES[name]
    for name in ("false_alarm_rate", "recall", "sure_share", "error_when_sure", "precision", "auc", "ece")
}

REPORTED_PIXELS = 96

TITLES = {
    "confusion_matrix": "Verdicts at the threshold",
    "roc_and_precision_recall": "At other thresholds",
    "scores": "Scores by source",
    "reliability": "Calibration",
    "robustness": "Robustness",
    "worst_mistakes": "Worst mistakes",
    "typical_images": "Typical images",
}


@dataclass(frozen=True)
class ModelReport:
    """What is written about a version: the page `report.html`, the model card, and figures by name."""

    page: str
    card: str
    figures: Mapping[str, Figure]


def build_report(
    model_name: str,
    version: str,
    trained: Sequence[TrainedCandidate],
    best: TrainedCandidate,
    dataset: Dataset,
    measured: Measured,
    robustness: pd.DataFrame,
    outcome: Outcome,
    evaluation: EvaluationParameters,
    commit: str,
    settings: Mapping[str, str],
) -> ModelReport:
    """Draw the figures and write the report and the model card of a registered version.

    Args:
        trained: every candidate; `best` is one of them.
        robustness: from `measure_robustness`.
        settings: dotted names and values of the best one's parameters, as its run holds them.
    """
    detector = Detector(best.candidate.folder)
    facts = ModelFacts(
        name=model_name,
        version=version,
        architecture=best.candidate.architecture,
        run=best.run_id,
        commit=commit,
        seed=int(settings["training.seed"]),
        temperature=detector.temperature,
        bounds=detector.description.get("bounds"),
        cost=outcome.cost,
        evaluation=evaluation,
        candidates=tabulate_candidates(trained),
        settings=settings,
    )
    figures = plots.plot_measured(measured, robustness)
    photographs = explain_images(detector, measured)
    histories = {
        f"Training of {one.candidate.architecture}": plots.plot_history(one.candidate.history, one.candidate.best_epoch)
        for one in trained
    }
    page = render_report(
        facts,
        dataset,
        measured,
        robustness,
        outcome,
        {TITLES[name]: figure for name, figure in figures.items()} | histories,
        {TITLES[name]: figure for name, figure in photographs.items()},
    )
    card = write_model_card(facts, dataset, measured, outcome.decision, robustness)
    return ModelReport(page, card, figures | photographs)


def tabulate_candidates(trained: Sequence[TrainedCandidate]) -> pd.DataFrame:
    """Return a row per candidate, as text, for the report."""
    return pd.DataFrame(
        [
            {
                "candidate": one.candidate.architecture,
                **{
                    METRIC_TITLES[name]: str(one.validation.metrics.get(name, "-"))
                    for name in ("false_alarm_rate", "recall", "precision", "auc")
                },
                "best epoch": f"{one.candidate.best_epoch} of {len(one.candidate.history)}",
                "minutes": f"{one.candidate.history['seconds'].sum() / 60:.1f}",
            }
            for one in trained
        ]
    )


def explain_images(detector: Detector, measured: Measured) -> dict[str, Figure]:
    """Draw the worst mistakes and typical test images, each with the heat map of its verdict."""
    labels, scores, threshold = measured.images.labels, measured.scores, measured.threshold
    wrong = int((call_fake(scores, threshold) != (labels == 1)).sum())
    mistakes = plots.choose_worst_mistakes(labels, scores, threshold)
    typical = plots.choose_typical(labels, scores)
    chosen_by_name = {
        "worst_mistakes": (mistakes, f"The worst of {wrong} mistakes on {len(labels)} test images, with heat maps"),
        "typical_images": (typical, "Typical test images, with heat maps"),
    }
    figures = {}
    for name, (chosen, heading) in chosen_by_name.items():
        if len(chosen):
            pixels = np.stack([measured.images.pixels[position] for position in chosen])
            _, heat = detector.explain(pixels)
            titles = [f"{CLASS_NAMES[labels[position]]}, P(fake) = {scores[position]:.2f}" for position in chosen]
            figures[name] = plots.plot_explained(pixels, heat, titles, heading)
    return figures


def render_report(
    facts: ModelFacts,
    dataset: Dataset,
    measured: Measured,
    robustness: pd.DataFrame,
    outcome: Outcome,
    figures: Mapping[str, Figure],
    photographs: Mapping[str, Figure],
) -> str:
    """Return `report.html`, self-contained.

    Args:
        figures: by title; likewise `photographs`, which show images.
    """
    manifest = dataset.manifest
    return render_page(
        "model_report.html.jinja",
        facts=facts,
        dataset=dataset,
        counts=dataset.description["counts"],
        splits=dataset.splits,
        class_names=CLASS_NAMES,
        measured=measured,
        warnings=list_warnings(dataset, measured, facts.evaluation),
        rows=_list_parts(measured),
        metric_titles={name: title for name, title in METRIC_TITLES.items() if name not in SURE_METRICS},
        sure_titles={name: METRIC_TITLES[name] for name in SURE_METRICS},
        sources=_list_sources(measured),
        bounds=facts.bounds,
        confidence=CONFIDENCE,
        decision=outcome.decision,
        comparison=outcome.comparison,
        production=outcome.production,
        compared=_list_compared(outcome.comparison),
        regression=outcome.regression,
        reported=_list_reported(outcome.regression, dataset),
        candidates=facts.candidates.to_dict("records"),
        robustness=robustness.to_dict("records"),
        figures={title: encode_figure(figure) for title, figure in figures.items()},
        photographs={title: encode_figure(figure, photographs=True) for title, figure in photographs.items()},
        torn=int((manifest[manifest["kept"]].groupby("group")["split"].nunique() > 1).sum()),
    )


def _list_sources(measured: Measured) -> list[dict[str, Any]]:
    """Return a row for all test images, for each source and for each that was held out: of 100 reals and fakes."""
    named = {"all": measured.evaluation, **measured.evaluation.sources}
    named |= {f"{name}, never trained on": evaluation for name, evaluation in measured.unseen.items()}
    return [
        {
            "name": name,
            "reals": one.confusion.reals,
            "fakes": one.confusion.fakes,
            "estimates": one.metrics,
            "rates": {key: per_100(one.metrics[key]) for key in ("false_alarm_rate", "recall") if key in one.metrics},
        }
        for name, one in named.items()
    ]


def _list_parts(measured: Measured) -> list[dict[str, Any]]:
    rows = list(measured.evaluation.list_rows())
    for source, evaluation in measured.unseen.items():
        rows.append(next(evaluation.list_rows("never trained on", source)))
    return rows


def _list_compared(comparison: Comparison | None) -> list[tuple[str, Any, Any]]:
    if comparison is None:
        return []
    ours, theirs = comparison.challenger, comparison.production
    rows = [
        (title, ours.metrics.get(name), theirs.metrics.get(name))
        for name, title in METRIC_TITLES.items()
        if name not in SURE_METRICS
    ]
    for source in ours.sources:
        for name in ("false_alarm_rate", "recall", "precision", "auc"):
            sides = (ours.sources[source].metrics.get(name), theirs.sources[source].metrics.get(name))
            rows.append((f"{METRIC_TITLES[name]} on {source}", *sides))
    return rows


def _list_reported(regression: Regression, dataset: Dataset) -> list[dict[str, Any]]:
    """Return each image of the regression set, those first whose verdict became wrong, then those that became right."""
    images = sorted(regression.images, key=lambda one: (one.change == 0, -one.change, not one.wrong_after))
    return [
        {
            "name": one.name,
            "label": one.label,
            "picture": encode_picture(decode_image(dataset.read(one.path)), REPORTED_PIXELS),
            "verdicts": [(one.before, one.wrong_before), (one.after, one.wrong_after)],
            "change": one.change,
        }
        for one in images
    ]
