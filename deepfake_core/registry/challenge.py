"""The stages from split folders to a promoted model version."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from prefect import get_run_logger, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import get_run_context

from deepfake_core import batches, calibration, devices, evaluation, model_report, plots, registry, training
from deepfake_core.config import (
    CLASS_NAMES,
    SPLITS,
    Architecture,
    EvaluationParameters,
    PromotionParameters,
    TrainingParameters,
)
from deepfake_core.detector import Detector
from deepfake_core.errors import ProductionMovedError
from deepfake_core.evaluation import TestResult
from deepfake_core.manifest import Dataset, find_trained_on
from deepfake_core.metrics import Evaluation, evaluate_detector
from deepfake_core.model_report import ModelFacts
from deepfake_core.models import CANDIDATES
from deepfake_core.promotion import (
    Comparison,
    Cost,
    Decision,
    Scored,
    compare_scores,
    decide_promotion,
    measure_cost,
)
from tasks.announcement import announce
from tasks.data import retry_transient
from tasks.progress import report_progress

GPU_POOL = "gpu"
PROBE_IMAGES = 16
MOST_COMPARISONS = 5
"""How often production may move while a challenger is compared with it, before the task fails and is tried again."""


@dataclass(frozen=True)
class TrainedCandidate:
    """A candidate, the MLflow run it is logged in, and how it did on validation."""

    candidate: training.Candidate
    run_id: str
    validation: Evaluation


@dataclass(frozen=True)
class Verdict:
    """A decision, what it was compared with, and what the model costs to serve."""

    decision: Decision
    comparison: Comparison | None
    production: str | None
    cost: Cost


def state_hardware() -> str:
    """Say in the flow run's log what there is to train on; refuse a worker of the GPU pool without a GPU."""
    hardware = devices.describe_hardware()
    get_run_logger().info("hardware: %s", hardware)
    pool = get_run_context().flow_run.work_pool_name  # type: ignore[union-attr] # called in a flow
    if pool == GPU_POOL:
        devices.require_gpu(pool)
    return hardware


