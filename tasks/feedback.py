"""Reports on wrong verdicts."""

from collections.abc import Sequence

from prefect import task

from deepfake_core.config import ReviewDecision
from deepfake_core.feedback import review
from deepfake_core.feedback.records import FeedbackEntry
from deepfake_core.feedback.reports import Feedback
from tasks.options import NETWORK, ONCE


@task(name="record decisions", **ONCE)
def decide(feedback: Feedback, decisions: Sequence[ReviewDecision], by: str) -> list[FeedbackEntry]:
    """Record what people decided about reported images: all of it, or nothing if an image was not reported."""
    return review.apply_decisions(feedback, decisions, by)


@task(name="show unreviewed images", **NETWORK)
def describe(feedback: Feedback, decided: Sequence[FeedbackEntry]) -> str:
    """Return as Markdown what was decided, and the unreviewed images."""
    return review.describe_review(feedback, decided)
