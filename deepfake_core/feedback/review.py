"""What a person sees of unreviewed images, and what becomes of their decisions."""

import base64
import io
from collections.abc import Sequence

from deepfake_core.config import ReviewDecision
from deepfake_core.decoding import UnreadableImageError, open_image
from deepfake_core.errors import ArchiveError, ConfigurationError
from deepfake_core.feedback.records import FeedbackEntry
from deepfake_core.feedback.reports import Feedback

MAX_SHOWN = 20
"""Images on one page."""

MAX_NOTES = 10
"""Of an image: its newest."""

THUMBNAIL_PIXELS = 160


def apply_decisions(feedback: Feedback, decisions: Sequence[ReviewDecision], by: str) -> list[FeedbackEntry]:
    """Record decisions; none, if one of them names no reported image. Return what is kept of their images now.

    Raises:
        ConfigurationError: if nobody is named, or an image that nobody reported.
        ArchiveError: if an image that is confirmed is gone, or not as it was sent.
    """
    if decisions and not by.strip():
        raise ConfigurationError("`by` must say who decides. Received: nothing.")
    found = [feedback.read(one.sha256).sha256 for one in decisions]
    return [_decide(feedback, sha256, one, by) for sha256, one in zip(found, decisions, strict=True)]


def _decide(feedback: Feedback, sha256: str, decision: ReviewDecision, by: str) -> FeedbackEntry:
    match decision.decision:
        case "reject":
            return feedback.reject(sha256, by, decision.why)
        case "withdraw":
            return feedback.withdraw(sha256, by, decision.why)
        case label:
            return feedback.confirm(sha256, label, by, decision.why)


def describe_review(feedback: Feedback, decided: Sequence[FeedbackEntry]) -> str:
    """Return as Markdown what was decided, and the unreviewed images that were reported first, with what was said.

    Texts of senders are shown as text: nothing in them is Markdown, HTML or a link.
    """
    waiting = sorted(feedback.list_entries("unreviewed"), key=lambda entry: entry.first_time)
    lines = [f"- `{one.sha256[:12]}` is {one.status}{f' as {one.label}' if one.label else ''}" for one in decided]
    shown = f" The {MAX_SHOWN} that were reported first are below." if len(waiting) > MAX_SHOWN else ""
    lines += ["", f"Unreviewed images in {_quote(feedback.address)}: {len(waiting)}.{shown}"]
    for entry in waiting[:MAX_SHOWN]:
        said = [one.note for one in entry.reports if one.note][-MAX_NOTES:]
        verdict = f"The verdict was {_quote(entry.reports[-1].verdict.describe())}." if entry.reports else ""
        lines += ["", f"### {entry.sha256[:12]}", "", _draw(feedback, entry), ""]
        lines += [f"Reported as {' and '.join(entry.claimed) or 'nothing'}, {entry.counted}. {verdict}", ""]
        lines += [f"- {_quote(text)}" for text in (*said, *entry.problems[-MAX_NOTES:])]
    return "\n".join(lines)


def _draw(feedback: Feedback, entry: FeedbackEntry) -> str:
    try:
        with open_image(feedback.read_image(entry.sha256)) as image:
            image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    except (ArchiveError, UnreadableImageError) as exc:
        return _quote(f"can't be shown: {exc}")
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=80)
    return f"![{entry.sha256[:12]}](data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()})"


def _quote(text: str) -> str:
    """Return text as code, in which neither Markdown nor HTML counts; Prefect's page shows entities as they are."""
    return f"`{text.replace('`', chr(39))}`"
