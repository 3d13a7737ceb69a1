"""Which head learns which fakes: each source's are one kind, since those of different makers have little in common.

A head learns its own kind against all real images. Fakes of the others say nothing about it, and are not asked of it.
"""

from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import ops

from deepfake_core.config import CLASS_NAMES
from deepfake_core.data.images import Images

MIN_FAKES_OF_KIND = 100
"""Training fakes from which on a source has a head of its own."""

OTHER = -1
"""In place of a label: a fake of which no one head is asked, but whether any is right."""

TINY = 1e-7


def choose_kinds(train: Images) -> tuple[str, ...]:
    """Return the sources whose fakes get a head each; none where there would be one head only."""
    fakes = train.rows.loc[train.labels == CLASS_NAMES.index("fake"), "source"].value_counts()
    kinds = tuple(sorted(fakes.index[fakes >= MIN_FAKES_OF_KIND]))
    return kinds if len(kinds) > 1 else ()


def number_kinds(images: Images, kinds: tuple[str, ...]) -> Images:
    """Return images with other labels: 0 for real, the head's number, from 1, for fakes of a kind, or `OTHER`."""
    numbers = images.rows["source"].map({kind: number for number, kind in enumerate(kinds, 1)}).fillna(OTHER)
    return replace(images, labels=(images.labels * numbers.to_numpy(np.int8)).astype(np.int8))


def measure_kinds(labels: Any, scores: Any) -> tuple[Any, Any]:
    """Return the loss of each image, and whether P(fake) is on the right side of 0.5, as 0 or 1.

    The loss is the binary cross-entropy, summed over the heads that are asked. Of a real image, and of an `OTHER` fake,
    that is the cross-entropy of P(fake) itself.

    Args:
        labels: float32 of shape (n,), as `number_kinds` numbers them.
        scores: float32 of shape (n, kinds), 0 to 1.

    Returns:
        Two of shape (n,), float32.
    """
    labels, scores = ops.reshape(labels, (-1,)), ops.clip(scores, TINY, 1 - TINY)
    log_none = ops.sum(ops.log(1 - scores), axis=-1)
    own = ops.cast(ops.equal(labels[:, None], np.arange(1, scores.shape[-1] + 1, dtype=np.float32)), "float32")
    log_own = ops.sum(own * ops.log(scores), axis=-1)
    log_any = ops.log(ops.maximum(-ops.expm1(log_none), TINY))
    losses = -ops.where(labels == 0, log_none, ops.where(labels > 0, log_own, log_any))
    right = ops.cast(ops.equal(log_none < np.log(0.5), labels != 0), "float32")
    return losses, right


def compile_kinds() -> dict[str, Any]:
    """Return what `keras.Model.compile` takes for a network with several heads."""
    accuracy = keras.metrics.MeanMetricWrapper(lambda labels, scores: measure_kinds(labels, scores)[1], name="accuracy")
    return {"loss": lambda labels, scores: measure_kinds(labels, scores)[0], "metrics": [accuracy]}
