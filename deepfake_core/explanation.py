"""Where a network looked."""

from typing import Any

import keras
import numpy as np

BATCH_SIZE = 16


def explain_scores(model: keras.Model, pixels: np.ndarray, fake: np.ndarray) -> np.ndarray:
    """Draw heat maps of what spoke for a verdict: Grad-CAM, Selvaraju et al., "Grad-CAM: Visual Explanations from Deep
    Networks via Gradient-based Localization", ICCV 2017, section 3.

    The last layer with features in space is explained, by the gradient of the score before its sigmoid.

    Args:
        model: a candidate's network: a chain of layers (or whole backbones), of which the last is one sigmoid.
        pixels: uint8 array of shape (n, size, size, 3).
        fake: bool array of shape (n,): explain what spoke for fake, or for real.

    Returns:
        float32 array of shape (n, height, width) of the features' size, 0 to 1 per image; all 0 where nothing spoke
        for the verdict.
    """
    chain = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    last = max(position for position, layer in enumerate(chain) if len(layer.output.shape) == 4)
    body, head = chain[: last + 1], chain[last + 1 :]
    maps = []
    for start in range(0, len(pixels), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        found = keras.ops.convert_to_tensor(pixels[batch].astype(np.float32))
        for layer in body:
            found = layer(found, training=False)
        gradient = _differentiate(head, found)
        sign = np.where(fake[batch], 1.0, -1.0)[:, None, None]
        found = np.asarray(keras.ops.convert_to_numpy(found), np.float32)
        weighted = (found * gradient.mean(axis=(1, 2), keepdims=True)).sum(axis=-1)
        heat = np.maximum(sign * weighted, 0)
        maps.append(heat / np.maximum(heat.max(axis=(1, 2), keepdims=True), 1e-12))
    return np.concatenate(maps).astype(np.float32)


def _differentiate(head: list[Any], features: Any) -> np.ndarray:
    """Return the gradient of the score before the sigmoid with respect to the features, of their shape."""

    def score(x: Any) -> Any:
        for layer in head[:-1]:
            x = layer(x, training=False)
        x = keras.ops.cast(x, "float32")
        return keras.ops.sum(keras.ops.matmul(x, head[-1].kernel) + head[-1].bias)

    if keras.backend.backend() == "jax":
        import jax

        return np.asarray(jax.grad(score)(features), np.float32)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(features)
        total = score(features)
    return tape.gradient(total, features).numpy().astype(np.float32)
