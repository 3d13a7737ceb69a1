"""From encoded images to verdicts, with numpy, Pillow and ONNX Runtime alone.

This file, `decoding`, `image_header`, `description` and `input_gate` are also copied into every registered model, so
they import nothing else of the project.
Training and serving share `decode_image` and `resize_image`: what was trained is what is served.
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from .decoding import MAX_BYTES as MAX_BYTES
from .decoding import MAX_PIXELS as MAX_PIXELS
from .decoding import UnreadableImageError as UnreadableImageError
from .decoding import decode_image as decode_image
from .decoding import open_image as open_image
from .description import CLASS_NAMES as CLASS_NAMES
from .description import DESCRIPTION as DESCRIPTION
from .description import InvalidModelError as InvalidModelError
from .description import read_description, require
from .input_gate import ImageQuality, find_reason, read_jpeg_quality

HIGHEST_SCORE = np.nextafter(np.float32(1), np.float32(0))
"""Of an image: below 1, so that a threshold of 1 calls none fake."""

BATCH_SIZE = 8
"""Images scored at a time: larger batches take longer on CPUs, and more memory."""


def resize_image(image: Image.Image, size: int) -> np.ndarray:
    """Resize to a square, antialiased, ignoring the aspect ratio.

    Returns:
        uint8 array of shape (size, size, 3), 0 to 255.
    """
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8)


def apply_temperature(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Divide the scores' logits by a temperature, which keeps their order.

    To do so to scores at temperature 1 is the same as to do so to what the network said.

    Args:
        scores: float array of shape (n,), 0 to 1.

    Returns:
        float32 array of shape (n,), from 0 to `HIGHEST_SCORE`.
    """
    scores = np.minimum(np.asarray(scores, np.float32), HIGHEST_SCORE)
    if temperature == 1:
        return scores
    probability = np.maximum(scores.astype(np.float64), 1e-9)
    logits = np.log(probability) - np.log1p(-probability)
    return np.minimum((1 / (1 + np.exp(-logits / temperature))).astype(np.float32), HIGHEST_SCORE)


def call_fake(scores: ArrayLike, threshold: float) -> np.ndarray:
    """Return which scores are called fake: those at or above the threshold.

    Verdicts, figures and reports all compare here. numpy would round the threshold to the scores' float32, and call
    a score just below it fake.

    Args:
        scores: a float, or float array of any shape: P(fake).

    Returns:
        bool array of the same shape.
    """
    return np.asarray(scores, np.float64) >= threshold


@dataclass(frozen=True)
class Judgement:
    """What a P(fake) means.

    Attributes:
        label: `real` or `fake`.
        sure: whether the detector's bounds hold for the label, and the image is like those that they were fitted on;
            None if the detector has no bounds, as those of former versions.
        reason: why it is not sure; None where it is.
    """

    label: str
    sure: bool | None
    reason: str | None


@dataclass(frozen=True)
class Prediction:
    """What the detector says of one image; all but the threshold are None where `error` says why."""

    label: str | None
    fake_probability: float | None
    threshold: float
    sure: bool | None = None
    reason: str | None = None
    error: str | None = None


