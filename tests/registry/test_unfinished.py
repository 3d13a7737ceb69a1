"""What a kill after the registration left is finished: without Prefect, by the real functions up to that point."""

import dataclasses
import shutil
from contextlib import ExitStack
from types import SimpleNamespace

import mlflow
import pytest

from deepfake_core.config import EvaluationParameters, PromotionParameters, TrainingParameters
from deepfake_core.data.images import load_seen
from deepfake_core.evaluation.test_split import evaluate_on_test
from deepfake_core.registry import challenge, fingerprint, names, production, runs, unfinished
from deepfake_core.registry.candidates import choose_best, log_candidate, log_measured
from deepfake_core.registry.connection import connect
from deepfake_core.registry.versions import describe_version, read_version
from deepfake_core.storage.store import open_store
from deepfake_core.training.calibration import calibrate_detector
from deepfake_core.training.fit import Training
from tests.builders import NAME, faces, prepare, write_zip

TRAINING, EVALUATION = TrainingParameters(candidates=("cnn",), image_size=32), EvaluationParameters()
NO_FLOORS = PromotionParameters(min_precision=0, min_recall=0, max_false_alarm_rate=1)

pytestmark = [pytest.mark.slow, pytest.mark.sweep]


@pytest.fixture(scope="module")
def trained(candidate, tmp_path_factory):
    """Give a data set, and a calibrated candidate."""
    folder = tmp_path_factory.mktemp("unfinished")
    dataset = prepare(folder / "data", write_zip(folder / "a.zip", faces(20)))
    dataset.report.write_text("<html></html>")
    detector = shutil.copytree(candidate.folder, folder / "detector")
    calibrate_detector(detector, load_seen(dataset, "val", 32, ()), EVALUATION)
    return dataset, dataclasses.replace(candidate, folder=detector)


@pytest.fixture
def killed(tracking, trained):  # noqa: ARG001 - an MLflow of its own
    """Give what a retrain leaves that was killed once its version was registered: its run is running."""
    connect()
    dataset, candidate = trained
    known = fingerprint.fingerprint_training(dataset.version, TRAINING, EVALUATION, NO_FLOORS)
    with ExitStack() as never_closed:
        parent = never_closed.enter_context(runs.open_retrain("brave-fox", "f1", "a CPU", dataset))
        runs.log_inputs(parent, dataset, TRAINING, EVALUATION, NO_FLOORS)
        with runs.open_run("cnn", parent) as run_id:
            runs.log_training(run_id, Training.plan("cnn", TRAINING, ()))
            for row in candidate.history.to_dict("records"):
                epoch = int(row.pop("epoch"))
                runs.log_metrics(run_id, row, step=epoch)
            best = log_candidate(run_id, candidate, load_seen(dataset, "val", 32, ()), dataset)
        measured = evaluate_on_test(candidate.folder, dataset)
        log_measured(best, parent, measured)
        tags = {names.FINGERPRINT: known, names.FLOW_RUN_ID: "f1"}
        version = challenge.register_challenger(best, measured, dataset, NAME, tags)
        yield SimpleNamespace(
            parent=parent, best=best, measured=measured, version=version, fingerprint=known, dataset=dataset
        )


def go_on(killed: SimpleNamespace) -> challenge.Outcome:
    """Do what the flow does with an unfinished version."""
    version = unfinished.find_unfinished(NAME, killed.fingerprint)
    with unfinished.reopen_retrain(version, "f2") as parent:
        assert mlflow.get_run(parent).info.status == "RUNNING"
        candidates = unfinished.recall_candidates(version, killed.dataset, TRAINING, EVALUATION)
        best = choose_best(candidates)
        measured = evaluate_on_test(best.candidate.folder, killed.dataset)
        assert (measured.scores == killed.measured.scores).all()
        outcome = challenge.promote_challenger(version.version, best, measured, killed.dataset, NO_FLOORS)
        describe_version(NAME, version.version, outcome.decision.text)
    assert mlflow.get_run(parent).info.status == "FINISHED"
    return outcome


