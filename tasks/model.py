"""The stages from split folders to a promoted model version."""

from collections.abc import Sequence

import pandas as pd
from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.context import get_run_context

from deepfake_core.config import Architecture, EvaluationParameters, PromotionParameters, TrainingParameters
from deepfake_core.data.dataset import Dataset
from deepfake_core.data.images import measure_files
from deepfake_core.evaluation import test_split
from deepfake_core.evaluation.promotion import REASON_SEPARATOR
from deepfake_core.evaluation.robustness import measure_robustness
from deepfake_core.evaluation.test_split import Measured
from deepfake_core.registry import candidates, challenge, names, runs, unfinished, versions, warm_start
from deepfake_core.registry.candidates import TrainedCandidate
from deepfake_core.registry.challenge import Outcome
from deepfake_core.registry.fingerprint import read_git_commit
from deepfake_core.registry.versions import ModelVersion
from deepfake_core.reports import model_report, outcome, plots
from deepfake_core.storage.files import remove_folder
from deepfake_core.training import calibration, devices, fit
from deepfake_core.training.fit import Training
from tasks.announcement import announce
from tasks.options import GPU, ONCE, retry_transient
from tasks.progress import report_progress
from tasks.remote import hold_gpu

GPU_POOL = "gpu"


def state_hardware() -> str:
    """Log what there is to train on; refuse a worker of the GPU pool without a GPU."""
    hardware = devices.describe_hardware()
    get_run_logger().info("hardware: %s", hardware)
    pool = get_run_context().flow_run.work_pool_name  # type: ignore[union-attr] # called in a flow
    if pool == GPU_POOL:
        devices.require_gpu(pool)
    return hardware


@task(name="log data", **ONCE)
def log_data(
    run_id: str,
    dataset: Dataset,
    training: TrainingParameters,
    evaluation: EvaluationParameters,
    promotion: PromotionParameters,
) -> None:
    """Log what a retrain is about to learn from, and with which parameters."""
    runs.log_inputs(run_id, dataset, training, evaluation, promotion)
    first = Training.plan(training.candidates[0], training, evaluation.holdout_sources)
    runs.log_figures(run_id, plots.plot_data(dataset, first))


@task(name="train", task_run_name="train {architecture}", **GPU)
def train_architecture(
    architecture: Architecture,
    dataset: Dataset,
    parameters: TrainingParameters,
    evaluation: EvaluationParameters,
    promotion: PromotionParameters,
    parent_run: str,
) -> TrainedCandidate:
    """Train one architecture, from where a killed run left it, and calibrate it; its curves grow in MLflow.

    On a server that has the limit `gpu`, one training at a time.
    """
    training = Training.plan(architecture, parameters, evaluation.holdout_sources)
    with report_progress(f"decode for {architecture}") as on_progress:
        train, val = fit.load_splits(training, dataset, on_progress)
    with (
        hold_gpu(),
        runs.open_run(architecture, parent_run) as run_id,
        runs.monitor_system(run_id),
        report_progress(f"train {architecture}") as on_progress,
    ):
        runs.log_training(run_id, training)
        candidate = fit.train_candidate(
            warm_start.begin(training, dataset, promotion.model_name, run_id),
            train,
            val,
            training.folder(dataset),
            on_epoch=lambda epoch, metrics: runs.log_metrics(run_id, metrics, step=epoch),
            on_progress=on_progress,
        )
        on_progress(1, 1)  # it may have stopped early
        calibration.calibrate_detector(candidate.folder, val, evaluation, measure_files(val, dataset))
        runs.log_figures(run_id, {"history": plots.plot_history(candidate.history, candidate.best_epoch)})
        return candidates.log_candidate(run_id, candidate, val, dataset)


@task(name="recall candidates", **ONCE)
def recall(
    version: ModelVersion, dataset: Dataset, parameters: TrainingParameters, evaluation: EvaluationParameters
) -> list[TrainedCandidate]:
    """Read back from MLflow what the retrain that registered a version, and was killed then, had trained."""
    return unfinished.recall_candidates(version, dataset, parameters, evaluation)


