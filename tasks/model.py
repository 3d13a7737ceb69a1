"""The stages from split folders to a promoted model version."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefect import runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from deepfake_core import batches, plots, registry, training
from deepfake_core.config import Architecture, PromotionParameters, TrainingParameters
from deepfake_core.detector import Detector
from deepfake_core.manifest import Dataset
from deepfake_core.metrics import Evaluation, evaluate_detector
from deepfake_core.models import CANDIDATES
from deepfake_core.promotion import Decision, decide_promotion
from tasks.progress import report_progress


@dataclass(frozen=True)
class TrainedCandidate:
    """A candidate, the MLflow run it is logged in, and how it did on validation."""

    candidate: training.Candidate
    run_id: str
    validation: Evaluation


@task(name="log data", cache_policy=NO_CACHE)
def log_data(run_id: str, dataset: Dataset, parameters: TrainingParameters, promotion: PromotionParameters) -> None:
    """Log what a retrain is about to learn from, and with which parameters."""
    registry.log_parameters(
        run_id,
        {
            "training": parameters.model_dump(),
            "promotion": promotion.model_dump(),
            "data": {**dataset.description["parameters"], "version": dataset.version, "sources": dataset.source_names},
        },
    )
    registry.log_dataset(run_id, dataset)
    figures = {f"classes_{name}": plots.plot_class_histogram(dataset.split(name), name) for name in ("train", "test")}
    recipe = parameters.adjust(CANDIDATES[parameters.candidates[0]].RECIPE)
    train = batches.load_images(dataset, "train", recipe.image_size)
    figures["training_batch"] = plots.plot_training_batch(train, recipe, parameters.seed)
    registry.log_figures(run_id, figures)


@task(name="train", task_run_name="train {architecture}", tags=["gpu"], cache_policy=NO_CACHE)
def train_candidate(
    architecture: Architecture, dataset: Dataset, parameters: TrainingParameters, parent_run: str
) -> TrainedCandidate:
    """Train one architecture, from where a killed run left it; its curves appear in MLflow as they grow."""
    recipe = parameters.adjust(CANDIDATES[architecture].RECIPE)
    with report_progress(f"decode for {architecture}") as on_progress:
        train = batches.load_images(dataset, "train", recipe.image_size, on_progress)
        val = batches.load_images(dataset, "val", recipe.image_size, on_progress)
    with (
        registry.open_run(architecture, parent_run) as run_id,
        report_progress(f"train {architecture}") as on_progress,
    ):
        settings = {**recipe.model_dump(), "seed": parameters.seed, "devices": parameters.devices}
        registry.log_parameters(run_id, {"architecture": architecture, "training": settings})

        def on_epoch(epoch: int, figures: dict[str, float]) -> None:
            registry.log_metrics(run_id, figures, step=epoch)

        candidate = training.train_candidate(
            architecture,
            train,
            val,
            recipe,
            training.find_folder(dataset, architecture, recipe, parameters),
            parameters.seed,
            parameters.devices,
            on_epoch,
            on_progress,
        )
        on_progress(1, 1)  # it may have stopped early
        detector = Detector(candidate.folder)
        validation, _ = evaluate_detector(detector, val)
        registry.log_metrics(run_id, validation.flatten("val") | {"best_epoch": candidate.best_epoch})
        registry.log_parameters(run_id, {"trained_in": detector.description["trained_in"]})
        registry.log_text(run_id, candidate.summarise(), "model_summary.txt")
        registry.log_file(run_id, candidate.folder / training.CHECKPOINT, "checkpoint")
        registry.log_figures(run_id, {"history": plots.plot_history(candidate.history, candidate.best_epoch)})
    return TrainedCandidate(candidate, run_id, validation)


def discard_trainings(trained: Sequence[TrainedCandidate]) -> None:
    """Remove the trainings' folders: MLflow has what is worth keeping, and the next retrain shall train anew."""
    for one in trained:
        shutil.rmtree(one.candidate.folder.parent)


def choose_best(trained: Sequence[TrainedCandidate]) -> TrainedCandidate:
    """Return the candidate with the highest AUC on validation; the first of equals."""
    return max(trained, key=lambda one: one.validation.auc or 0.0)


@task(name="evaluate", tags=["gpu"], cache_policy=NO_CACHE)
def evaluate(best: TrainedCandidate, dataset: Dataset, parent_run: str) -> Evaluation:
    """Score the test split with the best candidate: the only time that any candidate sees it."""
    detector = Detector(best.candidate.folder)
    test = batches.load_images(dataset, "test", detector.image_size)
    evaluation, scores = evaluate_detector(detector, test)
    for run_id in (best.run_id, parent_run):
        registry.log_metrics(run_id, evaluation.flatten("test"))
    registry.log_figures(
        best.run_id,
        {
            "confusion_matrix": plots.plot_confusion(evaluation.confusion, detector.threshold),
            "roc_and_precision_recall": plots.plot_curves(test.labels, scores, detector.threshold),
            "worst_mistakes": plots.plot_worst_mistakes(test, scores, detector.threshold),
        },
    )
    return evaluation


@task(name="register", tags=["mlflow"], cache_policy=NO_CACHE)
def register(best: TrainedCandidate, evaluation: Evaluation, dataset: Dataset, model_name: str) -> str:
    """Register the best candidate as a new version; return its number."""
    example = dataset.path / dataset.split("val")["path"].iloc[0]
    return registry.register_detector(
        best.run_id,
        best.candidate.folder,
        model_name,
        example.read_bytes(),
        tags={
            "architecture": best.candidate.architecture,
            "dataset_version": dataset.version,
            "drawn_images": str(dataset.is_drawn).lower(),
            "flow_run_id": runtime.flow_run.id or "",
            "test_auc": f"{evaluation.auc:.4f}",
        },
    )


@task(name="promote", tags=["mlflow"], cache_policy=NO_CACHE)
def promote(version: str, evaluation: Evaluation, dataset: Dataset, parameters: PromotionParameters) -> Decision:
    """Score production again on the same test split, decide, and say why on the version and in Prefect."""
    name = parameters.model_name
    current = registry.find_production(name)
    production, blockers = None, []
    if current:
        with tempfile.TemporaryDirectory() as folder:
            detector = Detector(registry.pull_detector(f"models:/{name}/{current}", Path(folder)))
        test = batches.load_images(dataset, "test", detector.image_size)
        production, _ = evaluate_detector(detector, test)
        if dataset.is_drawn and not registry.is_drawn(name, current):
            blockers.append("drawn images never replace a model trained on photographs")
    decision = decide_promotion(evaluation, production, parameters, blockers)
    tags = {"decision": "promoted" if decision.promoted else "not promoted", "reasons": decision.text}
    registry.tag_version(name, version, tags | {"compared_with": current or "none"})
    if decision.promoted:
        registry.set_production(name, version)
    create_markdown_artifact(
        decision.describe(name, version, current), key="promotion", description=f"{name} version {version}"
    )
    return decision
