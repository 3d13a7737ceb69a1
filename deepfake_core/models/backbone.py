"""What the candidates that transfer learning share: a recipe, weights into a pretrained part, a head behind it."""

from pathlib import Path

import keras
from keras import layers

from deepfake_core.config import AugmentationParameters, Recipe
from deepfake_core.errors import ModelError

FINE_TUNING = Recipe(
    image_size=256,
    batch_size=16,
    epochs=14,
    patience=14,
    weights="imagenet",
    head_epochs=1,
    learning_rate=0.0001,
    schedule="cosine",
    warmup_epochs=1,
    weight_decay=0.0001,
    augmentation=AugmentationParameters(rotation=0, zoom=0),
)
"""At native size and without resampling, since a generator's traces are fine; slowly, since the pretrained kernels are
small."""


def attach_head(name: str, backbone: keras.Model, preprocessing: layers.Layer) -> keras.Model:
    """Return preprocessing, backbone, and one sigmoid on its pooled features.

    The backbone's batch normalisation keeps its pretrained statistics, while its scales and offsets are trained:
    batches of 32 faces would shift the statistics faster than a few epochs of fine-tuning can follow.
    """
    image = keras.Input(backbone.input_shape[1:], name="image")
    x = backbone(preprocessing(image), training=False)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(0.2)(x)
    x = layers.Dense(1, activation="sigmoid", dtype="float32", name="fake_probability")(x)
    return keras.Model(image, x, name=name)


def load_backbone(backbone: keras.Model, weights: str) -> None:
    """Load weights that Keras saved from the same backbone (`backbone.save_weights("faces.weights.h5")`).

    Raises:
        ModelError: if the file is missing or does not fit.
    """
    rule = f"`training.weights` must be imagenet, none or a .weights.h5 file of this backbone. Received: {weights}"
    if not (weights.endswith(".weights.h5") and Path(weights).is_file()):
        raise ModelError(f"{rule}, which is no such file.")
    try:
        backbone.load_weights(weights)
    except (ValueError, OSError, KeyError) as exc:
        raise ModelError(f"{rule}, which does not fit: {exc}") from exc
