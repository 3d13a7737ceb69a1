"""A version that judges beside the one in use: what it says is observed, and never shown."""

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from deepfake_core.detector import Detector, resize_image

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOADS = 60.0
"""How long a version that could not be loaded is left alone: each attempt may hold a verdict up."""


class Shadow:
    """A version that scores what the one in use scores. Once it has failed it is silent, and verdicts go on.

    Args:
        version: its name, as name/number.
        detector: None if it could not be loaded; after `loads_again`, on the clock `time.monotonic`, it may be.
    """

    def __init__(self, version: str, detector: Detector | None) -> None:
        self.version, self._detector = version, detector
        self.loads_again = math.inf if detector else time.monotonic() + SECONDS_BETWEEN_LOADS

    def resize(self, part: Image.Image) -> np.ndarray | None:
        """Return a part of an image as its network takes it; None if it is silent."""
        detector = self._detector  # once: another thread's `score` may fail meanwhile
        return resize_image(part, detector.image_size) if detector else None

    def score(self, crops: Sequence[np.ndarray | None]) -> list[dict[str, Any]]:
        """Return what `Observed` says of the shadow, for each crop; nothing if it is silent."""
        nothing: list[dict[str, Any]] = [{} for _ in crops]
        detector, pixels = self._detector, [crop for crop in crops if crop is not None]
        if detector is None or not pixels or len(pixels) < len(crops):
            return nothing
        try:
            scores = detector.score(np.stack(pixels)).tolist()
        except Exception:
            log.exception("%s, beside the version in use, failed and is left out: verdicts go on", self.version)
            self._detector = None
            return nothing
        fakes = [detector.label(score) == "fake" for score in scores]
        return [
            {"shadow_version": self.version, "shadow_probability": score, "shadow_fake": fake}
            for score, fake in zip(scores, fakes, strict=True)
        ]
