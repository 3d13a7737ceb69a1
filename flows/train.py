"""From split folders to a model version. Runs on the GPU pool where there is one."""

from prefect import flow, runtime

from deepfake_core import registry
from deepfake_core.config import EvaluationParameters, PromotionParameters, TrainingParameters
from deepfake_core.manifest import Dataset
from tasks.data import open_dataset
from tasks.model import (
    choose_best,
    discard_trainings,
    evaluate,
    log_data,
    promote,
    register,
    state_hardware,
    test_robustness,
    train_candidate,
    write_report,
)


def fingerprint_training(
    dataset: Dataset, training: TrainingParameters, evaluation: EvaluationParameters, promotion: PromotionParameters
) -> str:
    """Return what two trainings have in common only if they would be the same; empty for uncommitted code."""
    parameters = {
        "training": training.model_dump(mode="json"),
        "evaluation": evaluation.model_dump(mode="json"),
        "promotion": promotion.model_dump(mode="json"),
    }
    return registry.fingerprint_training(dataset.version, parameters)


@flow(name="train")
def train(
    dataset: str,
    training: TrainingParameters = TrainingParameters(),
    evaluation: EvaluationParameters = EvaluationParameters(),
    promotion: PromotionParameters = PromotionParameters(),
) -> str:
    """Train the candidates, evaluate the best on the test split, register it, promote it if it is better.

    Args:
        dataset: Folder or URL of a data set that the prepare flow published.
        training: What is trained, and for how long.
        evaluation: How scores are made comparable, and on what they are tested.
        promotion: What a model must reach before it goes into production.

    Returns:
        The number of the registered version.
    """
    hardware = state_hardware()
    published = open_dataset(dataset)
    name = promotion.model_name
    tags = {
        "prefect.flow_run_id": runtime.flow_run.id,
        "drawn_images": str(published.is_drawn).lower(),
        "hardware": hardware,
    }
    with registry.open_run(runtime.flow_run.name, tags=tags) as run_id:
        log_data(run_id, published, training, evaluation, promotion)
        trained = [
            train_candidate(architecture, published, training, evaluation, run_id)
            for architecture in training.candidates
        ]
        best = choose_best(trained)
        result = evaluate(best, published, evaluation, run_id)
        robustness = test_robustness(best, published, result, evaluation)
        fingerprint = fingerprint_training(published, training, evaluation, promotion)
        version = register(best, result, published, name, fingerprint)
        verdict = promote(version, best, result, published, promotion)
        write_report(version, trained, best, published, result, robustness, verdict, name)
    discard_trainings(trained)
    return version
