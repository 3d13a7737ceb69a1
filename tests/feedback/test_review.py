"""The review: what a person sees of unreviewed images, and that their decisions are recorded."""

import base64
import hashlib
import html
import io
import re

import markdown
import pytest
from PIL import Image
from prefect.client.orchestration import get_client

from deepfake_core.config import ReviewDecision
from deepfake_core.errors import ConfigurationError
from deepfake_core.feedback.reports import open_feedback
from deepfake_core.feedback.review import MAX_NOTES, MAX_SHOWN, apply_decisions, describe_review
from flows.feedback import feedback as feedback_flow
from tests.builders import VERDICT, draw_image, encode, jpeg


@pytest.fixture
def feedback(tmp_path):
    return open_feedback(tmp_path / "feedback")


def hash_image(image):
    return hashlib.sha256(image).hexdigest()


def test_what_senders_write_is_shown_as_text(feedback):
    note = "x | y <script>alert(1)</script> [a](http://b) ![c](http://d) `e` <img src=f> | **g**"
    feedback.add(encode(draw_image(1, 400), "PNG"), VERDICT, "fake", note)
    page = markdown.markdown(describe_review(feedback, []))
    assert not re.search(r"<script|<strong|href=|src=\"(?!data:image/jpeg)|<img src=f", page)
    assert f"<code>{html.escape(note.replace('`', chr(39)), quote=False)}</code>" in page
    (encoded,) = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (160, 160)


def test_the_oldest_of_many_are_shown(feedback):
    for seed in range(MAX_SHOWN + 2):
        feedback.add(jpeg(seed), VERDICT, "fake")
    page = describe_review(feedback, [])
    assert f": {MAX_SHOWN + 2}. The {MAX_SHOWN} that were reported first are below." in page
    assert page.count("data:image/jpeg") == MAX_SHOWN
    assert hash_image(jpeg(0))[:12] in page
    assert hash_image(jpeg(MAX_SHOWN + 1))[:12] not in page


def test_of_many_notes_on_an_image_the_newest_are_shown(feedback):
    for number in range(MAX_NOTES + 1):
        feedback.add(jpeg(1), VERDICT, "fake", f"note {number}.")
    page = describe_review(feedback, [])
    assert "note 0." not in page
    assert page.count("`note ") == MAX_NOTES


def test_an_image_that_was_changed_stops_no_review(feedback, tmp_path):
    feedback.add(jpeg(1), VERDICT, "fake")
    feedback.add(jpeg(2), VERDICT, "fake")
    (tmp_path / "feedback" / hash_image(jpeg(1)) / "image").write_bytes(b"words")
    page = describe_review(feedback, [])
    assert page.count("data:image/jpeg") == 1
    assert "`can't be shown: An image must be as it was sent." in page


def test_of_decisions_one_of_which_is_wrong_none_is_recorded(feedback):
    feedback.add(jpeg(1), VERDICT, "fake")
    known = ReviewDecision(sha256=hash_image(jpeg(1)), decision="fake")
    with pytest.raises(ConfigurationError, match="which 0 have"):
        apply_decisions(feedback, [known, ReviewDecision(sha256="0" * 8, decision="reject")], by="someone")
    with pytest.raises(ConfigurationError, match="`by` must say who decides"):
        apply_decisions(feedback, [known], by=" ")
    assert feedback.list_entries("unreviewed")


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_the_flow_shows_unreviewed_images_and_records_decisions(feedback):
    for seed in range(3):
        feedback.add(jpeg(seed), VERDICT, "fake", "a note")
    first, second = (hash_image(jpeg(seed)) for seed in range(2))
    assert feedback_flow(feedback.address) == f"0 decisions were recorded in {feedback.address}."
    assert read_page().count("data:image/jpeg") == 3
    decisions = [
        {"sha256": first, "decision": "fake", "why": "the ear"},
        {"sha256": second[:10], "decision": "reject"},
    ]
    assert feedback_flow(feedback.address, decisions, "someone").startswith("2 decisions were recorded")
    page = read_page()
    assert f"`{first[:12]}` is confirmed as fake" in page
    assert page.count("data:image/jpeg") == 1
    assert [one.sha256 for one in feedback.list_confirmed()] == [first]
    (decision,) = feedback.read(first).decisions
    assert (decision.by, decision.why) == ("someone", "the ear")
    feedback_flow(feedback.address, [{"sha256": first, "decision": "withdraw"}], "another")
    assert feedback.list_confirmed() == []


def read_page():
    with get_client(sync_client=True) as client:
        artifacts = [one for one in client.read_artifacts(limit=200) if one.key == "feedback"]
    return max(artifacts, key=lambda one: one.created).data
