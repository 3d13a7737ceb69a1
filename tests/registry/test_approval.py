"""A version that waits for approval: it is promoted by a person, refused by one, or refused when time is over."""

from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta

import pytest

from deepfake_core.cli import main
from deepfake_core.errors import ModelError
from deepfake_core.registry import approval, connection, model_files, names, production, runs
from deepfake_core.registry.detectors import register_detector
from deepfake_core.registry.versions import read_version, tag_version
from tests.builders import NAME, jpeg

pytestmark = pytest.mark.slow


def in_hours(hours: float) -> str:
    return (datetime.now(UTC) + timedelta(hours=hours)).isoformat(timespec="seconds")


@pytest.fixture(autouse=True)
def versions(candidate, tmp_path, monkeypatch):
    """Register version 1, which is in production, and version 2, which was compared with it and waits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    connection.connect()
    close = {
        names.REASONS: "met: recall 0.8; NOT met: AUC 0.9",
        names.DECISION: names.WAITS,
        names.COMPARED_WITH: "1",
        names.ANSWER_UNTIL: in_hours(1),
    }
    for tags in ({names.DECISION: names.PROMOTED, names.REASONS: "met: a"}, close):
        with runs.open_run("cnn") as run_id:
            runs.log_metrics(run_id, {"test/auc": 0.9, "test/auc_low": 0.85, "test/auc_high": 0.95})
        register_detector(run_id, candidate.folder, NAME, jpeg(1), tags)
    production.move_production(NAME, "1", None, "first")


def test_the_question_says_what_there_is_to_decide():
    waiting = read_version(NAME, "2")
    text = approval.describe_question(waiting)
    for words in ("Shall deepfake-detector version 2 go into production?", "NOT met: AUC 0.9", "| AUC | 0.900", "1."):
        assert words in text
    assert 3500 < approval.limit_seconds(waiting) - approval.SECONDS_TO_REFUSE <= 3600


def test_a_person_approves_and_the_answer_is_recorded():
    assert approval.refuse_unanswered(NAME) == []
    assert main(["promote", "2", "--reason", "seen; fine", "--yes"]) == 0
    approved = read_version(NAME, "2")
    assert (approved.decision, approved.aliases) == (names.PROMOTED, ("production",))
    assert approved.reasons[-1] == "approved: seen, fine"
    assert production.find_previous(NAME) == "1"


def test_a_person_refuses_and_production_stays(capsys):
    assert main(["refuse", "2", "--reason", "too many mistakes at night"]) == 0
    assert "is refused" in capsys.readouterr().out
    refused = read_version(NAME, "2")
    assert (refused.decision, refused.aliases) == (names.NOT_PROMOTED, ())
    assert refused.reasons[-1] == "refused: too many mistakes at night"
    with pytest.raises(ModelError, match=r"Only a version that waits.*which is not promoted"):
        approval.refuse(NAME, "2", "again")
    assert production.find_production(NAME) == "1"


def test_what_nobody_answers_is_refused_when_its_time_is_over_and_not_before():
    tag_version(NAME, "2", {names.ANSWER_UNTIL: in_hours(-0.01)})
    assert approval.refuse_unanswered(NAME) == ["2"]
    assert approval.refuse_unanswered(NAME) == []
    assert "nobody approved it" in read_version(NAME, "2").reasons[-1]
    assert production.find_production(NAME) == "1"


def test_an_approval_that_was_killed_half_way_is_recorded_by_the_next_look():
    production.move_production(NAME, "2", "1", "by hand: approved")
    tag_version(NAME, "2", {names.ANSWER_UNTIL: in_hours(-1)})
    assert approval.refuse_unanswered(NAME) == []
    assert read_version(NAME, "2").decision == names.PROMOTED
    assert production.find_production(NAME) == "2"
    with pytest.raises(ModelError):
        approval.refuse(NAME, "2", "too late")


def test_an_approval_that_was_killed_half_way_and_rolled_back_is_recorded_too():
    production.move_production(NAME, "2", "1", "by hand: approved")
    production.roll_back(NAME, "bad at night")
    tag_version(NAME, "2", {names.ANSWER_UNTIL: in_hours(-1)})
    assert approval.refuse_unanswered(NAME) == []
    answered = read_version(NAME, "2")
    assert (answered.decision, answered.reasons[-1]) == (names.PROMOTED, "by hand: approved")
    assert production.find_production(NAME) == "1"


@pytest.mark.parametrize(
    ("act", "module", "writes", "other", "decision", "aliases"),
    [
        (
            lambda: approval.refuse_unanswered(NAME),
            *(approval, "record_answer", lambda: production.promote_by_hand(NAME, "2", "fine")),
            *(names.NOT_PROMOTED, ()),
        ),
        (
            lambda: production.promote_by_hand(NAME, "2", "fine"),
            *(production, "find_objections", lambda: approval.refuse(NAME, "2", "too many mistakes")),
            *(names.PROMOTED, ("production",)),
        ),
    ],
    ids=["approved while it is refused", "refused while it is approved"],
)
def test_of_two_answers_at_once_the_first_counts(monkeypatch, act, module, writes, other, decision, aliases):
    """The second comes between the look and the writing of the first."""
    tag_version(NAME, "2", {names.ANSWER_UNTIL: in_hours(-1)})
    write = getattr(module, writes)
    with ThreadPoolExecutor() as pool:

        def be_late(*arguments):
            monkeypatch.setattr(module, writes, write)
            answers.append(pool.submit(other))
            wait(answers, timeout=3)
            return write(*arguments)

        answers: list = []
        monkeypatch.setattr(module, writes, be_late)
        act()
        with pytest.raises(ModelError):
            answers[0].result()
    answered = read_version(NAME, "2")
    assert (answered.decision, answered.aliases) == (decision, aliases)


def test_if_production_has_moved_meanwhile_an_approval_must_be_forced(candidate):
    with runs.open_run("cnn") as run_id:
        pass
    register_detector(run_id, candidate.folder, NAME, jpeg(1), {names.DECISION: names.PROMOTED})
    production.move_production(NAME, "3", "1", "by another retrain")
    with pytest.raises(ModelError, match="compared with version 1, and 3 is in production now"):
        production.promote_by_hand(NAME, "2", "fine")
    production.promote_by_hand(NAME, "2", "fine", force=True)
    assert read_version(NAME, "2").decision == names.PROMOTED


def test_housekeeping_keeps_the_files_of_a_version_that_waits(candidate):
    for _ in range(2):
        with runs.open_run("cnn") as run_id:
            pass
        register_detector(run_id, candidate.folder, NAME, jpeg(1), {names.DECISION: names.NOT_PROMOTED})
    assert [files.versions for files in model_files.find_unneeded_files(NAME, keep=1)] == [("3",)]
