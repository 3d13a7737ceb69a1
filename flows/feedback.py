"""What people decide about reports on wrong verdicts."""

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from deepfake_core.config import DEFAULT_FEEDBACK, ReviewDecision
from deepfake_core.feedback.reports import open_feedback
from tasks.feedback import decide, describe


@flow(name="feedback")
def feedback(address: str = DEFAULT_FEEDBACK, decisions: tuple[ReviewDecision, ...] = (), by: str = "") -> str:
    """Record decisions about images that were reported, and show those that nobody has reviewed yet.

    Args:
        address: Folder or URL that keeps the reports.
        decisions: What was decided. Without any, the images are only shown.
        by: Who decided; recorded with each decision.

    Returns:
        What was done, as a sentence.
    """
    opened = open_feedback(address)
    decided = decide(opened, decisions, by)
    page = describe(opened, decided)
    done = f"{len(decided)} decisions were recorded in {opened.address}."
    get_run_logger().info(done)
    create_markdown_artifact(page, key="feedback", description=done)
    return done
