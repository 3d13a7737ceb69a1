"""Where a network looked: a second output beside the score, so that it is served with the model."""

from typing import Any

import keras
from keras import layers, ops

from deepfake_core.errors import ModelError
from deepfake_core.models.heads import AnyHead

KNOWN_SLOPES = ("linear", "relu", "LeakyReLU", "AnyHead")


class ExplainedNetwork(keras.Model):
    """A network that returns P(fake) of shape (n, 1), and a heat map (n, height, width): evidence for fake
    above 0, evidence for real below 0.

    Grad-CAM, Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
    ICCV 2017, section 3: the last features with positions, each channel weighted by the mean over positions of the
    gradient of the score before its sigmoid. Behind these features a detector has a head of few layers, through which
    the gradient is written out here, so that ONNX needs no automatic differentiation.

    Args:
        network: a chain of layers (or whole backbones): features, flattening or pooling, then dense layers of which
            the last is one sigmoid, or several that `AnyHead` joins.

    Raises:
        ModelError: if the head has a layer of another kind.
    """

    def __init__(self, network: keras.Model) -> None:
        super().__init__()
        chain = [layer for layer in network.layers if not isinstance(layer, layers.InputLayer | layers.Dropout)]
        last = max(position for position, layer in enumerate(chain) if len(layer.output.shape) == 4)
        self._body, self._flatten, self._head = chain[: last + 1], chain[last + 1], chain[last + 2 :]
        sigmoids = [layer for layer in self._head if not isinstance(layer, AnyHead)][-1:]
        for layer in self._head:
            activation = _name_activation(layer)
            if activation not in KNOWN_SLOPES and not (activation == "sigmoid" and layer in sigmoids):
                raise ModelError(
                    "A candidate's features must be followed by Flatten or GlobalAveragePooling2D, then Dropout, "
                    "LeakyReLU and Dense with ReLU or no activation, the last with a sigmoid. Received: "
                    f"{layer.name}, {activation}. Add its slope in deepfake_core/training/heat_map.py."
                )

    def call(self, images: Any) -> tuple[Any, Any]:
        features = images
        for layer in self._body:
            features = layer(features, training=False)
        outputs = [self._flatten(features)]
        for layer in self._head:
            outputs.append(layer(outputs[-1], training=False))
        gradient = ops.ones_like(outputs[-1])
        for layer, before, after in zip(self._head[::-1], outputs[-2::-1], outputs[:0:-1], strict=True):
            gradient = _apply_slope(layer, before, after, gradient)
            if isinstance(layer, layers.Dense):
                kernel = layer.kernel
                if layer is self._head[0]:  # the mean over positions, taken of the kernel: the same, in a small matrix
                    kernel = ops.mean(ops.reshape(kernel, (-1, features.shape[-1], kernel.shape[-1])), axis=0)
                gradient = ops.matmul(gradient, ops.transpose(kernel))
        return outputs[-1], ops.sum(features * gradient[:, None, None, :], axis=-1)


def _name_activation(layer: Any) -> str:
    return layer.activation.__name__ if isinstance(layer, layers.Dense) else type(layer).__name__


def _apply_slope(layer: Any, before: Any, after: Any, gradient: Any) -> Any:
    """Multiply a gradient by the slope of a layer's activation; a last sigmoid is left out.

    Of `AnyHead` it is the slope of the logit of P = 1 - product of (1 - p) by that of p, which is p / P.
    """
    activation = _name_activation(layer)
    if activation == "AnyHead":
        return gradient * before / ops.maximum(after, keras.config.epsilon())
    if activation == "LeakyReLU":
        return ops.where(before > 0, gradient, layer.negative_slope * gradient)
    return ops.where(after > 0, gradient, 0.0) if activation == "relu" else gradient
