"""From images as they come to verdicts, a row per face: decoded and searched side by side, scored in batches."""

import copy
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepfake_core.detector import (
    BATCH_SIZE,
    MAX_BYTES,
    Detector,
    InvalidModelError,
    UnreadableImageError,
    open_image,
    resize_image,
)
from deepfake_core.errors import ModelError
from deepfake_core.input_gate import ImageQuality, read_jpeg_quality
from deepfake_core.serving.explained import draw_heat, shrink
from deepfake_core.serving.faces import Box, fit_crop, load_face_finder
from deepfake_core.serving.shadow import Shadow
from deepfake_core.serving.verdict import Judged, Observed, Verdict

NO_FACE = "no face was found; --no-detect judges the whole image"
MAX_QUEUED_IMAGES = 2 * BATCH_SIZE
"""How many images may wait to be scored, which bounds the memory."""

MAX_DECODING_THREADS = 4

Encoded = Path | bytes


@dataclass(frozen=True)
class Crop:
    """A part of an image that is judged.

    Attributes:
        box: where it is, in pixels of the upright image.
        pixels: uint8 array of shape (image_size, image_size, 3), as the network takes it.
        shadow: likewise, as the network beside it takes it; None if there is none.
    """

    box: Box
    pixels: np.ndarray
    quality: ImageQuality
    shadow: np.ndarray | None = None


@dataclass(frozen=True)
class _Prepared:
    name: str
    crops: list[Crop] = field(default_factory=list)
    error: str | None = None
    unreadable: bool = False
    width: int = 0
    height: int = 0
    sha256: str = ""
    preview: Image.Image | None = None
    """The image, scaled down; None where no picture was asked for."""


def load_detector(folder: str | Path, threads: int = 0) -> Detector:
    """Load a pulled model, to score in so many threads; 0 for a thread per core.

    Raises:
        ModelError: if it lacks a file, or one is damaged or out of range.
    """
    try:
        return Detector(folder, threads)
    except InvalidModelError as exc:
        raise ModelError(str(exc)) from exc
    except Exception as exc:
        raise ModelError(
            "A model's folder must hold model.onnx and detector.json as `deepfake pull` writes them. Received: "
            f"{folder}, which can't be loaded ({type(exc).__name__}: {exc}). Pull it again."
        ) from exc


