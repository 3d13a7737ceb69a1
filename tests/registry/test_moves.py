"""Moves of production among versions that people delete, runs that they purge, and failures half way: a real MLflow."""

import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import mlflow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from deepfake_core.cli import main
from deepfake_core.errors import ModelError
from deepfake_core.housekeeping import clean
from deepfake_core.registry import connection, model_files, names, production, runs, versions
from deepfake_core.registry.versions import read_version
from deepfake_core.registry.warm_start import list_learned
from deepfake_core.storage.store import open_store
from tests.builders import NAME

pytestmark = pytest.mark.sweep

WRITES = (
    *("set_model_version_tag", "delete_model_version_tag", "set_registered_model_alias"),
    *("delete_registered_model_alias", "set_registered_model_tag", "delete_registered_model_tag"),
)
"""What a move of production does to the registry, beside its lock."""


@pytest.fixture(scope="module")
def five_versions(put_mlflow, tmp_path_factory):
    """Return the database of an MLflow with five versions: making them takes longer than most tests."""
    folder = tmp_path_factory.mktemp("five")
    with pytest.MonkeyPatch.context() as patch:
        put_mlflow(patch, folder)
        client = connection.connect()
        client.create_registered_model(NAME)
        for _ in range(5):
            register(client)
    return folder / "mlflow.db"


@pytest.fixture
def client(tracking, five_versions, monkeypatch):
    shutil.copy(five_versions, tracking / "mlflow.db")
    monkeypatch.setenv("COLUMNS", "200")
    return connection.connect()


def register(client: mlflow.MlflowClient, name: str = NAME) -> None:
    """Register a version that has figures, but no model files: moves need none."""
    with runs.open_run("retrain") as parent, runs.open_run("cnn", parent) as run_id:
        runs.log_metrics(run_id, {"test/recall": 0.8765})
    tags = {"decision": "promoted", "reasons": "met: a", "dataset_version": "0123456789abcdef", "flow_run_id": run_id}
    client.create_model_version(name, "file:///nowhere", run_id, tags=tags)


def promote(*numbers: str, name: str = NAME) -> None:
    for number in numbers:
        production.move_production(name, number, production.find_production(name), f"promotion of {number}")


def find_aliases(client: mlflow.MlflowClient, name: str = NAME) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}


def forget_chains(client: mlflow.MlflowClient) -> None:
    """Leave the tags that former code wrote."""
    for version in versions.list_versions(NAME):
        if names.ROLLS_BACK_TO in version.tags:
            client.delete_model_version_tag(NAME, version.version, names.ROLLS_BACK_TO)
    client.set_registered_model_tag(NAME, names.RECORDED_PRODUCTION, production.find_production(NAME))


@pytest.mark.slow
@pytest.mark.parametrize("former", [False, True], ids=["", "tags of former code"])
@pytest.mark.parametrize(
    ("deleted", "expected"), [("1", "2"), ("2", "1"), ("12", None), ("3", "2"), ("31", "2"), ("32", "1"), ("321", None)]
)
def test_a_rollback_leads_to_the_newest_version_that_still_exists(client, capsys, deleted, expected, former, tmp_path):
    """The third is in production; where it is deleted itself, the model's tag still says what it replaced.

    Former code's tag did not: then the alias `previous` says it, unless that version was deleted too.
    """
    expected = None if former and deleted == "32" else expected
    promote("1", "2", "3")
    if former:
        forget_chains(client)
    for number in deleted:
        client.delete_model_version(NAME, number)
    status = main(["rollback", "--reason", "complaints", "--yes"])
    printed = capsys.readouterr()
    if expected is None:
        assert status == 2
        assert "A rollback needs a version that production replaced" in printed.err
    else:
        assert status == 0
        assert f"Version {expected} is back in production instead of {'none' if '3' in deleted else 3}" in printed.out
        assert ("passed over, as deleted or without model files: 2" in printed.out) == (deleted in ("2", "32"))
        left = {"production": expected}
        assert find_aliases(client) == (left | {"previous": "1"} if expected == "2" and "1" not in deleted else left)
    assert model_files.find_needed_datasets(NAME) == ({"0123456789abcdef"} if find_aliases(client) else set())
    assert clean(open_store(tmp_path / "data"), NAME) == []
    assert main(["gc", "--dry-run", "--data-dir", str(tmp_path / "data")]) == 0


@pytest.mark.slow
def test_rollbacks_end_though_a_person_put_an_older_version_back(client):
    promote("1", "2", "3", "1", "4")
    restored = [production.roll_back(NAME, "complaints")[0] for _ in range(3)]
    assert restored == ["1", "3", "2"]
    with pytest.raises(ModelError, match="version 2 of deepfake-detector in production, which replaced none"):
        production.roll_back(NAME, "and that")
    assert find_aliases(client) == {"production": "2"}


