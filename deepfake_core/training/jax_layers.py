"""Layers that compute what Keras's do, in ways that XLA makes faster programs of for GPUs.

They take the place of Keras's only in the model that is trained, on JAX. What is saved and served has Keras's own.
"""

from functools import partial
from typing import Any

import keras
from keras import layers


def replace_layers(model: keras.Model) -> keras.Model:
    """Return a copy of a model with the layers below in place of Keras's, and the same weights."""
    copy = keras.models.clone_model(model, clone_function=_clone, recursive=True)
    copy.set_weights(model.get_weights())
    return copy


def _clone(layer: layers.Layer) -> layers.Layer:
    kind: Any = type(layer)
    if kind is layers.MaxPooling2D and layer.pool_size == layer.strides == (2, 2) and layer.padding == "valid":
        kind = MaxPooling
    elif kind is layers.DepthwiseConv2D and layer.depth_multiplier == 1 and not layer.use_bias:
        kind = DepthwiseConvolution
    elif kind is layers.Conv2D and layer.kernel_size == layer.strides == (1, 1) and not layer.use_bias:
        kind = PointwiseConvolution
    copy = kind.from_config(layer.get_config())
    copy.trainable = layer.trainable
    return copy


class MaxPooling(layers.MaxPooling2D):
    """The greatest of each 2 x 2, as three elementwise maxima: XLA's gradient of a window is a slow scatter.

    Where two are equal, each gets half of the gradient; from Keras's, one gets all.
    """

    def call(self, inputs: Any) -> Any:
        height, width = inputs.shape[1] // 2 * 2, inputs.shape[2] // 2 * 2
        corners = [inputs[:, y:height:2, x:width:2] for y in (0, 1) for x in (0, 1)]
        top, bottom = keras.ops.maximum(*corners[:2]), keras.ops.maximum(*corners[2:])
        return keras.ops.maximum(top, bottom)


class PointwiseConvolution(layers.Conv2D):
    """A convolution of 1 x 1 as the matrix product that it is, which XLA compiles faster."""

    def call(self, inputs: Any) -> Any:
        return keras.ops.matmul(inputs, keras.ops.cast(self.kernel, inputs.dtype)[0, 0])


class DepthwiseConvolution(layers.DepthwiseConv2D):
    """A filter for each channel, as a sum of shifted images.

    The general convolution of XLA takes minutes to compile for it, and is slow in its gradients.
    """

    def call(self, inputs: Any) -> Any:
        kernel = keras.ops.cast(self.kernel, inputs.dtype)[..., 0]
        before, after, outputs = [], [], []
        for axis in (0, 1):
            size, taps, stride = inputs.shape[1 + axis], kernel.shape[axis], self.strides[axis]
            output = -(-size // stride) if self.padding == "same" else (size - taps) // stride + 1
            padding = max((output - 1) * stride + taps - size, 0)
            before.append(padding // 2)
            after.append(padding - padding // 2)
            outputs.append(output)
        return _make_convolution()(
            inputs, kernel, self.strides[0], tuple(zip(before, after, strict=True)), tuple(outputs)
        )


def _make_convolution() -> Any:
    """Return the function, whose gradients are written out so that each is one pass over padded images."""
    import jax
    from jax import lax
    from jax import numpy as jnp

    def pad(images: Any, padding: Any) -> Any:
        return lax.optimization_barrier(jnp.pad(images, ((0, 0), *padding, (0, 0))))

    def shift(padded: Any, y: int, x: int, outputs: Any, stride: int) -> Any:
        height, width = ((output - 1) * stride + 1 for output in outputs)
        return padded[:, y : y + height : stride, x : x + width : stride].astype(jnp.float32)

    def filter_shifted(padded: Any, kernel: Any, outputs: Any, stride: int) -> Any:
        taps = [(y, x) for y in range(kernel.shape[0]) for x in range(kernel.shape[1])]
        kernel = kernel.astype(jnp.float32)
        total: Any = sum(shift(padded, y, x, outputs, stride) * kernel[y, x] for y, x in taps)
        return lax.optimization_barrier(total.astype(padded.dtype))  # else XLA repeats it for each use

    @partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
    def convolve(images: Any, kernel: Any, stride: int, padding: Any, outputs: Any) -> Any:
        return filter_shifted(pad(images, padding), kernel, outputs, stride)

    def forward(images: Any, kernel: Any, stride: int, padding: Any, outputs: Any) -> Any:
        return convolve(images, kernel, stride, padding, outputs), (images, kernel)

    def backward(stride: int, padding: Any, outputs: Any, kept: Any, gradient: Any) -> Any:
        images, kernel = kept
        sizes, taps = images.shape[1:3], kernel.shape[:2]
        spread = []
        for axis in (0, 1):
            before = taps[axis] - 1 - padding[axis][0]
            after = sizes[axis] + taps[axis] - 1 - before - ((outputs[axis] - 1) * stride + 1)
            spread.append((before, after, stride - 1))
        zero = jnp.zeros((), gradient.dtype)
        spread_gradient = lax.optimization_barrier(lax.pad(gradient, zero, ((0, 0, 0), *spread, (0, 0, 0))))
        of_images = filter_shifted(spread_gradient, kernel[::-1, ::-1], sizes, 1)
        padded, gradient = pad(images, padding), gradient.astype(jnp.float32)
        of_kernel = [
            jnp.sum(shift(padded, y, x, outputs, stride) * gradient, axis=(0, 1, 2))
            for y in range(taps[0])
            for x in range(taps[1])
        ]
        return of_images, jnp.stack(of_kernel).reshape(kernel.shape).astype(kernel.dtype)

    convolve.defvjp(forward, backward)
    return convolve
