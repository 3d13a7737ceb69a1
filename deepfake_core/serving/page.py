"""`deepfake serve`: a page on which a person drops an image or a clip and sees the verdict."""

import ctypes
import html
import logging
import os
import platform
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from deepfake_core.description import describe_rates
from deepfake_core.detector import Detector
from deepfake_core.errors import ConfigurationError, DeepfakeError, ModelError
from deepfake_core.feedback.reports import Feedback
from deepfake_core.registry import connection, detectors
from deepfake_core.serving.file_kinds import is_clip
from deepfake_core.serving.load_versions import find_shadow, load_version
from deepfake_core.serving.predictor import Predictor, load_detector
from deepfake_core.serving.uploads import keep_uploads
from deepfake_core.serving.verdict import Verdict
from deepfake_core.serving.video import judge_clip, plot_timeline
from deepfake_core.serving.wrong_verdict import Reporter, ShownVerdict, add_form, pick_verdict

if TYPE_CHECKING:
    from deepfake_core.monitoring.observer import Observer

log = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
MAX_UPLOAD_BYTES = 200_000_000

MAX_ALIAS_AGE_SECONDS = 5
"""How long the answer to which version is in production is used before it is asked again."""

MAX_CALLS_AT_ONCE = 4
"""How many uploads are judged at a time, so that a slow one holds no other up."""

MAX_HEAP_BLOCK_BYTES = 1_000_000
"""Larger blocks of memory, such as decoded images, are given back to the system when they are freed."""

MAX_SESSIONS = 500
"""Open pages and callers that Gradio remembers, 15 kB each; each POST without a session is a new one."""

LIMITS = (
    "JPEG, PNG or WebP of at most 100 MB, or a clip of at most 200 MB. A verdict is a probability, learned from the "
    "images that the model card names; it proves nothing about a person."
)


class ModelKeeper:
    """The model in use; where it is named by an alias, the version that has the alias now.

    Args:
        model: registry URI, or the folder of a pulled model.
        detect: look for faces.
        observer: of the verdicts on the page.
        shadow: let the version with the alias `challenger`, if there is one, run beside it.

    Raises:
        ModelError: if there is no such model.
        ServiceError: if MLflow can't be reached.
    """

    def __init__(self, model: str, detect: bool, observer: "Observer | None" = None, shadow: bool = False) -> None:
        self._model, self._detect, self._with_shadow, self.observer = model, detect, shadow, observer
        self._lock = threading.Lock()
        self._looked = -float(MAX_ALIAS_AGE_SECONDS)
        self._version = ""
        self._predictor: Predictor | None = None
        self.get()

    def get(self) -> tuple[Predictor, str]:
        """Return the predictor and the name of the version behind it."""
        with self._lock:
            if self._predictor is None or time.monotonic() - self._looked > MAX_ALIAS_AGE_SECONDS:
                try:
                    self._follow()
                except DeepfakeError as exc:
                    if self._predictor is None:
                        raise
                    log.warning("still serving %s: %s", self._version, exc)
                self._looked = time.monotonic()
            assert self._predictor
            return self._predictor, self._version

    def _follow(self) -> None:
        if not self._model.startswith("models:/"):
            if self._predictor is None:
                self._predictor, self._version = Predictor(load_detector(self._model), self._detect), self._model
            return
        connection.connect()  # fails within seconds; what follows would try for minutes, and the user would wait
        name, version = detectors.resolve(self._model)
        found = f"{name} version {version}"
        if found != self._version:
            self._predictor = Predictor(load_version(name, version), self._detect, f"{name}/{version}")
            self._version = found
            log.info("serving %s", found)
        if self._with_shadow and self._predictor:
            self._predictor = self._predictor.beside(find_shadow(name, self._predictor.shadow))


def judge_upload(keeper: ModelKeeper, file: Path) -> tuple[str, Image.Image | None, Any, ShownVerdict | None]:
    """Return the verdict as HTML, the picture that explains it, a clip's timeline, and what an image's report keeps."""
    predictor, version = keeper.get()
    timeline = shown = None
    if is_clip(file):
        judged = judge_clip(predictor, file, explain=predictor.detector.explains)
        if judged.timelines:
            timeline = plot_timeline(judged, predictor.detector.threshold, file.name)
    else:
        judged = next(predictor.judge([(file.name, file)], explain=predictor.detector.explains))
        if not judged.verdicts[0].unreadable:
            shown = judged.sha256, pick_verdict(judged.verdicts, version)
    if keeper.observer:
        keeper.observer.add(judged)
    return write_verdict(judged.verdicts, version, predictor.detector), judged.picture, timeline, shown


