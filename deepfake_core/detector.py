"""From encoded images to verdicts, with numpy, Pillow and ONNX Runtime alone.

This file is also copied into every registered model, so it imports nothing of the project.
Training and serving share `decode_image` and `resize_image`: what was trained is what is served.
"""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 100_000_000
"""Larger files are refused unread."""

MAX_PIXELS = 50_000_000
"""Larger images are refused from their header alone, before memory is spent on them (150 MB as RGB)."""

BATCH_SIZE = 64
DESCRIPTION = "detector.json"


class UnreadableImageError(ValueError):
    """An image that can't be used. `reason` is `not_an_image`, `too_large` or `truncated`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def decode_image(data: bytes) -> Image.Image:
    """Decode a JPEG, PNG or WebP to an upright RGB image, whose `format` says which it was.

    Raises:
        UnreadableImageError: if `data` is none of these, is truncated or damaged, or declares more
            than `MAX_PIXELS`.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise UnreadableImageError("not_an_image", "must be the bytes of an image, not a path, an address or nothing")
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError as exc:
        raise UnreadableImageError("not_an_image", "must be a JPEG, PNG or WebP image") from exc
    except Image.DecompressionBombError as exc:
        raise UnreadableImageError("too_large", str(exc)) from exc
    except Exception as exc:
        raise UnreadableImageError("truncated", f"the header is damaged ({exc})") from exc
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImageError("too_large", f"may hold {MAX_PIXELS:,} pixels at most. Received: {width} x {height}")
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):  # Pillow would clip its 65,536 greys to the lowest 256
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        converted = upright.convert("RGB")
    except Exception as exc:
        raise UnreadableImageError("truncated", f"is truncated or damaged ({exc})") from exc
    converted.format = image.format
    return converted


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

    Args:
        scores: float array of shape (n,), 0 to 1.

    Returns:
        float32 array of shape (n,), 0 to 1.
    """
    if temperature == 1:
        return np.asarray(scores, np.float32)
    probability = np.clip(np.asarray(scores, np.float64), 1e-9, 1 - 1e-9)
    logits = np.log(probability) - np.log1p(-probability)
    return (1 / (1 + np.exp(-logits / temperature))).astype(np.float32)


@dataclass(frozen=True)
class Prediction:
    """What the detector says of one image; the first two are None where `error` says why."""

    label: str | None
    fake_probability: float | None
    threshold: float
    error: str | None = None


class Detector:
    """A trained model with everything that gives its scores a meaning.

    Args:
        folder: a folder with `model.onnx` and `detector.json`, as a registered version holds them.
    """

    def __init__(self, folder: str | Path) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read on import, wherever this file is copied to
        import onnxruntime

        folder = Path(folder)
        self.description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
        self.image_size = int(self.description["image_size"])
        self.threshold = float(self.description["threshold"])
        self.temperature = float(self.description.get("temperature", 1.0))
        self.class_names: tuple[str, str] = tuple(self.description["class_names"])
        self.size = (folder / "model.onnx").stat().st_size
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        self._scores, *self._heat = (output.name for output in self._session.get_outputs())

    @property
    def explains(self) -> bool:
        """Whether the model carries heat maps; those that were exported before there were any don't."""
        return bool(self._heat)

    def score(self, images: np.ndarray) -> np.ndarray:
        """Return P(fake) per image.

        Args:
            images: uint8 array (or memory map) of shape (n, image_size, image_size, 3).

        Returns:
            float32 array of shape (n,), 0 to 1.
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
            fake = scores[start : start + BATCH_SIZE] >= self.threshold
            heat.append(np.maximum(signed * np.where(fake, 1, -1).astype(np.float32)[:, None, None], 0))
        maps = np.concatenate(heat)
        return scores, maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-12)

    def label(self, score: float) -> str:
        """Return the class of a P(fake)."""
        return self.class_names[int(score >= self.threshold)]

    def predict(self, images: Sequence[bytes]) -> list[Prediction]:
        """Judge encoded images; one that can't be read gets an `error` and doesn't affect the others."""
        predictions: list[Prediction] = []
        for start in range(0, len(images), BATCH_SIZE):
            predictions += self._predict_batch(images[start : start + BATCH_SIZE])
        return predictions

    def _predict_batch(self, images: Sequence[bytes]) -> list[Prediction]:
        pixels: list[np.ndarray] = []
        errors: list[str | None] = []
        for data in images:
            try:
                pixels.append(resize_image(decode_image(data), self.image_size))
                errors.append(None)
            except UnreadableImageError as exc:
                errors.append(str(exc))
        scores = iter(self.score(np.stack(pixels)) if pixels else ())
        return [self._judge(next(scores)) if error is None else self._refuse(error) for error in errors]

    def _judge(self, score: float) -> Prediction:
        return Prediction(self.label(score), float(score), self.threshold)

    def _refuse(self, error: str) -> Prediction:
        return Prediction(None, None, self.threshold, error)
