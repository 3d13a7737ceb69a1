"""From a verdict that is said to be wrong to a report, and the part of the page that sends it."""

import hashlib
import html
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepfake_core.config import CLASS_NAMES
from deepfake_core.detector import UnreadableImageError
from deepfake_core.errors import DeepfakeError, TransientError
from deepfake_core.feedback.records import MAX_NAME_CHARACTERS, MAX_TEXT_CHARACTERS, GivenVerdict
from deepfake_core.feedback.reports import Feedback
from deepfake_core.serving.predictor import Predictor, read_image
from deepfake_core.serving.verdict import Verdict

MAX_REPORTS_AN_HOUR = 60
"""From one process of the page."""

WHAT_IS_KEPT = (
    "If you send it, this image is kept, with the verdict, your label, your note and the time. Nothing about you is "
    "kept. Whoever runs this page looks at the image and decides; only then may a model learn from it. To have it "
    "deleted, give them the code that you get: `deepfake feedback forget` removes all of it."
)

ShownVerdict = tuple[str, GivenVerdict]
"""The SHA-256 of an image, and the verdict on it that was shown."""


def pick_verdict(verdicts: Sequence[Verdict], version: str) -> GivenVerdict:
    """Return what is kept of an image's verdicts: that on the likeliest fake, and the number of faces."""
    verdict = max(verdicts, key=lambda one: one.fake_probability or 0.0)
    return GivenVerdict(
        label=verdict.label,
        probability=verdict.fake_probability,
        sure=verdict.sure,
        version=version[:MAX_NAME_CHARACTERS],
        box=verdict.box,
        faces=sum(one.face is not None for one in verdicts),
    )


class Reporter:
    """Keeps what a page sends, at most so many reports an hour.

    Args:
        get: returns the predictor and the name of the version behind it.
    """

    def __init__(self, feedback: Feedback, get: Callable[[], tuple[Predictor, str]]) -> None:
        self._feedback, self._get = feedback, get
        self._sent: deque[float] = deque(maxlen=MAX_REPORTS_AN_HOUR)
        self._reporting = threading.Lock()  # what is kept counts before the next is let in

    def report(self, file: Path, label: str, note: str, shown: ShownVerdict | None) -> str:
        """Keep a report, one at a time; return what to answer.

        Args:
            shown: the verdict that was on the page; one on another image doesn't count, and the image is judged again.

        Raises:
            UnreadableImageError, DeepfakeError: why it is not kept.
        """
        with self._reporting:
            return self._report(file, label, note, shown)

    def _report(self, file: Path, label: str, note: str, shown: ShownVerdict | None) -> str:
        if len(self._sent) == MAX_REPORTS_AN_HOUR and time.monotonic() - self._sent[0] < 3600:
            raise TransientError(
                f"This page keeps {MAX_REPORTS_AN_HOUR} reports an hour. Received: one more. Nothing was kept; send it "
                "again later."
            )
        image = read_image(file)
        if shown is None or shown[0] != hashlib.sha256(image).hexdigest():
            predictor, version = self._get()
            (judged,) = predictor.judge([(file.name, image)])
            shown = judged.sha256, pick_verdict(judged.verdicts, version)
        entry = self._feedback.add(image, shown[1], label, note)
        self._sent.append(time.monotonic())
        if not entry.size:
            return f"A person has looked at {entry.sha256} before and rejected it. Nothing was kept."
        return f"Thank you. A person will look at it. Its code is {entry.sha256}"


def add_form(reporter: Reporter, upload: Any, shown: Any, judged: Any) -> None:
    """Add the form to the page that is being built; it is there, and empty, once there is a verdict on an image.

    Args:
        upload: the component of the image.
        shown: the state that holds the verdict on it.
        judged: the event that a verdict is there.
    """
    import gradio

    def send(path: str | None, label: str | None, note: str | None, shown: ShownVerdict | None) -> str:
        if not path or not label:
            raise gradio.Error("Choose an image, and what it is.", print_exception=False)
        try:
            return reporter.report(Path(path), label, note or "", shown)
        except FileNotFoundError as exc:
            raise gradio.Error("The upload was removed by now. Drop the image again.", print_exception=False) from exc
        except (UnreadableImageError, DeepfakeError) as exc:
            raise gradio.Error(html.escape(f"{exc}"), print_exception=False) from exc

    def reset(shown: ShownVerdict | None) -> tuple[Any, None, str, str]:
        return gradio.update(visible=shown is not None, open=False), None, "", ""

    with gradio.Accordion("This is wrong", open=False, visible=False) as form:
        gradio.Markdown(WHAT_IS_KEPT)
        label = gradio.Radio(CLASS_NAMES, label="What is it?")
        note = gradio.Textbox(label="How do you know? (optional)", max_length=MAX_TEXT_CHARACTERS)
        answer = gradio.Markdown()
        gradio.Button("Send").click(send, [upload, label, note, shown], answer, api_name="report")
    judged.then(reset, shown, [form, label, note, answer], api_visibility="private")