class Detector:
    """A trained model with everything that gives its scores a meaning.

    Args:
        folder: a folder with `model.onnx` and `detector.json`, as a registered version holds them.
        threads: that score; 0 for a thread per core.

    Raises:
        InvalidModelError: if `detector.json` is out of range, or does not describe the network.
    """

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read on import, wherever this file is copied to
        import onnxruntime

        folder = Path(folder)
        self.description = read_description(folder / DESCRIPTION)
        self.image_size: int = self.description["image_size"]
        self.threshold = float(self.description["threshold"])
        self.temperature = float(self.description["temperature"])
        self.size = (folder / "model.onnx").stat().st_size
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shape = [self.image_size, self.image_size, 3]
        require(
            [(one.type, one.shape[1:]) for one in inputs] == [("tensor(float)", shape)],
            f"model.onnx must take float images of the size that {DESCRIPTION} says, (n, {', '.join(map(str, shape))})",
            [(one.type, one.shape) for one in inputs],
        )
        require(
            1 <= len(outputs) <= 2
            and all(one.type == "tensor(float)" for one in outputs)
            and outputs[0].shape[1:] == [1]
            and all(len(one.shape) == 3 for one in outputs[1:]),
            "model.onnx must give P(fake), (n, 1), and may give heat maps, (n, height, width), as floats",
            [(one.type, one.shape) for one in outputs],
        )
        self._input = inputs[0].name
        self._scores, *self._heat = (output.name for output in outputs)

    def at(self, threshold: float) -> "Detector":
        """Return the same detector with another threshold.

        Raises:
            ValueError: if it is not from 0 to 1.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be a number from 0 to 1. Received: {threshold}")
        other = copy.copy(self)
        other.threshold = threshold
        return other

    @property
    def explains(self) -> bool:
        """Whether the model carries heat maps; those that were exported before there were any don't."""
        return bool(self._heat)

    def score(self, images: np.ndarray) -> np.ndarray:
        """Return P(fake) per image.

        Args:
            images: uint8 array (or memory map) of shape (n, image_size, image_size, 3).

        Returns:
            float32 array of shape (n,), from 0 to `HIGHEST_SCORE`.
        """
        scores = np.zeros(len(images), np.float32)
        for start in range(0, len(images), BATCH_SIZE):
            batch = images[start : start + BATCH_SIZE].astype(np.float32)
            scores[start : start + BATCH_SIZE] = self._session.run([self._scores], {self._input: batch})[0][:, 0]
        return apply_temperature(scores, self.temperature)

    def explain(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return P(fake) per image, and a heat map of the evidence for the verdict: Grad-CAM (Selvaraju et al. 2017).

        Args:
            images: uint8 array of shape (n, image_size, image_size, 3).

        Returns:
            float32 arrays of shape (n,), 0 to 1, and (n, height, width), 0 to 1 per image; all 0 where there is no
            evidence for the verdict.
        """
        scores, heat = np.zeros(len(images), np.float32), []
        for start in range(0, len(images), BATCH_SIZE):
            batch = images[start : start + BATCH_SIZE].astype(np.float32)
            found, signed = self._session.run([self._scores, *self._heat], {self._input: batch})
            scores[start : start + BATCH_SIZE] = apply_temperature(found[:, 0], self.temperature)
            fake = call_fake(scores[start : start + BATCH_SIZE], self.threshold)
            heat.append(np.maximum(signed * np.where(fake, 1, -1).astype(np.float32)[:, None, None], 0))
        maps = np.concatenate(heat)
        return scores, maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-12)

    def label(self, score: float) -> str:
        """Return the class of a P(fake)."""
        return CLASS_NAMES[int(call_fake(score, self.threshold))]

    def judge(
        self, score: float, quality: ImageQuality | None = None, low: float | None = None, high: float | None = None
    ) -> Judgement:
        """Return what a P(fake) means.

        Args:
            quality: of what was scored; None leaves the limits out.
            low: the lowest P(fake) that must be beyond the bound too, for a clip; likewise `high`, the highest.
        """
        label, bounds = self.label(score), self.description.get("bounds")
        if bounds is None:
            return Judgement(label, None, None)
        reason = find_reason(quality, self.description["limits"]) if quality else None
        lower, upper = bounds["lower"], bounds["upper"]
        least, most = score if low is None else low, score if high is None else high
        if reason is None and not (least > upper if label == "fake" else most < lower):
            reason = f"P(fake) must be {f'above {upper:.2f}' if label == 'fake' else f'below {lower:.2f}'} to be sure"
        return Judgement(label, reason is None, reason)

    def predict(self, images: Sequence[bytes]) -> list[Prediction]:
        """Judge encoded images; one that can't be read gets an `error` and doesn't affect the others."""
        predictions: list[Prediction] = []
        for start in range(0, len(images), BATCH_SIZE):
            predictions += self._predict_batch(images[start : start + BATCH_SIZE])
        return predictions

    def _predict_batch(self, images: Sequence[bytes]) -> list[Prediction]:
        pixels: list[np.ndarray] = []
        found: list[ImageQuality | str] = []
        for data in images:
            try:
                with open_image(data) as image:
                    pixels.append(resize_image(image, self.image_size))
                    found.append(ImageQuality.take(image, pixels[-1], read_jpeg_quality(image)))
            except UnreadableImageError as exc:
                found.append(str(exc))
        scores = iter(self.score(np.stack(pixels)) if pixels else ())
        return [
            Prediction(None, None, self.threshold, error=one)
            if isinstance(one, str)
            else self._predict(float(next(scores)), one)
            for one in found
        ]

    def _predict(self, score: float, quality: ImageQuality) -> Prediction:
        judged = self.judge(score, quality)
        return Prediction(judged.label, score, self.threshold, judged.sure, judged.reason)
