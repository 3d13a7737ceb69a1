"""The reference of a version: the observations of its test split, taken as users' images are."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from deepfake_core.detector import Detector
from deepfake_core.monitoring.observations import OBSERVATION_SCHEMA, list_rows
from deepfake_core.serving.predictor import Encoded, Predictor

MAX_REFERENCE_IMAGES = 2000
"""Test images that are judged for the reference, at most: more make drift no easier to see."""


def observe_images(detector: Detector, files: Sequence[Any], read: Callable[[Any], Encoded] = Path) -> pyarrow.Table:
    """Judge images twice, with faces looked for and as they are, and return the observations by `OBSERVATION_SCHEMA`.

    What is observed of a face that was cut out of an image is not comparable with what is of a whole one.

    Args:
        read: returns an image by its path.
    """
    chosen = np.sort(np.random.default_rng(0).permutation(len(files))[:MAX_REFERENCE_IMAGES])
    predictors = [Predictor(detector, detect) for detect in (True, False)]
    judged = (
        one
        for predictor in predictors
        for one in predictor.judge((str(position), read(files[position])) for position in chosen)
    )
    return pyarrow.Table.from_pylist([row for one in judged for row in list_rows(one)], OBSERVATION_SCHEMA)