@pytest.mark.slow
def test_versions_without_model_files_are_passed_over(client):
    promote("1", "2", "3")
    versions.tag_version(NAME, "2", {names.FILES_REMOVED: "2030-01-01"})
    assert production.find_previous(NAME) == "1"
    assert production.roll_back(NAME, "complaints") == ("1", "3")
    assert "passed over, as deleted or without model files: 2" in read_version(NAME, "1").tags["production_because"]
    assert find_aliases(client) == {"production": "1"}


def break_write(monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    """Let MLflow fail for good after so many writes, as a server that goes away does."""
    done = []
    for name in WRITES:
        write = getattr(mlflow.MlflowClient, name)

        def fail_later(*arguments: object, write=write, **named: object) -> object:
            done.append(write)
            if len(done) > allowed:
                raise MlflowException("the server went away")
            return write(*arguments, **named)

        monkeypatch.setattr(mlflow.MlflowClient, name, fail_later)


@pytest.mark.slow
@pytest.mark.parametrize("back", [False, True], ids=["promote", "roll back"])
@pytest.mark.parametrize("allowed", range(14))
def test_a_failure_at_any_write_leaves_what_the_next_move_repairs(client, monkeypatch, allowed, back):
    promote("1", "2", "3")
    with monkeypatch.context() as broken:
        break_write(broken, allowed)
        try:
            if back:
                production.roll_back(NAME, "complaints")
            else:
                promote("4")
        except MlflowException:
            pass
    aliases = find_aliases(client)
    assert aliases["production"] in ("3", "2" if back else "4")
    assert aliases.get("previous") != aliases["production"]
    for version in versions.list_versions(NAME):  # who never was there does not say so
        assert names.PRODUCTION_SINCE not in version.tags or version.version in {"1", "2", "3", aliases["production"]}

    production.complete_move(NAME)
    check_record(client)
    if aliases["production"] != "3":
        replaced = read_version(NAME, "3").tags
        assert replaced["replaced_by"] == aliases["production"]
        assert replaced["replaced_because"] == read_version(NAME, aliases["production"]).tags["production_because"]
    promote("5")
    assert find_aliases(client) == {"production": "5", "previous": aliases["production"]}


def check_record(client: mlflow.MlflowClient, name: str = NAME) -> None:
    """Assert that aliases and tags agree."""
    aliases, existing = find_aliases(client, name), {one.version for one in versions.list_versions(name)}
    assert set(aliases.values()) <= existing
    assert aliases.get("previous") == production.find_previous(name) != aliases["production"]
    tags = read_version(name, aliases["production"]).tags
    assert {names.PRODUCTION_SINCE, names.PRODUCTION_BY, names.PRODUCTION_BECAUSE} <= set(tags)
    assert names.MOVE not in tags


STEPS = st.tuples(
    st.sampled_from(("promote", "roll back", "delete", "move outside", "remove")), st.sampled_from("1234")
)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([*[("promote", number) for number in "1234"], ("delete", "4"), ("delete", "3"), ("roll back", "")])
@example([*[("promote", number) for number in "123"], ("remove", ""), ("move outside", "4"), ("roll back", "")])
@given(st.lists(STEPS, min_size=1, max_size=8))
def test_whatever_is_promoted_rolled_back_moved_and_deleted_aliases_and_tags_agree(client, steps):
    name = client.create_registered_model(f"model-{uuid.uuid4().hex}").name
    for _ in range(4):
        register(client, name)
    existing, current, chain = set("1234"), None, []  # where rollbacks lead
    for step, number in steps:
        before = current
        if step == "roll back" and chain:
            assert production.roll_back(name, "complaints") == (chain[0], current)
            current, chain = chain[0], chain[1:]
        elif step in ("promote", "move outside") and number in existing - {current}:
            if step == "promote":
                promote(number, name=name)
            else:
                client.set_registered_model_alias(name, "production", number)
            current, chain = number, [one for one in [current, *chain] if one not in (None, number)]
        elif step == "delete" and number in existing:
            client.delete_model_version(name, number)
            existing, chain = existing - {number}, [one for one in chain if one != number]
            current = None if number == current else current
        elif step == "remove" and current:
            client.delete_registered_model_alias(name, "production")
            current = None
        told, outside = take_outside_moves(name), step not in ("promote", "roll back") and current != before
        text = f"{production.MOVED_OUTSIDE}: someone moved the alias production from version {before or 'none'} to "
        assert told == (f"{text}{current or 'none'}" if outside else None)
        assert production.list_rollbacks(name) == chain
        assert find_aliases(client, name).get("production") == current
        if current:
            check_record(client, name)


def take_outside_moves(name: str = NAME) -> str | None:
    with production.take_outside_moves(name) as text:
        return text


@pytest.mark.slow
def test_a_move_that_was_killed_explains_no_later_one_from_outside(client, monkeypatch):
    promote("1", "2")
    with monkeypatch.context() as broken, pytest.raises(MlflowException):
        break_write(broken, 3)  # the alias is the fourth write
        promote("3")
    assert names.MOVE in read_version(NAME, "3").tags
    promote("4")
    client.set_registered_model_alias(NAME, "production", "3")
    assert take_outside_moves() == f"{production.MOVED_OUTSIDE}: someone moved the alias production from version 4 to 3"
    check_record(client)
    moved, left = read_version(NAME, "3").tags, read_version(NAME, "4").tags
    assert (moved["production_by"], moved["production_because"]) == ("unknown", production.MOVED_OUTSIDE)
    assert (moved["replaced"], left["replaced_by"]) == ("4", "3")
    assert production.list_rollbacks(NAME) == ["4", "2", "1"]


@pytest.mark.slow
def test_every_move_from_outside_is_told_until_a_body_succeeds(client):
    promote("1", "2")
    client.set_registered_model_alias(NAME, "production", "1")
    promote("3")  # by someone who did not look
    client.set_registered_model_alias(NAME, "production", "2")
    told = (
        "moved outside, in MLflow itself: someone moved the alias production from version 2 to 1; "
        "someone moved the alias production from version 3 to 2"
    )
    with pytest.raises(KeyboardInterrupt), production.take_outside_moves(NAME) as text:
        assert text == told
        raise KeyboardInterrupt
    assert take_outside_moves() == told
    assert take_outside_moves() is None

    client.set_registered_model_tag(NAME, names.OUTSIDE_MOVE, "x" * versions.MAX_TEXT_CHARACTERS)
    client.set_registered_model_alias(NAME, "production", "1")
    text = take_outside_moves()  # where nobody looked for long, the newest are kept
    assert len(text) == versions.MAX_TEXT_CHARACTERS
    assert text.endswith("from version 2 to 1")


@pytest.mark.slow
@pytest.mark.parametrize("deleted", [False, True], ids=["the alias", "the version"])
def test_production_that_someone_removed_in_mlflow_is_told_once(client, deleted):
    assert take_outside_moves() is None
    promote("1", "2")
    if deleted:
        client.delete_model_version(NAME, "2")
    else:
        client.delete_registered_model_alias(NAME, "production")
    assert take_outside_moves().endswith("production from version 2 to none")
    assert take_outside_moves() is None
    assert find_aliases(client) == {"previous": "1"}
    if not deleted:
        assert read_version(NAME, "2").tags["replaced_by"] == "none"
    client.set_registered_model_alias(NAME, "production", "4")
    assert take_outside_moves().endswith("production from version none to 4")
    check_record(client)
    assert find_aliases(client) == {"production": "4", "previous": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "allowed"), [*(("3", allowed) for allowed in range(14)), *(("none", allowed) for allowed in range(7))]
)
def test_a_move_from_outside_is_told_wherever_writing_fails_and_once(client, monkeypatch, allowed, to):
    promote("1", "2")
    if to == "none":
        client.delete_registered_model_alias(NAME, "production")
    else:
        client.set_registered_model_alias(NAME, "production", to)
    with monkeypatch.context() as broken, pytest.raises(MlflowException):
        break_write(broken, allowed)
        take_outside_moves()
    told = f"{production.MOVED_OUTSIDE}: someone moved the alias production from version 2 to {to}"
    assert [take_outside_moves() for _ in range(2)] == [told, None]
    assert production.list_rollbacks(NAME) == (["1"] if to == "none" else ["2", "1"])
    assert read_version(NAME, "2").tags["replaced_by"] == to