def test_a_version_that_was_never_decided_is_decided_and_reported_though_its_folder_is_gone(killed):
    assert fingerprint.find_same_training(NAME, killed.fingerprint) is None
    runs.end_killed_runs(killed.dataset.store)
    assert mlflow.get_run(killed.parent).info.status == "KILLED"
    recalled = unfinished.recall_candidates(read_version(NAME, "1"), killed.dataset, TRAINING, EVALUATION)
    (again,) = recalled
    assert again.run_id == killed.best.run_id
    assert again.validation == dataclasses.replace(
        killed.best.validation, parts={"source": killed.best.validation.sources}
    )
    assert again.candidate.history.to_numpy() == pytest.approx(killed.best.candidate.history.to_numpy())
    assert list(again.candidate.history) == list(killed.best.candidate.history)
    assert again.candidate.folder.parent == Training.plan("cnn", TRAINING, ()).folder(killed.dataset)

    outcome = go_on(killed)
    version = read_version(NAME, "1")
    assert outcome.decision.promoted
    assert production.find_production(NAME) == "1"
    assert (version.decision, version.is_finished) == (names.PROMOTED, True)
    assert version.tags[names.FLOW_RUN_ID] == "f2"
    assert unfinished.find_unfinished(NAME, killed.fingerprint) is None
    committed = not killed.fingerprint.endswith(fingerprint.UNCOMMITTED)
    assert (fingerprint.find_same_training(NAME, killed.fingerprint) is not None) == committed
    assert len(mlflow.MlflowClient().search_model_versions(f"name = '{NAME}'")) == 1


def test_a_decision_stays_what_it_was_when_only_the_report_is_missing(killed, monkeypatch):
    client = mlflow.MlflowClient()
    first = challenge.promote_challenger("1", killed.best, killed.measured, killed.dataset, NO_FLOORS)
    moves = []
    monkeypatch.setattr(challenge, "move_production", lambda *arguments, **_: moves.append(arguments))
    again = go_on(killed)
    assert again.decision == first.decision
    assert (again.comparison, again.production) == (None, None)
    assert moves == []

    # The kill came between the alias and the decision.
    client.delete_model_version_tag(NAME, "1", names.DECISION)
    client.update_model_version(NAME, "1", "")
    assert go_on(killed).decision == first.decision
    assert read_version(NAME, "1").decision == names.PROMOTED
    assert moves == []


def test_a_version_promoted_by_hand_is_compared_with_what_it_replaced(killed):
    other = mlflow.MlflowClient().copy_model_version(f"models:/{NAME}/1", NAME).version
    mlflow.MlflowClient().set_model_version_tag(NAME, other, names.FINGERPRINT, "another")
    production.move_production(NAME, other, None, "first")
    production.promote_by_hand(NAME, "1", "trust me", force=True)
    outcome = go_on(killed)
    assert (outcome.production, outcome.comparison.difference.value) == ("2", 0)
    assert read_version(NAME, "1").decision == names.NOT_PROMOTED  # an equal one is not promoted by the rule
    assert production.find_production(NAME) == "1"
    assert read_version(NAME, "1").tags["production_because"].startswith("by hand: trust me")
    mlflow.MlflowClient().update_model_version(NAME, "1", "")
    mlflow.MlflowClient().delete_model_version(NAME, "2")
    again = go_on(killed)
    assert again.decision == outcome.decision
    assert again.comparison is None


def test_what_cannot_be_finished_is_trained_again(killed):
    client = mlflow.MlflowClient()
    assert unfinished.find_unfinished(NAME, killed.fingerprint).version == "1"
    assert unfinished.find_unfinished(NAME, "another") is None
    client.set_model_version_tag(NAME, "1", names.FILES_REMOVED, "2030-01-01")
    assert unfinished.find_unfinished(NAME, killed.fingerprint) is None


def test_only_runs_of_the_same_data_folder_are_ended(killed, tmp_path):
    with runs.open_run("loser", killed.parent) as child:
        runs.end_killed_runs(open_store(tmp_path / "other"))
        assert {mlflow.get_run(one).info.status for one in (child, killed.parent)} == {"RUNNING"}
        runs.end_killed_runs(killed.dataset.store)
        assert {mlflow.get_run(one).info.status for one in (child, killed.parent)} == {"KILLED"}
        assert mlflow.get_run(killed.best.run_id).info.status == "FINISHED"