def discard_trainings(dataset: Dataset, parameters: TrainingParameters, evaluation: EvaluationParameters) -> None:
    """Remove the trainings' folders: MLflow has what is worth keeping, and the next retrain must not resume them."""
    for architecture in parameters.candidates:
        remove_folder(Training.plan(architecture, parameters, evaluation.holdout_sources).folder(dataset))


@task(name="evaluate", **GPU)
def evaluate(best: TrainedCandidate, dataset: Dataset, evaluation: EvaluationParameters, parent_run: str) -> Measured:
    """Score the test split with the best candidate: the only time that any candidate sees it."""
    measured = test_split.evaluate_on_test(best.candidate.folder, dataset, evaluation.holdout_sources)
    candidates.log_measured(best, parent_run, measured)
    return measured


@task(name="evaluate robustness", **GPU)
def evaluate_robustness(
    best: TrainedCandidate, dataset: Dataset, measured: Measured, evaluation: EvaluationParameters
) -> pd.DataFrame:
    """Measure what recompression, scaling, blur and other changes of the test images cost."""
    with report_progress("evaluate robustness") as on_progress:
        table = measure_robustness(best.candidate.folder, dataset, measured, evaluation.robustness_images, on_progress)
    candidates.log_robustness(best, table)
    return table


@task(name="register", **ONCE)
def register(
    best: TrainedCandidate, measured: Measured, dataset: Dataset, model_name: str, fingerprint: str, flow_run_id: str
) -> str:
    """Register the best candidate as a new version, if ONNX scores as the trained network does; return its number."""
    tags = {names.FINGERPRINT: fingerprint, names.FLOW_RUN_ID: flow_run_id}
    return challenge.register_challenger(best, measured, dataset, model_name, tags)


@task(name="promote", retries=1, retry_condition_fn=retry_transient, **ONCE)
def promote(
    version: str, best: TrainedCandidate, measured: Measured, dataset: Dataset, parameters: PromotionParameters
) -> Outcome:
    """Compare the version with production on the same test split, promote it or not, and announce why."""
    found = challenge.promote_challenger(version, best, measured, dataset, parameters)
    name = parameters.model_name
    text = found.decision.describe(name, version, found.production)
    announce(found.decision.name, name, version, text)
    create_markdown_artifact(
        outcome.describe_challenge(found, name, version, measured),
        key="promotion",
        description=f"{name} version {version}",
    )
    return found


@task(name="report on model", **ONCE)
def report_on_model(
    version: str,
    trained: Sequence[TrainedCandidate],
    best: TrainedCandidate,
    dataset: Dataset,
    measured: Measured,
    robustness: pd.DataFrame,
    found: Outcome,
    model_name: str,
    evaluation: EvaluationParameters,
) -> None:
    """Log figures and `report.html` to the candidate's run, and describe the version by its model card."""
    settings = runs.read_parameters(best.run_id)
    report = model_report.build_report(
        model_name,
        version,
        trained=trained,
        best=best,
        dataset=dataset,
        measured=measured,
        robustness=robustness,
        outcome=found,
        evaluation=evaluation,
        commit=read_git_commit(),
        settings=settings,
    )
    runs.log_figures(best.run_id, report.figures)
    runs.log_text(best.run_id, report.page, names.REPORT)
    versions.describe_version(model_name, version, report.card)


def report_outcome(dataset: Dataset, name: str, number: str) -> None:
    """Write what came out of a retrain to the flow run's log and artifacts."""
    version = versions.read_version(name, number)
    get_run_logger().info(
        "%s version %s: %s: %s", name, number, version.decision, REASON_SEPARATOR.join(version.reasons)
    )
    create_markdown_artifact(
        outcome.describe_retrain(dataset, version), key="retrain", description=f"{name} version {number}"
    )
