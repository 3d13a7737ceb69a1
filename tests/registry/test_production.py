"""Who is in production, who was, and why: aliases, audit trail, comparison, rollback and health, on a real MLflow."""

import json
import multiprocessing
import shutil
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter
from prefect.states import Cancelled, Cancelling, Completed, Suspended

from deepfake_core.cli import main
from deepfake_core.config import EvaluationParameters
from deepfake_core.detector import Detector
from deepfake_core.errors import ModelError, ProductionMovedError
from deepfake_core.registry import approval, connection, detectors, names, probe, production, runs
from deepfake_core.registry.versions import ModelVersion, list_versions, read_version, tag_version
from deepfake_core.registry.warm_start import list_learned
from deepfake_core.serving.load_versions import find_shadow
from deepfake_core.training.calibration import calibrate_detector
from tests.builders import find_events, jpeg, stripes, wait_until

pytestmark = pytest.mark.slow

NAME = "deepfake-detector"
PROBE = [jpeg(number) for number in range(4)]


def write_scores(detector: Detector, count: int, seed: int) -> str:
    images = stripes(count, seed)
    scores = detector.score(images.pixels)
    lines = ["sha256,group,source,member,label,score"]
    for number, (label, score) in enumerate(zip(images.labels, scores, strict=True)):
        lines.append(f"{seed}-{number},{number},drawn,{number}.jpg,{('real', 'fake')[label]},{score}")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def versions_once(candidate, put_mlflow, tmp_path_factory):
    """Register three versions: two promoted by the rule, the third refused by it."""
    folder = tmp_path_factory.mktemp("production")
    detector = shutil.copytree(candidate.folder, folder / "detector")
    calibrate_detector(detector, stripes(64, 5), EvaluationParameters())
    with pytest.MonkeyPatch.context() as patch:
        put_mlflow(patch, folder)
        for number, tags in enumerate(
            (
                {"decision": "promoted", "reasons": "met: a"},
                {"decision": "promoted", "reasons": "met: a"},
                {"decision": "not promoted", "reasons": "met: a; NOT met: AUC 0.5"},
                {"decision": "promoted", "reasons": "met: a", "drawn_images": "true"},
            ),
            start=1,
        ):
            with runs.open_run("cnn") as run_id:
                runs.log_parameters(run_id, {"threshold": Detector(detector).threshold})
                runs.log_text(run_id, write_scores(Detector(detector), 60, seed=min(number, 2)), names.SCORES)
                scores = [row.fake_probability for row in Detector(detector).predict(PROBE)]
                probe.log_probe(run_id, PROBE, scores)
            detectors.register_detector(run_id, detector, NAME, jpeg(1), tags)
    return folder


