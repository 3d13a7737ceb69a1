"""What the candidates that transfer learning share: a recipe, weights into a pretrained part, a head behind it."""

from pathlib import Path
from typing import Any

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


@keras.saving.register_keras_serializable("deepfake_core")
class BatchNormalization(layers.BatchNormalization):
    """Keras's batch normalisation over the last axis, by TensorFlow's fused kernel where the backend is TensorFlow.

    Keras composes it of elementary operations, each a pass over the activations.
    """

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        if keras.backend.backend() != "tensorflow":
            return super().call(inputs, training=training, mask=mask)
        import tensorflow as tf

        learns = bool(training and self.trainable)
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs,
            self.gamma,
            self.beta,
            mean=None if learns else self.moving_mean,
            variance=None if learns else self.moving_variance,
            epsilon=self.epsilon,
            is_training=learns,
        )
        if learns:
            for moving, seen in ((self.moving_mean, mean), (self.moving_variance, variance)):
                moving.assign(self.momentum * moving + (1 - self.momentum) * seen)
        return outputs


def attach_head(
    name: str, backbone: keras.Model, preprocessing: layers.Layer, training: bool | None = None
) -> keras.Model:
    """Return preprocessing, backbone, and one sigmoid on its pooled features.

    Args:
        training: False keeps the pretrained statistics of the backbone's batch normalisation while its scales and
            offsets are trained; None trains it by the statistics of each batch, once the backbone is trained.
    """
    image = keras.Input(backbone.input_shape[1:], name="image")
    x = backbone(preprocessing(image), training=training)
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
