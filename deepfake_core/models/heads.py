"""Several heads behind one network, each for fakes of one kind, and the probability that any of them is right."""

from typing import Any

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable("deepfake_core")
class AnyHead(layers.Layer):
    """From P(fake of a kind) for each kind, (n, kinds), to P(fake), (n, 1): 1 - product of (1 - p)."""

    def call(self, scores: Any) -> Any:
        return 1 - ops.prod(1 - scores, axis=-1, keepdims=True)


def split_head(network: keras.Model, count: int) -> keras.Model:
    """Return a network with so many heads instead of its own: its output is (n, count).

    Args:
        network: its last layer is one sigmoid on features, (n, 1).
    """
    *_, features, _ = network.layers
    scores = layers.Dense(count, activation="sigmoid", dtype="float32", name="kind_probabilities")(features.output)
    return keras.Model(network.inputs[0], scores, name=network.name)


def join_heads(network: keras.Model) -> keras.Model:
    """Return the network that is served: P(fake) of shape (n, 1), by the same weights."""
    return keras.Model(
        network.input, AnyHead(dtype="float32", name="fake_probability")(network.outputs[0]), name=network.name
    )
