"""A challenger meets production: the best candidate is registered, compared with production, and promoted or not."""

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd

from deepfake_core.config import FEEDBACK, REGRESSION, PromotionParameters
from deepfake_core.data.dataset import Dataset
from deepfake_core.data.images import load_same
from deepfake_core.description import DESCRIPTION, read_description
from deepfake_core.detector import Detector
from deepfake_core.errors import ModelError, ProductionMovedError
from deepfake_core.evaluation.promotion import (
    NOT_MET,
    Comparison,
    Cost,
    PromotionDecision,
    Scored,
    compare_scores,
    decide_promotion,
    measure_cost,
)
from deepfake_core.evaluation.regression import Regression, add_production, score_regression
from deepfake_core.evaluation.test_split import Measured, tabulate_rates
from deepfake_core.registry import names
from deepfake_core.registry.candidates import TrainedCandidate
from deepfake_core.registry.detectors import pull_detector, register_detector
from deepfake_core.registry.probe import choose_probe
from deepfake_core.registry.production import (
    complete_move,
    find_previous,
    find_production,
    move_production,
    name_challenger,
)
from deepfake_core.registry.runs import log_metrics, log_text
from deepfake_core.registry.versions import ModelVersion, read_version, tag_version
from deepfake_core.registry.warm_start import find_learned, list_learned
from deepfake_core.storage.files import write_json
from deepfake_core.training.export import check_parity

MAX_COMPARISONS = 5
"""How often production may move while a challenger is compared with it."""


@dataclass(frozen=True)
class Outcome:
    """What became of a challenger.

    Attributes:
        comparison: with production, on the same images; None if there was no production model.
        production: the version that it was compared with; None if there was none.
        cost: of serving the challenger.
        regression: both on the regression set.
    """

    decision: PromotionDecision
    comparison: Comparison | None
    production: str | None
    cost: Cost
    regression: Regression = field(default_factory=Regression)


def register_challenger(
    best: TrainedCandidate, measured: Measured, dataset: Dataset, model_name: str, tags: Mapping[str, str]
) -> str:
    """Register the best candidate as a new version, if ONNX scores as the trained network does; return its number.

    Args:
        tags: further ones, such as the training's fingerprint.

    Raises:
        ModelError: if what would be served scores otherwise than what was trained.
    """
    difference = check_parity(best.candidate.folder, measured.images)
    description = best.candidate.folder / DESCRIPTION
    rates = tabulate_rates(measured, dataset.is_drawn)
    write_json(description, read_description(description) | {"rates": rates})
    log_metrics(best.run_id, {"parity_difference": difference})
    val = dataset.split("val")
    example = dataset.read(val["path"].iloc[choose_probe(val)[0]])
    own = {
        names.ARCHITECTURE: best.candidate.architecture,
        names.DATASET_VERSION: dataset.version,
        names.DRAWN_IMAGES: str(dataset.is_drawn).lower(),
        names.TEST_AUC: str(measured.evaluation.metrics.get("auc", "one class")),
    }
    return register_detector(best.run_id, best.candidate.folder, model_name, example, own | dict(tags))


def promote_challenger(
    version: str, best: TrainedCandidate, measured: Measured, dataset: Dataset, parameters: PromotionParameters
) -> Outcome:
    """Compare a registered challenger with production, move the alias if it is better, and record why on the version.

    Production may move meanwhile, by a person or another retrain. The challenger is then compared with what is there.
    Reasons are recorded before the alias moves, the decision after that: killed in between, the next call records it.
    A challenger that was decided stays so; what it was compared with is compared again, for the report.

    Raises:
        ProductionMovedError: if it moves again and again.
    """
    name = parameters.model_name
    complete_move(name)
    detector = Detector(best.candidate.folder)
    cost, alone = measure_cost(detector), score_regression(detector, dataset)
    known = read_version(name, version)
    if known.decision or (known.reasons and find_production(name) == version):
        return _recall_outcome(known, cost, measured, alone, dataset, parameters)
    for _ in range(MAX_COMPARISONS):
        current = find_production(name)
        other = find_previous(name) if current == version else current  # a person may have put it there
        comparison, regression, blockers = (
            _compare_with(other, measured, alone, dataset, parameters) if other else (None, alone, [])
        )
        decision = decide_promotion(measured.evaluation, comparison, cost, parameters, blockers, regression)
        outcome = Outcome(decision, comparison, other, cost, regression)
        _record_reasons(name, version, best.run_id, outcome)
        try:
            if decision.promoted and current != version:
                move_production(name, version, expected=current, reason=decision.text)
        except ProductionMovedError:
            continue
        _record_decision(name, version, decision, parameters.approval_hours)
        return outcome
    raise ProductionMovedError(
        f"Production of {name} must stay long enough to be compared with. Received: {MAX_COMPARISONS} moves "
        "during one comparison. Wait until other retrains end."
    )


