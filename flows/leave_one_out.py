"""How well a model does on sources that it never saw. `python -m flows.leave_one_out --help` lists the parameters."""

import sys

if __name__ == "__main__":
    from flows.terminal import end_on_signals, load_quietly

    end_on_signals()
    load_quietly()

from prefect import flow, runtime
from prefect.artifacts import create_table_artifact
from rich.console import Console
from rich.table import Table

from deepfake_core.config import FEEDBACK, DataParameters, EvaluationParameters, PromotionParameters, TrainingParameters
from deepfake_core.data.dataset import open_dataset
from deepfake_core.errors import DeepfakeError
from deepfake_core.evaluation.evaluation import Evaluation
from deepfake_core.registry.candidates import choose_best
from deepfake_core.registry.connection import connect
from deepfake_core.registry.runs import end_killed_runs, open_retrain
from deepfake_core.reports.outcome import list_left_out
from deepfake_core.storage.locks import lock_folder
from deepfake_core.storage.store import open_store
from flows.command_line import check_prefect, read_settings
from flows.prepare import prepare
from flows.terminal import set_status, show_run
from tasks.model import discard_trainings, evaluate, log_data, state_hardware, train_architecture


@flow(name="leave-one-out")
def leave_one_out(
    data: DataParameters = DataParameters(),
    training: TrainingParameters = TrainingParameters(),
    evaluation: EvaluationParameters = EvaluationParameters(),
) -> dict[str, tuple[Evaluation, Evaluation]]:
    """Train once for each source without it, and test on it. Nothing is registered.

    Args:
        data: Where images come from, where they go, and how they are split.
        training: What is trained, and for how long.
        evaluation: How scores are made comparable, and on what they are tested.

    Returns:
        By source that was left out: on the test split of the others, and on it.
    """
    connect()
    hardware = state_hardware()
    store, flow_run, found = open_store(data.data_dir), runtime.flow_run, {}
    with lock_folder(store.folder, holder=f"flow run {flow_run.name}"):
        end_killed_runs(store)
        dataset = open_dataset(prepare(data))
        for source in sorted(set(dataset.list_sources()) - {FEEDBACK}):
            testing = evaluation.model_copy(update={"holdout_sources": (source,)})
            with open_retrain(f"{flow_run.name} without {source}", flow_run.id, hardware, dataset) as run_id:
                given = (training, testing, PromotionParameters())
                log_data(run_id, dataset, *given)
                trained = [train_architecture(one, dataset, *given, run_id) for one in training.candidates]
                measured = evaluate(choose_best(trained), dataset, testing, run_id)
            discard_trainings(dataset, training, testing)
            found[source] = (measured.evaluation, measured.unseen[source])
    create_table_artifact(list_left_out(found), key="leave-one-out", description=f"Data set {dataset.version}")
    return found


def main() -> int:
    """Run it from the command line, with the flags of `flows.retrain`; return the exit status."""
    try:
        with show_run():
            settings = read_settings(sys.argv[1:])
            check_prefect()
            found = leave_one_out(settings.data, settings.training, settings.evaluation)
    except DeepfakeError as exc:
        print(f"\nleave-one-out stopped: {exc}", file=sys.stderr)
        return set_status(1)
    rows = list_left_out(found)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
