"""The whole DAG. `python -m flows.retrain --help` lists the parameters."""

import logging
import sys

from prefect import flow, get_run_logger, runtime
from prefect.states import Completed

from deepfake_core import registry
from deepfake_core.config import DataParameters, EvaluationParameters, PromotionParameters, TrainingParameters
from deepfake_core.errors import DeepfakeError
from deepfake_core.manifest import lock_folder, open_dataset
from deepfake_core.store import open_store
from flows.command_line import check_prefect, print_next_steps, print_outcome, read_settings
from flows.prepare import prepare
from flows.train import fingerprint_training, train
from tasks.model import report_outcome
from tasks.remote import check_deployment, run_remotely


@flow(name="retrain")
def retrain(
    data: DataParameters = DataParameters(),
    training: TrainingParameters = TrainingParameters(),
    evaluation: EvaluationParameters = EvaluationParameters(),
    promotion: PromotionParameters = PromotionParameters(),
    train_on: str = "",
    force: bool = False,
) -> tuple[str, str]:
    """Prepare the data, train, evaluate, and promote the best model if it beats production.

    Where data, parameters and code are those of a registered version, nothing is trained.

    Args:
        data: Where images come from, where they go, and how they are split.
        training: What is trained, and for how long.
        evaluation: How scores are made comparable, and on what they are tested.
        promotion: What a model must reach before it goes into production.
        train_on: Name of the deployment that trains, such as train/gpu. Empty: train here.
        force: Train even if nothing changed.

    Returns:
        The folder or URL of the data set, and the registered version.
    """
    registry.connect()
    check_deployment(train_on)
    with lock_folder(open_store(data.data_dir).folder, holder=f"flow run {runtime.flow_run.name}"):
        dataset = prepare(data)
        fingerprint = fingerprint_training(open_dataset(dataset), training, evaluation, promotion)
        same = None if force else registry.find_same_training(promotion.model_name, fingerprint)
        if same:
            decision = same.tags.get("decision", "no decision")
            message = f"Nothing changed since version {same.version} ({decision}); `force` trains all the same."
            get_run_logger().info(message)
            return Completed(message=message, data=(dataset, same.version))  # type: ignore[return-value] # unwrapped
        if train_on:
            run = run_remotely(train_on, dataset, training, evaluation, promotion)
            version = registry.find_version(promotion.model_name, run)
        else:
            version = train(dataset, training, evaluation, promotion)
        report_outcome(open_dataset(dataset), promotion.model_name, version)
    return dataset, version


def main() -> int:
    """Run one retrain from the command line; return the exit status."""
    logging.getLogger("deepfake_core").setLevel(logging.INFO)
    try:
        settings = read_settings(sys.argv[1:])
        check_prefect()
        dataset, version = retrain(
            settings.data,
            settings.training,
            settings.evaluation,
            settings.promotion,
            settings.train_on,
            settings.force,
        )
        registered = registry.read_version(settings.promotion.model_name, version)
        print_outcome(open_dataset(dataset), registered)
        print_next_steps(open_dataset(dataset), registered)
    except DeepfakeError as exc:
        print(f"\nretrain stopped: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
