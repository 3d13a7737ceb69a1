"""Reports on wrong verdicts: what is kept, counted, decided and forgotten, in a folder and at a URL."""

import pytest

from deepfake_core.errors import ArchiveError, ConfigurationError
from deepfake_core.feedback.records import GivenVerdict
from deepfake_core.feedback.reports import open_feedback
from tests.builders import jpeg

VERDICT = GivenVerdict(label="real", probability=0.1, sure=True, version="a model version 1", box=(0, 0, 9, 9), faces=1)


@pytest.fixture(params=["folder", "url"])
def address(request, tmp_path):
    return str(tmp_path / "feedback") if request.param == "folder" else f"memory://{tmp_path}/feedback"


def test_an_image_that_is_sent_twice_is_one_report_with_a_count(address):
    feedback = open_feedback(address)
    assert feedback.list_entries() == []
    assert feedback.list_confirmed() == []
    feedback.add(jpeg(1), VERDICT, "fake", "an ear is missing")
    entry = open_feedback(address).add(jpeg(1), VERDICT, "real")
    (listed,) = open_feedback(address).list_entries("unreviewed")
    assert listed == entry
    assert (entry.count, entry.claimed, entry.status, entry.problems) == (2, ["fake", "real"], "unreviewed", ())
    assert entry.reports[0].verdict == VERDICT
    assert entry.reports[0].note == "an ear is missing"
    assert feedback.read_image(entry.sha256[:8]) == jpeg(1)


def test_only_what_is_confirmed_is_learned_from_and_a_decision_can_be_taken_back(address):
    feedback = open_feedback(address)
    sha256 = feedback.add(jpeg(1), VERDICT, "fake").sha256
    assert feedback.list_confirmed() == []
    feedback.confirm(sha256, "fake", by="someone", why="the ear")
    (confirmed,) = feedback.list_confirmed()
    assert (confirmed.sha256, confirmed.label, confirmed.box) == (sha256, "fake", (0, 0, 9, 9))
    assert confirmed.read() == jpeg(1)
    entry = feedback.withdraw(sha256, by="another", why="not sure")
    assert entry.status == "unreviewed"
    assert feedback.list_confirmed() == []
    entry = feedback.reject(sha256, by="another")
    assert entry.status == "rejected"
    assert [(one.decision, one.by, one.why) for one in entry.decisions] == [
        ("confirmed", "someone", "the ear"),
        ("withdrawn", "another", "not sure"),
        ("rejected", "another", ""),
    ]


def test_what_is_forgotten_is_gone(address):
    feedback = open_feedback(address)
    sha256 = feedback.add(jpeg(1), VERDICT, "fake").sha256
    other = feedback.add(jpeg(2), VERDICT, "fake").sha256
    feedback.confirm(sha256, "fake", by="someone")
    assert feedback.forget(sha256[:12]) == sha256
    assert [entry.sha256 for entry in feedback.list_entries()] == [other]
    with pytest.raises(ArchiveError, match="nothing"):
        feedback.read_image(sha256)
    with pytest.raises(ConfigurationError, match="holds nothing"):
        feedback.forget(sha256)


def test_a_rejected_image_that_expired_is_known_when_it_is_sent_again(address):
    feedback = open_feedback(address)
    sha256 = feedback.add(jpeg(1), VERDICT, "fake", "a note").sha256
    feedback.reject(sha256, by="someone", why="it is real")
    feedback.expire(sha256)
    entry = feedback.add(jpeg(1), VERDICT, "fake", "a note")
    assert (entry.size, entry.count, entry.status, entry.problems) == (0, 0, "rejected", ())
    feedback.withdraw(sha256, by="someone")
    entry = feedback.add(jpeg(1), VERDICT, "fake", "a note")
    assert (entry.count, entry.status) == (1, "unreviewed")
    assert feedback.read_image(sha256) == jpeg(1)