DAMAGES = ("", "promoted by Ann", "{", "7", "null", "[]", "{}", '{"from": "1"}')
WRONG_TYPE = '{"from": "1", "at": null, "by": "Ann", "because": "better", "back": false}'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "damage"),
    [*(("rollback", damage) for damage in (*DAMAGES, WRONG_TYPE)), ("promote", "{"), ("look", "{")],
)
def test_a_damaged_tag_of_a_move_blocks_nothing_and_the_move_counts_as_one_from_outside(
    client, monkeypatch, caplog, command, damage
):
    promote("1")
    with monkeypatch.context() as broken:
        break_write(broken, 4)  # the alias has moved, and no more
        promote("2")
    client.set_model_version_tag(NAME, "2", names.MOVE, damage)
    if command == "promote":
        assert main(["promote", "3", "--reason", "next", "--yes"]) == 0
        assert find_aliases(client) == {"production": "3", "previous": "2"}
    elif command == "rollback":
        assert main(["rollback", "--reason", "complaints", "--yes"]) == 0
        assert find_aliases(client) == {"production": "1"}
    assert take_outside_moves().endswith("someone moved the alias production from version 1 to 2")
    assert "the tag move_to_production of version 2 of deepfake-detector is damaged, and removed" in caplog.text
    check_record(client)
    tags = read_version(NAME, "2").tags
    assert (tags["production_by"], tags["production_because"]) == ("unknown", production.MOVED_OUTSIDE)
    assert names.MOVE not in tags


