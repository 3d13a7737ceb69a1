"""From split folders to a model version. Runs on the GPU pool where there is one."""

from prefect import flow, runtime

from deepfake_core.config import EvaluationParameters, PromotionParameters, TrainingParameters
from deepfake_core.registry.candidates import choose_best
from deepfake_core.registry.fingerprint import fingerprint_training
from deepfake_core.registry.runs import open_retrain
from deepfake_core.registry.unfinished import find_unfinished, reopen_retrain
from tasks.data import fetch_dataset
from tasks.model import (
    discard_trainings,
    evaluate,
    evaluate_robustness,
    log_data,
    promote,
    recall,
    register,
    report_on_model,
    state_hardware,
    train_architecture,
)
from tasks.monitoring import record_reference
from tasks.remote import ask_for_approval


@flow(name="train")
def train(
    dataset: str,
    training: TrainingParameters = TrainingParameters(),
    evaluation: EvaluationParameters = EvaluationParameters(),
    promotion: PromotionParameters = PromotionParameters(),
) -> str:
    """Train the candidates, evaluate the best on the test split, register it, promote it if it is better.

    A training that was killed after its version was registered goes on from there.

    Args:
        dataset: Folder or URL of a data set that the prepare flow published.
        training: What is trained, and for how long.
        evaluation: How scores are made comparable, and on what they are tested.
        promotion: What a model must reach before it goes into production.

    Returns:
        The number of the registered version.
    """
    hardware = state_hardware()
    published = fetch_dataset(dataset)
    name, run, given = promotion.model_name, runtime.flow_run, (training, evaluation, promotion)
    fingerprint = fingerprint_training(published.version, *given)
    begun = find_unfinished(name, fingerprint)
    opened = reopen_retrain(begun, run.id) if begun else open_retrain(run.name, run.id, hardware, published)
    with opened as run_id:
        if begun:
            trained = recall(begun, published, training, evaluation)
        else:
            log_data(run_id, published, *given)
            trained = [train_architecture(one, published, *given, run_id) for one in training.candidates]
        best = choose_best(trained)
        measured = evaluate(best, published, evaluation, run_id)
        record_reference(best, measured, published)
        robustness = evaluate_robustness(best, published, measured, evaluation)
        version = begun.version if begun else register(best, measured, published, name, fingerprint, run.id)
        outcome = promote(version, best, measured, published, promotion)
        report_on_model(version, trained, best, published, measured, robustness, outcome, name, evaluation)
        if outcome.decision.waits:
            ask_for_approval(name, version)
    discard_trainings(published, training, evaluation)
    return version