@task(name="log data", cache_policy=NO_CACHE)
def log_data(
    run_id: str,
    dataset: Dataset,
    parameters: TrainingParameters,
    testing: EvaluationParameters,
    promotion: PromotionParameters,
) -> None:
    """Log what a retrain is about to learn from, and with which parameters."""
    registry.log_parameters(
        run_id,
        {
            "training": parameters.model_dump(),
            "evaluation": testing.model_dump(),
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
    architecture: Architecture,
    dataset: Dataset,
    parameters: TrainingParameters,
    testing: EvaluationParameters,
    parent_run: str,
) -> TrainedCandidate:
    """Train one architecture, from where a killed run left it, and calibrate it; its curves grow in MLflow."""
    recipe = parameters.adjust(CANDIDATES[architecture].RECIPE)
    holdout = testing.holdout_sources
    with report_progress(f"decode for {architecture}") as on_progress:
        train, val = (
            evaluation.load_seen(dataset, split, recipe.image_size, holdout, on_progress) for split in ("train", "val")
        )
    with (
        registry.open_run(architecture, parent_run) as run_id,
        registry.monitor_system(run_id),
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
            training.find_folder(dataset, architecture, recipe, parameters, holdout),
            parameters.seed,
            parameters.devices,
            on_epoch,
            on_progress,
        )
        on_progress(1, 1)  # it may have stopped early
        calibration.calibrate_detector(candidate.folder, val, testing)
        detector = Detector(candidate.folder)
        validation, scores = evaluate_detector(detector, val)
        registry.log_metrics(run_id, validation.flatten("val") | {"best_epoch": candidate.best_epoch})
        registry.log_parameters(
            run_id,
            {name: detector.description[name] for name in ("trained_in", "temperature", "threshold")},
        )
        registry.log_text(run_id, candidate.summarise(), "model_summary.txt")
        registry.log_file(run_id, candidate.folder / training.CHECKPOINT, registry.CHECKPOINT_FOLDER)
        registry.log_figures(run_id, {"history": plots.plot_history(candidate.history, candidate.best_epoch)})
        chosen = np.linspace(0, len(val) - 1, min(PROBE_IMAGES, len(val))).astype(int)
        probe = [(dataset.path / val.rows["path"].iloc[position]).read_bytes() for position in chosen]
        registry.log_probe(run_id, probe, scores[chosen].tolist())
    return TrainedCandidate(candidate, run_id, validation)


def discard_trainings(trained: Sequence[TrainedCandidate]) -> None:
    """Remove the trainings' folders: MLflow has what is worth keeping, and the next retrain shall train anew."""
    for one in trained:
        shutil.rmtree(one.candidate.folder.parent)


def choose_best(trained: Sequence[TrainedCandidate]) -> TrainedCandidate:
    """Return the candidate with the highest AUC on validation; the first of equals."""
    return max(trained, key=lambda one: one.validation.auc or 0.0)


@task(name="evaluate", tags=["gpu"], cache_policy=NO_CACHE)
def evaluate(best: TrainedCandidate, dataset: Dataset, testing: EvaluationParameters, parent_run: str) -> TestResult:
    """Score the test split with the best candidate: the only time that any candidate sees it."""
    result = evaluation.evaluate_on_test(best.candidate.folder, dataset, testing.holdout_sources)
    figures = result.evaluation.flatten("test") | result.file_facts.flatten("file_facts")
    for source, unseen in result.unseen.items():
        figures |= unseen.flatten(f"unseen/{source}")
    for run_id in (best.run_id, parent_run):
        registry.log_metrics(run_id, figures)
    table = pd.DataFrame(list(result.evaluation.list_rows()))
    registry.log_text(best.run_id, table.to_csv(index=False), "evaluation/figures.csv")
    crossed = pd.DataFrame(result.cross_sources).T
    registry.log_text(best.run_id, crossed.to_csv(index_label="fakes_of"), "evaluation/cross_sources.csv")
    scores = result.images.rows[["sha256", "group", "source", "member", "label"]].assign(score=result.scores)
    registry.log_text(best.run_id, scores.to_csv(index=False), registry.SCORES)
    return result


@task(name="test robustness", tags=["gpu"], cache_policy=NO_CACHE)
def test_robustness(
    best: TrainedCandidate, dataset: Dataset, result: TestResult, testing: EvaluationParameters
) -> pd.DataFrame:
    """Measure what recompression, scaling, blur and other changes of the test images cost."""
    with report_progress("test robustness") as on_progress:
        table = evaluation.measure_robustness(
            best.candidate.folder, dataset, result, testing.robustness_images, on_progress
        )
    registry.log_text(best.run_id, table.to_csv(index=False), "evaluation/robustness.csv")
    for change, rows in table.groupby("change", sort=False):
        name = str(change).split(",")[0].replace(" ", "_")
        registry.log_metrics(best.run_id, {f"robustness/{name}_auc_lost": float(rows["auc_lost"].max())})
    return table


@task(name="register", tags=["mlflow"], cache_policy=NO_CACHE)
def register(best: TrainedCandidate, result: TestResult, dataset: Dataset, model_name: str, fingerprint: str) -> str:
    """Register the best candidate as a new version, if it is served as it was trained; return its number."""
    difference = training.check_parity(best.candidate.folder, result.images)
    registry.log_metrics(best.run_id, {"parity_difference": difference})
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
            "fingerprint": fingerprint,
            "test_auc": str(result.evaluation.figures.get("auc", "one class")),
        },
    )


