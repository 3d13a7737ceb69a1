"""The whole DAG. `python -m flows.retrain --help` lists the parameters."""

import sys

if __name__ == "__main__":
    from flows.terminal import end_on_signals, load_quietly

    end_on_signals()
    load_quietly()

from prefect import flow, get_run_logger, runtime
from prefect.states import Completed

from deepfake_core.config import DataParameters, EvaluationParameters, PromotionParameters, TrainingParameters
from deepfake_core.data.dataset import open_dataset
from deepfake_core.errors import DeepfakeError
from deepfake_core.registry.connection import connect
from deepfake_core.registry.fingerprint import find_same_training, fingerprint_training
from deepfake_core.registry.runs import end_killed_runs
from deepfake_core.registry.versions import find_version, read_version
from deepfake_core.reports.outcome import print_next_steps, print_outcome
from deepfake_core.storage.locks import lock_folder
from deepfake_core.storage.store import open_store
from flows.command_line import check_prefect, read_settings
from flows.prepare import prepare
from flows.terminal import set_status, show_run
from flows.train import train
from tasks.model import discard_trainings, report_outcome
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

    Where data, parameters and code are those of a registered version, nothing is trained. What is missing of such a
    version, its decision or report, is made.

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
    connect()
    check_deployment(train_on, "train_on")
    store = open_store(data.data_dir)
    with lock_folder(store.folder, holder=f"flow run {runtime.flow_run.name}"):
        end_killed_runs(store)
        address = prepare(data)
        dataset = open_dataset(address)
        fingerprint = fingerprint_training(dataset.version, training, evaluation, promotion)
        same = None if force else find_same_training(promotion.model_name, fingerprint)
        if same:
            discard_trainings(dataset, training, evaluation)  # a run that was killed at its very end left them
            message = f"Nothing changed since version {same.version} ({same.decision}); `force` trains anyway."
            get_run_logger().info(message)
            return Completed(message=message, data=(address, same.version))  # type: ignore[return-value] # unwrapped
        if train_on:
            run = run_remotely(train_on, address, training, evaluation, promotion)
            version = find_version(promotion.model_name, run)
        else:
            version = train(address, training, evaluation, promotion)
        report_outcome(dataset, promotion.model_name, version)
    return address, version


def main() -> int:
    """Run one retrain from the command line; return the exit status."""
    try:
        with show_run():
            settings = read_settings(sys.argv[1:])
            check_prefect()
            address, number = retrain(
                settings.data,
                settings.training,
                settings.evaluation,
                settings.promotion,
                settings.train_on,
                settings.force,
            )
        dataset, version = open_dataset(address), read_version(settings.promotion.model_name, number)
        print_outcome(dataset, version)
        print_next_steps(dataset, version)
    except DeepfakeError as exc:
        print(f"\nretrain stopped: {exc}", file=sys.stderr)
        return set_status(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