def _record_reasons(model_name: str, version: str, run_id: str, outcome: Outcome) -> None:
    metrics = {"latency_ms": outcome.cost.latency, "size_mb": outcome.cost.size} | outcome.regression.flatten()
    if outcome.comparison:
        metrics["probability_better"] = outcome.comparison.probability
    log_metrics(run_id, metrics)
    if outcome.regression.images:
        table = pd.DataFrame(outcome.regression.images)
        log_text(run_id, table.to_csv(index=False), names.REGRESSION_TABLE)
    compared = {names.COMPARED_WITH: outcome.production or names.NO_VERSION}
    tag_version(model_name, version, compared | {names.REASONS: outcome.decision.text})


def _record_decision(model_name: str, version: str, decision: PromotionDecision, approval_hours: float) -> None:
    if not decision.promoted:
        name_challenger(model_name, version)
    until = datetime.now(UTC) + timedelta(hours=approval_hours)
    waits = {names.ANSWER_UNTIL: until.isoformat(timespec="seconds")} if decision.waits else {}
    tag_version(model_name, version, waits | {names.DECISION: decision.name})


def _recall_outcome(
    version: ModelVersion,
    cost: Cost,
    measured: Measured,
    regression: Regression,
    dataset: Dataset,
    parameters: PromotionParameters,
) -> Outcome:
    """Return the outcome that a version's tags record; without comparison if the other version is gone."""
    other, comparison = version.tags.get(names.COMPARED_WITH, names.NO_VERSION), None
    if other != names.NO_VERSION:
        with suppress(ModelError):
            comparison, regression, _ = _compare_with(other, measured, regression, dataset, parameters)
    met = not any(reason.startswith(NOT_MET) for reason in version.reasons)
    promoted = version.decision == names.PROMOTED if version.decision else met
    decision = PromotionDecision(promoted, tuple(version.reasons), waits=version.decision == names.WAITS)
    if not version.decision:
        _record_decision(version.name, version.version, decision, parameters.approval_hours)
    return Outcome(decision, comparison, None if other == names.NO_VERSION else other, cost, regression)


def _compare_with(
    current: str, measured: Measured, alone: Regression, dataset: Dataset, parameters: PromotionParameters
) -> tuple[Comparison, Regression, list[str]]:
    """Score production on test and regression images; return both comparisons, and reasons that forbid promotion.

    Test images of confirmed reports are left out for both: production's mistakes chose them, so that an equally good
    challenger would look better on them.
    """
    name, blockers = parameters.model_name, []
    with tempfile.TemporaryDirectory() as folder:
        detector = Detector(pull_detector(f"models:/{name}/{current}", Path(folder)))
    images = load_same(dataset, measured.images, detector.image_size)
    production = Scored(detector.score(images.pixels), detector.threshold)
    version = read_version(name, current)
    asked = (images.rows, dataset.split(REGRESSION))
    learned = [np.zeros(len(rows), bool) for rows in asked]
    manifests = list_learned(version, known=dataset.version)
    if manifests is None:
        blockers.append("which images production was trained on is unknown, as its run holds no manifest")
    else:
        learned = [find_learned(rows, dataset, [one for _, one in manifests]) for rows in asked]
    if dataset.is_drawn and not version.is_drawn:
        blockers.append("drawn images never replace a model trained on photographs")
    challenger = Scored(measured.scores, measured.threshold)
    left_out = learned[0] | (images.rows["source"] == FEEDBACK).to_numpy()
    comparison = compare_scores(
        measured.images.labels, images.rows, challenger, production, parameters.metric, left_out
    )
    return comparison, add_production(alone, detector, dataset, learned[1]), blockers