@task(name="promote", tags=["mlflow"], cache_policy=NO_CACHE, retries=1, retry_condition_fn=retry_transient)
def promote(
    version: str, best: TrainedCandidate, result: TestResult, dataset: Dataset, parameters: PromotionParameters
) -> Verdict:
    """Score production again on the same test split, decide, and say why on the version and in Prefect."""
    name = parameters.model_name
    cost = measure_cost(Detector(best.candidate.folder))
    for _ in range(MOST_COMPARISONS):
        current = registry.find_production(name)
        comparison, blockers = _compare_with(current, result, dataset, parameters) if current else (None, [])
        decision = decide_promotion(result.evaluation, comparison, cost, parameters, blockers)
        try:
            if decision.promoted:
                registry.move_production(name, version, expected=current, reason=decision.text)
            break
        except ProductionMovedError:
            continue
    else:
        raise ProductionMovedError(
            f"Production of {name} must stay long enough to be compared with. Received: {MOST_COMPARISONS} moves "
            "during one comparison. Wait until other retrains end."
        )
    tags = {"decision": "promoted" if decision.promoted else "not promoted", "reasons": decision.text}
    registry.tag_version(name, version, tags | {"compared_with": current or registry.NO_VERSION})
    figures = {"latency_ms": cost.latency, "size_mb": cost.size}
    if comparison:
        figures["probability_better"] = comparison.probability
    registry.log_metrics(best.run_id, figures)
    text = decision.describe(name, version, current)
    announce("promoted" if decision.promoted else "not-promoted", name, version, text)
    headline = "\n".join(f"- {title}: {result.evaluation.figures[key]}" for key, title in model_report.HEADLINE.items())
    create_markdown_artifact(
        f"{text}\nOn {len(result.images)} test images:\n\n{headline}\n",
        key="promotion",
        description=f"{name} version {version}",
    )
    return Verdict(decision, comparison, current, cost)


def _compare_with(
    current: str, result: TestResult, dataset: Dataset, parameters: PromotionParameters
) -> tuple[Comparison, list[str]]:
    name, blockers = parameters.model_name, []
    with tempfile.TemporaryDirectory() as folder:
        detector = Detector(registry.pull_detector(f"models:/{name}/{current}", Path(folder)))
    images = evaluation.load_same(dataset, result.images, detector.image_size)
    production = Scored(detector.score(images.pixels), detector.threshold)
    version = registry.read_version(name, current)
    left_out: np.ndarray | None = np.zeros(len(images), bool)
    if version.tags.get("dataset_version") != dataset.version:
        manifest = registry.read_manifest(version)
        left_out = None if manifest is None else find_trained_on(images.rows, dataset.manifest, manifest)
    if left_out is None:
        left_out = np.zeros(len(images), bool)
        blockers.append("which images production was trained on can't be told, as its run holds no manifest")
    if dataset.is_drawn and version.tags.get("drawn_images") != "true":
        blockers.append("drawn images never replace a model trained on photographs")
    challenger = Scored(result.scores, result.threshold)
    comparison = compare_scores(
        result.images.labels, result.images.rows, challenger, production, parameters.metric, left_out
    )
    return comparison, blockers


@task(name="report", tags=["mlflow"], cache_policy=NO_CACHE)
def write_report(
    version: str,
    trained: Sequence[TrainedCandidate],
    best: TrainedCandidate,
    dataset: Dataset,
    result: TestResult,
    robustness: pd.DataFrame,
    verdict: Verdict,
    model_name: str,
) -> None:
    """Log figures and `report.html` to the candidate's run, and describe the version by its model card."""
    folder = best.candidate.folder
    detector = Detector(folder)
    labels, scores, threshold = result.images.labels, result.scores, result.threshold
    figures = {
        "confusion_matrix": plots.plot_confusion(result.evaluation.confusion, threshold),
        "roc_and_precision_recall": plots.plot_curves(labels, scores, threshold),
        "scores": plots.plot_scores(labels, scores, result.images.rows["source"].to_numpy(), threshold),
        "reliability": plots.plot_reliability(labels, scores),
    }
    if len(robustness):
        clean = float(robustness["auc"].iloc[0] + robustness["auc_lost"].iloc[0])
        figures["robustness"] = plots.plot_robustness(robustness, clean)
    photographs = _explain(folder, result)
    registry.log_figures(best.run_id, figures | photographs)
    settings = registry.read_parameters(best.run_id)
    facts = ModelFacts(
        name=model_name,
        version=version,
        architecture=best.candidate.architecture,
        run=best.run_id,
        commit=registry.read_git_commit(),
        seed=int(settings["training.seed"]),
        temperature=detector.temperature,
        cost=verdict.cost,
        candidates=_tabulate(trained),
        settings=settings,
    )
    page = model_report.render_report(
        facts,
        dataset,
        result,
        robustness,
        verdict.decision,
        verdict.comparison,
        verdict.production,
        {model_report.TITLES[name]: figure for name, figure in figures.items()}
        | {
            f"Training of {one.candidate.architecture}": plots.plot_history(
                one.candidate.history, one.candidate.best_epoch
            )
            for one in trained
        },
        {model_report.TITLES[name]: figure for name, figure in photographs.items()},
    )
    registry.log_text(best.run_id, page, "report.html")
    card = model_report.write_model_card(facts, dataset, result, verdict.decision, robustness)
    registry.describe_version(model_name, version, card)


