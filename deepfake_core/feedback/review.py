"""What a person sees of unreviewed images, and what becomes of their decisions."""

import base64
import io
from collections.abc import Sequence

from deepfake_core.config import ReviewDecision
from deepfake_core.decoding import UnreadableImageError, open_image
from deepfake_core.errors import ArchiveError, ConfigurationError
from deepfake_core.feedback.records import Entry
from deepfake_core.feedback.reports import Feedback

MAX_SHOWN = 20
"""Images on one page."""

THUMBNAIL_PIXELS = 160


def apply_decisions(feedback: Feedback, decisions: Sequence[ReviewDecision], by: str) -> list[Entry]:
    """Record decisions; none, if one of them names no reported image. Return what is kept of their images now.

    Raises:
        ConfigurationError: if nobody is named, or an image that nobody reported.
        ArchiveError: if an image that is confirmed is gone, or not as it was sent.
    """
    if decisions and not by.strip():
        raise ConfigurationError("`by` must say who decides. Received: nothing.")
    found = [feedback.read(one.sha256).sha256 for one in decisions]
    return [_decide(feedback, sha256, one, by) for sha256, one in zip(found, decisions, strict=True)]


def _decide(feedback: Feedback, sha256: str, decision: ReviewDecision, by: str) -> Entry:
    match decision.decision:
        case "reject":
            return feedback.reject(sha256, by, decision.why)
        case "withdraw":
            return feedback.withdraw(sha256, by, decision.why)
        case label:
            return feedback.confirm(sha256, label, by, decision.why)


def describe_review(feedback: Feedback, decided: Sequence[Entry]) -> str:
    """Return as Markdown what was decided, and the oldest unreviewed images with what was said about them.

    Texts of senders are shown as text: nothing in them is Markdown, HTML or a link.
    """
    waiting = sorted(feedback.list_entries("unreviewed"), key=lambda entry: entry.first_time)
    lines = [f"- `{one.sha256[:12]}` is {one.status}{f' as {one.label}' if one.label else ''}" for one in decided]
    shown = f"; the {MAX_SHOWN} oldest are below" if len(waiting) > MAX_SHOWN else ""
    lines += ["", f"{len(waiting)} images are unreviewed in {_escape(feedback.address)}{shown}.", ""]
    if waiting:
        lines += ["| image | SHA-256 | reported as | verdict | notes |", "| --- | --- | --- | --- | --- |"]
    for entry in waiting[:MAX_SHOWN]:
        verdict = entry.reports[-1].verdict.describe() if entry.reports else ""
        notes = "<br>".join(_escape(text) for text in [*(one.note for one in entry.reports), *entry.problems] if text)
        claimed = " and ".join(entry.claimed)
        lines.append(
            f"| {_draw(feedback, entry)} | `{entry.sha256[:12]}` | {claimed}, {entry.count} times | "
            f"{_escape(verdict)} | {notes} |"
        )
    return "\n".join(lines)


def _draw(feedback: Feedback, entry: Entry) -> str:
    try:
        with open_image(feedback.read_image(entry.sha256)) as image:
            image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    except (ArchiveError, UnreadableImageError) as exc:
        return _escape(f"can't be shown: {exc}")
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=80)
    return f"![{entry.sha256[:12]}](data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()})"


def _escape(text: str) -> str:
    """Return text of which Markdown and HTML show every character as it is."""
    return "".join(one if one.isalnum() or one == " " else f"&#{ord(one)};" for one in text)