class Predictor:
    """A detector for images as they come.

    Args:
        detect: look for faces; False judges each image as a whole.
        version: the detector's, as name/number; empty for a model from a folder.
        shadow: scores the faces of images too.
    """

    def __init__(
        self, detector: Detector, detect: bool = True, version: str = "", shadow: Shadow | None = None
    ) -> None:
        self.detector, self.version, self.shadow = detector, version, shadow
        self._find: Callable[[Image.Image], list[Box]] | None = load_face_finder() if detect else None
        self._finding = threading.Lock()  # its threads share the cores: two searches at once only slow each other down

    def beside(self, shadow: Shadow | None) -> "Predictor":
        """Return the same with another shadow; what is being judged keeps its own."""
        if shadow is self.shadow:
            return self
        other = copy.copy(self)
        other.shadow = shadow
        return other

    @property
    def detects(self) -> bool:
        return self._find is not None

    def judge(self, images: Iterable[tuple[str, Encoded]], explain: bool = False) -> Iterator[Judged]:
        """Judge named images in order, in bounded memory; one that can't be read doesn't affect the others.

        Args:
            explain: draw pictures, for which the model must carry heat maps.
        """
        batch: list[_Prepared] = []
        for prepared in self._prepare_ahead(images, explain):
            batch.append(prepared)
            if sum(len(one.crops) for one in batch) >= BATCH_SIZE or len(batch) >= MAX_QUEUED_IMAGES:
                yield from self._score(batch)
                batch = []
        yield from self._score(batch)

    def _prepare_ahead(self, images: Iterable[tuple[str, Encoded]], explain: bool) -> Iterator[_Prepared]:
        pool = ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_DECODING_THREADS), thread_name_prefix="decode")
        waiting: deque[Future[_Prepared]] = deque()
        try:
            for name, image in images:
                waiting.append(pool.submit(self._prepare, name, image, explain))
                if len(waiting) >= MAX_QUEUED_IMAGES:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def cut_faces(self, image: Image.Image) -> list[Crop]:
        """Return what is to be judged of an image: around each face, largest first, or all of it without detection."""
        whole = Box(0, 0, *image.size)
        boxes = [whole]
        if self._find:
            with self._finding:
                faces = self._find(image)
            boxes = [fit_crop(face, *image.size) for face in faces]
        quality = read_jpeg_quality(image)
        crops = []
        for box in boxes:
            part = image if box == whole else image.crop((box.left, box.top, box.right, box.bottom))
            pixels = resize_image(part, self.detector.image_size)
            shadow = self.shadow.resize(part) if self.shadow else None
            crops.append(Crop(box, pixels, ImageQuality.take(part, pixels, quality), shadow))
        return crops

    def _prepare(self, name: str, image: Encoded, explain: bool) -> _Prepared:
        sha256 = ""
        try:
            data = read_image(image)
            sha256 = hashlib.sha256(data).hexdigest()
            with open_image(data) as decoded:
                return _Prepared(
                    name,
                    self.cut_faces(decoded),
                    width=decoded.width,
                    height=decoded.height,
                    sha256=sha256,
                    preview=shrink(decoded) if explain else None,
                )
        except UnreadableImageError as exc:
            return _Prepared(name, error=str(exc), unreadable=True, sha256=sha256)
        except OSError as exc:
            return _Prepared(name, error=f"can't be read ({exc.strerror})", unreadable=True)

    def _score(self, batch: list[_Prepared]) -> Iterator[Judged]:
        crops = [crop.pixels for one in batch for crop in one.crops]
        explain = any(one.preview for one in batch)
        heat = None
        if not crops:
            scores = np.zeros(0, np.float32)
        elif explain:
            scores, heat = self.detector.explain(np.stack(crops))
        else:
            scores = self.detector.score(np.stack(crops))
        beside = [crop.shadow for one in batch for crop in one.crops]
        shadows = self.shadow.score(beside) if self.shadow else [{} for _ in beside]
        start = 0
        for one in batch:
            mine = slice(start, start + len(one.crops))
            start = mine.stop
            verdicts = [
                self._judge(one, face if self.detects else None, crop, float(score), shadow)
                for face, (crop, score, shadow) in enumerate(
                    zip(one.crops, scores[mine], shadows[mine], strict=True), 1
                )
            ]
            if not verdicts:
                error = one.error or NO_FACE
                verdicts = [
                    Verdict.refuse(one.name, self.detector.threshold, error, unreadable=one.unreadable),
                ]
            picture = None
            if one.preview:
                scale = one.preview.width / one.width
                boxes = [crop.box.scale(scale) for crop in one.crops]
                fakes = [verdict.label == "fake" for verdict in verdicts if verdict.box]
                lines = [verdict.describe() for verdict in verdicts]
                picture = draw_heat(one.preview, boxes, [] if heat is None else list(heat[mine]), fakes, lines)
            yield Judged(one.name, verdicts, picture, one.sha256)

    def _judge(self, one: _Prepared, face: int | None, crop: Crop, score: float, shadow: Mapping[str, Any]) -> Verdict:
        judged = self.detector.judge(score, crop.quality)
        return Verdict(
            image=one.name,
            face=face,
            box=crop.box.corners,
            label=judged.label,
            fake_probability=score,
            threshold=self.detector.threshold,
            sure=judged.sure,
            reason=judged.reason,
            observed=Observed(crop.quality, self.version, one.width, one.height, **shadow),
        )


def read_image(image: Encoded) -> bytes:
    """Return an image's bytes.

    Raises:
        UnreadableImageError: if there are more than `MAX_BYTES`.
    """
    if isinstance(image, bytes):
        data = image
    else:
        with image.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UnreadableImageError("too_large", f"may hold {MAX_BYTES:,} bytes at most")
    return data