@pytest.mark.slow
def test_a_damaged_tag_of_the_first_move_and_one_where_nothing_moved(client, monkeypatch):
    with monkeypatch.context() as broken:
        break_write(broken, 3)  # the alias has moved, and no more
        promote("1")
    client.set_model_version_tag(NAME, "1", names.MOVE, "{")
    assert take_outside_moves().endswith("production from version none to 1")
    check_record(client)
    client.set_model_version_tag(NAME, "1", names.MOVE, "{")
    assert take_outside_moves() is None
    check_record(client)


KILLED = """
import os, signal, sys
import mlflow
from deepfake_core.registry import connection, production
connection.connect()
done = []
for name in sys.argv[2].split(","):
    write = getattr(mlflow.MlflowClient, name)
    def count(*arguments, write=write, **named):
        done.append(write)
        if len(done) > int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments, **named)
    setattr(mlflow.MlflowClient, name, count)
production.move_production("deepfake-detector", "2", "1", "better")
"""


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("allowed", [0, 2, 3, 4, 6, 9])
def test_a_killed_promotion_is_completed_by_the_next_command(client, monkeypatch, allowed):
    promote("1")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(allowed), ",".join(WRITES)], env=os.environ)
    assert ended.returncode == -signal.SIGKILL
    monkeypatch.setattr(production, "MAX_LOCK_SECONDS", 0)
    current = production.find_production(NAME)
    assert current == ("1" if allowed < 4 else "2")  # the alias is the fourth write
    assert main(["promote", "3", "--reason", "next", "--yes"]) == 0
    check_record(client)
    assert find_aliases(client) == {"production": "3", "previous": current}
    assert production.list_rollbacks(NAME) == ["2", "1"][2 - int(current) :]
    assert ("production_since" in read_version(NAME, "2").tags) == (current == "2")


def purge(client: mlflow.MlflowClient, run_id: str) -> None:
    """Remove a run for good, as `mlflow gc` does."""
    client.delete_run(run_id)
    SqlAlchemyStore(mlflow.get_tracking_uri(), str(Path("mlruns").absolute()))._hard_delete_run(run_id)


@pytest.mark.slow
def test_a_version_whose_run_is_gone_is_listed_without_figures_and_harms_no_command(client, tmp_path, capsys):
    promote("1", "2")
    gone = [read_version(NAME, number) for number in "124"]
    for version in gone:
        purge(client, version.run_id)
    assert main(["versions"]) == 0
    listed = capsys.readouterr().out
    assert [word for word in ("previous", "production", "promotion of 2") if word not in listed] == []
    assert listed.count("0.8765") == 2
    assert versions.find_version(NAME, gone[2].run_id) == "4"
    assert versions.find_version(NAME, read_version(NAME, "5").run_id) == "5"
    assert list_learned(gone[0]) is None
    assert runs.find_local_artifact(gone[0].run_id, names.REPORT) is None
    assert main(["promote", "5", "--reason", "better", "--yes"]) == 0
    assert main(["promote", "4", "--reason", "its run is gone", "--yes"]) == 0
    assert main(["rollback", "--reason", "complaints", "--yes"]) == 0
    assert find_aliases(client) == {"production": "5", "previous": "2"}
    assert clean(open_store(tmp_path / "data"), NAME) == []
    assert main(["compare", "1", "3"]) == 2
    assert "must hold its test scores. Received: version 1" in capsys.readouterr().err


def test_pages_of_a_version_whose_run_is_gone(client, monkeypatch):
    version = read_version(NAME, "1")
    purge(client, version.run_id)
    # For the links: the client is connected already.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://deploy:a/5ecre7@mlflow")
    assert versions.find_pages(version) == {"version": f"http://mlflow/#/models/{NAME}/versions/1"}