def write_verdict(verdicts: list[Verdict], version: str, detector: Detector) -> str:
    """Return what is said of an image or a clip as HTML: how many faces are judged fake, and how sure that is."""
    fakes = sum(verdict.label == "fake" for verdict in verdicts)
    unsure = sum(verdict.sure is False for verdict in verdicts)
    if verdicts[0].label is None:
        headline = f"No verdict: {verdicts[0].describe()}"
    elif len(verdicts) == 1:
        sure = {None: "", True: "", False: "Not sure: perhaps "}[verdicts[0].sure]
        headline = f"{sure}{verdicts[0].label}, P(fake) = {verdicts[0].fake_probability:.2f}"
        headline = headline[0].upper() + headline[1:]
    else:
        headline = f"{fakes or 'None'} of {len(verdicts)} faces {'is' if fakes == 1 else 'are'} judged fake"
        headline += f"; {unsure} of the verdicts {'is' if unsure == 1 else 'are'} not sure" if unsure else ""
    listed = [one for one in verdicts if len(verdicts) > 1 or one.clip or one.reason]
    lines = "".join(f"<li>{html.escape(one.describe())}</li>" for one in listed if one.label)
    answered = html.escape(
        f"Judged by {version}, which calls a face fake from {detector.threshold:.2f} up. "
        f"{describe_rates(detector.description, detector.threshold)}"
    )
    return f"<h2>{html.escape(headline)}</h2><ul>{lines}</ul><p>{answered}</p>"


def serve(
    model: str,
    detect: bool,
    port: int,
    feedback: Feedback | None = None,
    observer: "Observer | None" = None,
    shadow: bool = False,
) -> None:
    """Serve the page on loopback until interrupted.

    Args:
        feedback: keeps reports on wrong verdicts; None: the page takes none.

    Raises:
        ConfigurationError: if the port is taken.
        ModelError: if Gradio is not installed, or there is no such model.
        ServiceError: if MLflow can't be reached.
    """
    _give_memory_back()
    with keep_uploads():
        page = launch_page(ModelKeeper(model, detect, observer, shadow), port, feedback)
        print(f"http://{ADDRESS}:{port} - Ctrl+C ends it.", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        page.block_thread()


def _give_memory_back() -> None:
    """Fix the size from which glibc keeps a block outside its heaps; else it raises that, and the heaps only grow."""
    if platform.libc_ver()[0] == "glibc":
        m_mmap_threshold = -3  # mallopt(3)
        ctypes.CDLL(None).mallopt(m_mmap_threshold, MAX_HEAP_BLOCK_BYTES)


def launch_page(keeper: ModelKeeper, port: int, feedback: Feedback | None = None) -> Any:
    """Start the page's server and return the page."""
    page = build_page(keeper, feedback)
    try:
        page.launch(
            server_name=ADDRESS,
            server_port=port,
            max_file_size=MAX_UPLOAD_BYTES,
            share=False,
            quiet=True,
            footer_links=["api"],
            enable_monitoring=False,
            state_session_capacity=MAX_SESSIONS,
            prevent_thread_lock=True,
            app_kwargs={"middleware": [_guard(page, port)]},
        )
    except OSError as exc:
        raise ConfigurationError(f"--port must be free. Received: {port}, which is taken. Choose another.") from exc
    return page


def _guard(page: Any, port: int) -> Any:
    from starlette.middleware import Middleware

    from deepfake_core.serving.request_guard import RequestGuard

    form_bytes = 10_000  # around the file, in an upload's body
    functions = {number: str(function.api_name) for number, function in page.fns.items()}
    return Middleware(RequestGuard, port=port, max_upload_bytes=MAX_UPLOAD_BYTES + form_bytes, functions=functions)


def build_page(keeper: ModelKeeper, feedback: Feedback | None = None) -> Any:
    """Return the Gradio page.

    Raises:
        ModelError: if Gradio is not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gradio
    except ImportError as exc:
        raise ModelError("The page needs Gradio, which is not installed. Install deepfake-retraining[serve].") from exc

    def answer(path: str | None) -> tuple[str, Image.Image | None, Any, ShownVerdict | None]:
        text, picture, timeline, shown = judge_upload(keeper, Path(path)) if path else ("", None, None, None)
        return text, picture, gradio.update(value=timeline, visible=timeline is not None), shown

    with gradio.Blocks(title="Fake or real?", analytics_enabled=False) as page:
        gradio.Markdown(f"# Fake or real?\n{LIMITS}")
        with gradio.Row():
            upload = gradio.File(label="Image or clip", type="filepath")  # of any name: its content decides
            verdict = gradio.HTML(label="Verdict")
        picture = gradio.Image(
            label="Heat map: where the model looked",
            format="png",
            interactive=False,
            buttons=["download", "fullscreen"],
        )
        timeline = gradio.Plot(label="Over time", visible=False)
        shown = gradio.State()
        judged = upload.change(
            answer, upload, [verdict, picture, timeline, shown], api_name="judge", concurrency_limit=MAX_CALLS_AT_ONCE
        )
        if feedback:
            add_form(Reporter(feedback, keeper.get), upload, shown, judged)
    return page.queue(api_open=False)  # else a request to /run or /api would skip the queue and its limits