@pytest.fixture
def versions(versions_once, monkeypatch, tmp_path):
    """Give each test the four versions, and nothing in production."""
    shutil.copy(versions_once / "mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return connection.connect()


def find_aliases() -> dict[str, str]:
    return {alias: one.version for one in list_versions(NAME) for alias in one.aliases}


@pytest.mark.slow
@pytest.mark.usefixtures("versions")
def test_both_versions_say_who_replaced_whom_when_and_why():
    production.move_production(NAME, "1", None, "first")
    production.move_production(NAME, "2", "1", "AUC 0.9, production's 0.8")
    assert find_aliases() == {"production": "2", "previous": "1"}
    first, second = (read_version(NAME, number).tags for number in "12")
    assert first["replaced"] == "none"
    assert first["replaced_by"] == "2"
    assert first["replaced_because"] == second["production_because"] == "AUC 0.9, production's 0.8"
    assert first["production_until"] == second["production_since"]
    assert time.strptime(second["production_since"], "%Y-%m-%d %H:%M:%S %z")
    assert second["replaced"] == "1"


@pytest.mark.slow
def test_production_does_not_move_for_who_looked_too_early(versions):
    production.move_production(NAME, "1", None, "first")
    with pytest.raises(ProductionMovedError, match=r"Received: version 1, no longer None\. Compare again"):
        production.move_production(NAME, "2", None, "looked before")
    assert find_aliases() == {"production": "1"}
    assert "production_since" not in read_version(NAME, "2").tags
    assert [model.name for model in versions.search_registered_models()] == [NAME]  # the lock is gone


def race(version: str, ready, results) -> None:
    connection.connect()
    ready.wait()
    try:
        production.move_production(NAME, version, None, f"race of {version}")
        results.put(version)
    except ProductionMovedError:
        results.put(None)


@pytest.mark.sweep
@pytest.mark.process
@pytest.mark.slow
@pytest.mark.usefixtures("versions")
def test_of_processes_that_move_at_once_one_wins():
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(3), context.Queue()
    racers = [context.Process(target=race, args=(version, ready, results)) for version in "123"]
    for racer in racers:
        racer.start()
    outcomes = [results.get() for _ in racers]
    for racer in racers:
        racer.join()
    (winner,) = [version for version in outcomes if version]
    assert find_aliases() == {"production": winner}
    since = [number for number in "123" if "production_since" in read_version(NAME, number).tags]
    assert since == [winner]


def test_a_lock_that_was_left_behind_is_removed(versions, monkeypatch, caplog):
    versions.create_registered_model(f"{NAME}-alias-lock")
    monkeypatch.setattr(production, "MAX_LOCK_SECONDS", 1)
    production.move_production(NAME, "1", None, "after a crash")
    assert "left behind" in caplog.text
    assert production.find_production(NAME) == "1"


def test_a_lock_that_is_given_back_while_it_is_asked_for_is_taken(versions, monkeypatch):
    lock, look_up = f"{NAME}-alias-lock", SqlAlchemyStore.get_registered_model
    versions.create_registered_model(lock)

    def give_back_first(store, name):
        with suppress(MlflowException):
            store.delete_registered_model(lock)
        return look_up(store, name)

    monkeypatch.setattr(SqlAlchemyStore, "get_registered_model", give_back_first)
    production.move_production(NAME, "1", None, "first")
    assert production.find_production(NAME) == "1"


@pytest.mark.slow
@pytest.mark.usefixtures("versions")
def test_rollbacks_go_back_one_by_one_and_never_forward():
    for version, expected in (("1", None), ("2", "1"), ("3", "2")):
        production.move_production(NAME, version, expected, "better")
    assert production.roll_back(NAME, "misjudges agency photographs") == ("2", "3")
    assert find_aliases() == {"production": "2", "previous": "1"}
    assert production.roll_back(NAME, "that too") == ("1", "2")
    assert find_aliases() == {"production": "1"}
    with pytest.raises(ModelError, match="in production, which replaced none"):
        production.roll_back(NAME, "and that")
    tags = read_version(NAME, "3").tags
    assert tags["replaced_by"] == "2"
    assert tags["replaced_because"] == "rolled back from version 3: misjudges agency photographs"


@pytest.mark.usefixtures("versions")
def test_an_unsuitable_version_needs_force_which_is_recorded():
    production.promote_by_hand(NAME, "1", "start")
    with pytest.raises(ModelError, match=r"version 3 of deepfake-detector: NOT met: AUC 0\.5\. Choose another"):
        production.promote_by_hand(NAME, "3", "trust me")
    with pytest.raises(ModelError, match="drawn images, production on photographs"):
        production.promote_by_hand(NAME, "4", "pretty")
    with pytest.raises(ModelError, match="must not be in production yet"):
        production.promote_by_hand(NAME, "1", "again", force=True)
    with pytest.raises(ModelError, match="a number that the registry knows"):
        production.promote_by_hand(NAME, "9", "typo")
    assert production.find_production(NAME) == "1"
    assert production.promote_by_hand(NAME, "3", "trust me", force=True) == "1"
    because = read_version(NAME, "3").tags["production_because"]
    assert because == "by hand: trust me (forced, though NOT met: AUC 0.5)"


@pytest.mark.slow
@pytest.mark.usefixtures("versions")
def test_the_command_line_asks_first(monkeypatch, capsys):
    assert main(["promote", "1", "--reason", "start", "--yes"]) == 0
    monkeypatch.setattr("builtins.input", lambda question: print(question) or "n")
    assert main(["promote", "2", "--reason", "better"]) == 1
    assert "Put version 2 into production instead of 1? [y/N]" in capsys.readouterr().out
    assert production.find_production(NAME) == "1"
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert main(["promote", "2", "--reason", "better"]) == 0
    assert main(["promote", "3", "--reason", "no"]) == 2
    assert "NOT met: AUC 0.5" in capsys.readouterr().err
    assert main(["promote", "3", "--reason", "yes", "--force"]) == 0
    assert main(["rollback", "--reason", "complaints"]) == 0
    assert "Version 2 is back in production instead of 3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["promote", "1"])  # no reason


@pytest.mark.usefixtures("versions")
def test_versions_tells_the_whole_story(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    main(["promote", "1", "--reason", "start", "--yes"])
    main(["promote", "2", "--reason", "fewer false alarms", "--yes"])
    capsys.readouterr()
    assert main(["versions"]) == 0
    out = capsys.readouterr().out
    for words in ("by hand: fewer false alarms", "by version 2", "previous", "production"):
        assert words in out


@pytest.mark.usefixtures("versions")
def test_versions_are_compared_on_the_images_they_share(capsys):
    assert main(["compare", "2", "3"]) == 0
    out = capsys.readouterr().out
    assert "On 60 images, version 2's AUC is 0.000" in out
    assert main(["compare", "1", "2"]) == 2
    assert "none in common" in capsys.readouterr().err


@pytest.mark.usefixtures("versions")
def test_versions_are_compared_on_a_folder(tmp_path, capsys):
    for label, first in (("real", 0), ("fake", 50)):
        folder = tmp_path / "labelled" / label
        folder.mkdir(parents=True)
        for number in range(6):
            (folder / f"{number}.jpg").write_bytes(jpeg(first + number))
    (folder / "notes.txt").write_text("no image")
    assert main(["compare", "1", "2", "--split", str(tmp_path / "labelled")]) == 0
    printed = capsys.readouterr()
    assert "On 12 images, version 1's AUC is 0.000" in printed.out
    assert "1 files could not be read" in printed.err
    assert main(["compare", "1", "2", "--split", str(tmp_path / "labelled" / "real")]) == 2
    assert "images in real/ and in fake/" in capsys.readouterr().err


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.usefixtures("versions")
def test_the_same_as_flows():
    from flows.production import promote, roll_back  # Prefect takes seconds to import

    assert promote(1, "start").startswith("Version 1 of deepfake-detector is in production instead of none")
    with pytest.raises(ModelError, match="NOT met"):
        promote(3, "no")
    promote(3, "yes", force=True)
    assert "Version 1 of deepfake-detector is back in production instead of 3: oops" in roll_back("oops")
    assert find_aliases() == {"production": "1"}


@pytest.mark.usefixtures("prefect_api")
def test_health_fails_when_scores_are_no_longer_those_recorded(versions):
    from flows.production import health

    with pytest.raises(ModelError, match="There must be a production model"):
        health()
    production.move_production(NAME, "1", None, "first")
    assert "the scores of 4 probe images differ by" in health()
    run_id = read_version(NAME, "1").run_id
    probe = versions.download_artifacts(run_id, "probe/scores.json")
    scores = json.loads(Path(probe).read_text())
    versions.log_text(run_id, json.dumps([scores[0] + 0.01, *scores[1:]]), "probe/scores.json")
    try:
        with pytest.raises(ModelError, match="What serves it has changed"):
            health()
    finally:
        versions.log_text(run_id, json.dumps(scores), "probe/scores.json")


@pytest.fixture
def questions(versions, prefect_api):  # noqa: ARG001
    """Deploy `approve/manual`, let version 3 wait for approval, and give a function that reads the runs that ask."""
    from flows.production import approve

    flow = FlowFilter(name={"any_": ["approve"]})
    until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    production.move_production(NAME, "1", None, "first")
    tag_version(NAME, "3", {"decision": names.WAITS, "compared_with": "1", "answer_until": until})
    deployment = approve.to_deployment("manual").apply()
    with get_client(sync_client=True) as prefect:
        yield lambda: prefect.read_flow_runs(flow_filter=flow)
        for run in prefect.read_flow_runs(flow_filter=flow):
            prefect.delete_flow_run(run.id)
        prefect.delete_deployment(deployment)


def put(run, state) -> None:
    with get_client(sync_client=True) as prefect:
        prefect.set_flow_run_state(run.id, state, force=True)


def test_health_asks_about_a_version_that_waits_and_once_whatever_became_of_the_question(questions):
    from flows.production import health

    health()
    (asked,) = questions()
    assert asked.parameters == {"version": 3, "model_name": NAME}
    for state in (Suspended(timeout_seconds=3600), Completed(), Cancelled()):
        put(asked, state)
        health()
        (run,) = questions()
        assert (run.id, run.state.name) == (asked.id, state.name)


def test_a_version_is_refused_after_its_hours_though_its_question_was_cancelled(questions):
    from flows.production import health

    start = datetime.now(UTC)
    health()
    (asked,) = questions()
    put(asked, Suspended(timeout_seconds=3600))
    with get_client(sync_client=True) as prefect:
        prefect.set_flow_run_state(asked.id, Cancelling())  # as the button Cancel in Prefect does
    health()
    (asked,) = questions()
    assert (asked.state.name, read_version(NAME, "3").decision) == ("Cancelled", names.WAITS)

    tag_version(NAME, "3", {"answer_until": (start - timedelta(minutes=1)).isoformat(timespec="seconds")})
    health()
    refused = read_version(NAME, "3")
    assert (refused.decision, refused.reasons[-1][:33]) == (names.NOT_PROMOTED, "refused: nobody approved it until")
    (event,) = wait_until(lambda: find_events("deepfake.version.not-promoted", start))
    assert event["payload"]["text"].endswith("is not promoted, as nobody approved it.")
    assert len(questions()) == 1


def test_questions_about_a_version_that_was_decided_about_or_deleted_are_cancelled(versions, questions):
    from flows.production import health

    health()
    (asked,) = questions()
    put(asked, Suspended(timeout_seconds=3600))
    approval.refuse(NAME, "3", "too many mistakes")
    health()
    (asked,) = questions()
    assert asked.state.message == "It was decided elsewhere: not promoted, refused: too many mistakes"

    put(asked, Suspended(timeout_seconds=3600))
    versions.delete_model_version(NAME, "3")
    assert "the scores of 4 probe images differ by" in health()
    (asked,) = questions()
    assert (asked.state.name, asked.state.message) == ("Cancelled", "It was deleted")


@pytest.mark.usefixtures("questions")
def test_health_checks_production_whatever_fails_before_and_fails_at_its_end(caplog):
    from flows.production import health

    tag_version(NAME, "3", {"answer_until": "tomorrow"})  # by someone, in MLflow itself
    with pytest.raises(ValueError, match="tomorrow"):
        health()
    assert "the scores of 4 probe images differ by" in caplog.text


@pytest.mark.usefixtures("versions")
def test_a_version_is_not_called_unknown_where_mlflow_fails(monkeypatch):
    def fail(*_):
        raise MlflowException("the server went away")

    with pytest.raises(ModelError, match="number that the registry knows"):
        read_version(NAME, "9")
    with pytest.raises(ModelError, match="number that the registry knows"):
        read_version(NAME, "the best")
    monkeypatch.setattr(SqlAlchemyStore, "get_model_version", fail)
    with pytest.raises(MlflowException, match="went away"):
        read_version(NAME, "1")


@pytest.mark.usefixtures("prefect_api")
def test_aliases_that_someone_moves_in_mlflow_are_announced_once_and_in_the_audit_trail(versions):
    from flows.production import health

    start = datetime.now(UTC)
    production.move_production(NAME, "1", None, "first")
    production.move_production(NAME, "2", "1", "better")
    health()
    versions.set_registered_model_alias(NAME, "production", "4")
    health()
    health()
    tags = read_version(NAME, "4").tags
    assert (tags["production_because"], tags["production_by"]) == ("moved outside, in MLflow itself", "unknown")
    assert (tags["replaced"], read_version(NAME, "2").tags["replaced_by"]) == ("2", "4")
    assert find_aliases() == {"production": "4", "previous": "2"}
    assert production.roll_back(NAME, "nobody said why") == ("2", "4")
    versions.set_registered_model_alias(NAME, "previous", "3")
    health()
    assert find_aliases() == {"production": "2", "previous": "1"}
    versions.delete_registered_model_alias(NAME, "production")
    for _ in range(2):
        with pytest.raises(ModelError, match="There must be a production model"):
            health()
    events = wait_until(lambda: found if len(found := find_events("deepfake.version.moved-outside", start)) > 2 else [])
    assert [one["payload"]["text"].partition(": ")[2] for one in events] == [
        "someone moved the alias production from version 2 to none",
        "someone moved the alias previous from version 1 to 3; it is put back",
        "someone moved the alias production from version 2 to 4",
    ]


def test_the_newest_version_not_promoted_is_the_challenger(versions):
    production.move_production(NAME, "1", None, "first")
    for version in "12":
        production.name_challenger(NAME, version)
    assert find_aliases() == {"production": "1", "challenger": "2"}  # production is no challenger of its own
    production.move_production(NAME, "2", "1", "by hand")
    assert find_aliases() == {"production": "2", "previous": "1"}
    production.name_challenger(NAME, "4")
    production.roll_back(NAME, "complaints")
    assert find_aliases() == {"production": "1", "challenger": "4"}
    assert find_shadow(NAME).version == f"{NAME}/4"
    versions.set_registered_model_alias(NAME, "challenger", "3")
    shadow = find_shadow(NAME)
    assert shadow.version == f"{NAME}/3"
    assert find_shadow(NAME, shadow) is shadow
    versions.delete_registered_model_alias(NAME, "challenger")
    assert find_shadow(NAME, shadow) is None


@pytest.mark.usefixtures("versions")
def test_an_older_version_without_a_probe_is_said():
    with runs.open_run("old") as run_id:
        pass
    old = ModelVersion(NAME, "1", run_id, (), {}, {}, "")
    with pytest.raises(ModelError, match="needs probe images"):
        probe.check_probe(old)
    assert list_learned(old) is None
    assert runs.read_text(run_id, names.SCORES) is None
