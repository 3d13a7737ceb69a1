"""Trained candidates: what of each, and of the best one on the test split, is logged to its run."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from deepfake_core.data.dataset import Dataset
from deepfake_core.data.images import Images
from deepfake_core.detector import Detector
from deepfake_core.evaluation.evaluation import Evaluation, evaluate_detector
from deepfake_core.evaluation.test_split import Measured
from deepfake_core.registry import names
from deepfake_core.registry.probe import choose_probe, log_probe
from deepfake_core.registry.runs import log_file, log_metrics, log_parameters, log_text
from deepfake_core.training.checkpoints import CHECKPOINT
from deepfake_core.training.fit import Candidate


@dataclass(frozen=True)
class TrainedCandidate:
    """A candidate, the MLflow run it is logged in, and how it did on validation."""

    candidate: Candidate
    run_id: str
    validation: Evaluation


def log_candidate(run_id: str, candidate: Candidate, val: Images, dataset: Dataset) -> TrainedCandidate:
    """Evaluate a calibrated candidate on validation, and log all that is kept of it to its run."""
    detector = Detector(candidate.folder)
    validation, scores = evaluate_detector(detector, val)
    log_metrics(run_id, validation.flatten("val") | {"best_epoch": candidate.best_epoch})
    log_parameters(
        run_id, {name: detector.description[name] for name in ("trained_in", "temperature", names.THRESHOLD)}
    )
    log_text(run_id, candidate.summarise(), "model_summary.txt")
    log_file(run_id, candidate.folder / CHECKPOINT, names.CHECKPOINT_FOLDER)
    chosen = choose_probe(val.rows)
    images = [dataset.read(val.rows["path"].iloc[position]) for position in chosen]
    log_probe(run_id, images, scores[chosen].tolist())
    return TrainedCandidate(candidate, run_id, validation)


def choose_best(trained: Sequence[TrainedCandidate]) -> TrainedCandidate:
    """Return the candidate with the highest AUC on validation, the mean of its sources'; the first of equals."""
    return max(trained, key=lambda one: one.validation.mean_source_auc or 0.0)


def log_measured(best: TrainedCandidate, parent_run: str, measured: Measured) -> None:
    """Log what was measured on the test split: metrics to both runs, tables and scores to the candidate's."""
    metrics = measured.evaluation.flatten("test") | measured.file_facts.flatten("file_facts")
    for source, unseen in measured.unseen.items():
        metrics |= unseen.flatten(f"unseen/{source}")
    for run_id in (best.run_id, parent_run):
        log_metrics(run_id, metrics)
    table = pd.DataFrame(list(measured.evaluation.list_rows()))
    log_text(best.run_id, table.to_csv(index=False), names.METRICS_TABLE)
    crossed = pd.DataFrame(measured.cross_sources).T
    log_text(best.run_id, crossed.to_csv(index_label="fakes_of"), names.CROSS_SOURCES)
    scores = measured.images.rows[["sha256", "group", "source", "member", "label"]].assign(score=measured.scores)
    log_text(best.run_id, scores.to_csv(index=False), names.SCORES)


def log_robustness(best: TrainedCandidate, table: pd.DataFrame) -> None:
    """Log what changes of the images cost: the table of `measure_robustness`, and the most that each change cost in AUC
    and in false alarms."""
    log_text(best.run_id, table.to_csv(index=False), names.ROBUSTNESS)
    for change, rows in table.groupby("change", sort=False):
        name = str(change).split(",")[0].replace(" ", "_")
        worst = {column: float(rows[column].max()) for column in ("auc_lost", "false_alarms_added")}
        log_metrics(best.run_id, {f"robustness/{name}_{column}": value for column, value in worst.items()})