def report_outcome(dataset: Dataset, name: str, number: str) -> None:
    """Say in the flow run's log and artifacts what came out of a retrain, and where to look further."""
    version = registry.read_version(name, number)
    get_run_logger().info("%s version %s: %s: %s", name, number, version.tags["decision"], version.tags["reasons"])
    figures = "\n".join(
        "| {} | {:.3f} ({:.3f} to {:.3f}) |".format(
            title, *(version.metrics[f"test/{key}{end}"] for end in ("", "_low", "_high"))
        )
        for key, title in model_report.HEADLINE.items()
        if f"test/{key}" in version.metrics
    )
    reasons = "\n".join(f"- {reason}" for reason in version.tags["reasons"].split("; "))
    images = ", ".join(f"{split} {len(dataset.split(split)):,}" for split in SPLITS)
    pages = " · ".join(f"[{title}]({address})" for title, address in registry.find_pages(version).items())
    drawn = "\n**The images are drawn: the figures say nothing about real faces.**\n" if dataset.is_drawn else ""
    create_markdown_artifact(
        f"## {name} version {number}: {version.tags['decision']}\n\n{reasons}\n{drawn}\n"
        f"| on the test split | 95 % interval |\n| --- | --- |\n{figures}\n\n"
        f"Data set {dataset.version}: {images} images of {dataset.description['counts']['files']:,} files found.\n\n"
        f"{f'In MLflow: {pages}' if pages else ''}\n",
        key="retrain",
        description=f"{name} version {number}",
    )


def _explain(folder: Path, result: TestResult) -> dict[str, plots.Figure]:
    detector = Detector(folder)
    labels, scores, threshold = result.images.labels, result.scores, result.threshold
    wrong = int(((scores >= threshold) != (labels == 1)).sum())
    figures = {}
    for name, chosen, heading in (
        (
            "worst_mistakes",
            plots.choose_worst_mistakes(labels, scores, threshold),
            f"The worst of {wrong} mistakes on {len(labels)} test images, and what spoke for the verdict",
        ),
        ("typical_images", plots.choose_typical(labels, scores), "Typical test images, and what spoke for the verdict"),
    ):
        if len(chosen):
            pixels = np.stack([result.images.pixels[position] for position in chosen])
            _, heat = detector.explain(pixels)
            titles = [f"{CLASS_NAMES[labels[position]]}, P(fake) = {scores[position]:.2f}" for position in chosen]
            figures[name] = plots.plot_explained(pixels, heat, titles, heading)
    return figures


def _tabulate(trained: Sequence[TrainedCandidate]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "candidate": one.candidate.architecture,
                "AUC": str(one.validation.figures.get("auc", "-")),
                "precision": str(one.validation.figures["precision"]),
                "recall": str(one.validation.figures["recall"]),
                "best epoch": f"{one.candidate.best_epoch} of {len(one.candidate.history)}",
                "minutes": f"{one.candidate.history['seconds'].sum() / 60:.1f}",
            }
            for one in trained
        ]
    )
