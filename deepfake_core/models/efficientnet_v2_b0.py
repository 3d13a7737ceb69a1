"""EfficientNetV2-B0 from keras.applications, whose ImageNet weights are downloaded when they are first needed."""

import keras
from keras import layers

from deepfake_core.config import Recipe
from deepfake_core.errors import ModelError
from deepfake_core.models.backbone import FINE_TUNING, attach_head, load_backbone

RECIPE = FINE_TUNING


def build(recipe: Recipe) -> keras.Model:
    """Build Tan and Le, "EfficientNetV2: Smaller Models and Faster Training", ICML 2021, with a head.

    Raises:
        ModelError: if ImageNet's weights are asked for and can't be downloaded.
    """
    size = (recipe.image_size, recipe.image_size, 3)
    try:
        backbone = keras.applications.EfficientNetV2B0(
            include_top=False,
            weights="imagenet" if recipe.weights == "imagenet" else None,
            input_shape=size,
            include_preprocessing=False,
        )
    except Exception as exc:  # Keras raises a bare one when a download fails
        raise ModelError(
            f"ImageNet weights of efficientnet_v2_b0 must be downloaded once, which failed: {exc}. Allow the download "
            "or set training.weights to none or a .weights.h5 file, or leave out this candidate."
        ) from exc
    if recipe.weights not in ("imagenet", "none"):
        load_backbone(backbone, recipe.weights)
    return attach_head("efficientnet_v2_b0", backbone, layers.Rescaling(1 / 128, offset=-1), training=False)
