"""The candidates, a file each: a function from a recipe to an untrained Keras model, and its own recipe.

A model takes pixels from 0 to 255 as float32 (n, image_size, image_size, 3) and returns P(fake) as float32 (n, 1);
preprocessing lives inside. One that transfers learning holds its pretrained part as a model within the model. To add a
candidate, write its file, name it in `CANDIDATES` and in `config.Architecture`.
"""

from types import ModuleType

from deepfake_core.config import Architecture
from deepfake_core.models import cgface, cnn, efficientnet_lite0, efficientnet_v2_b0, hpf_cnn

CANDIDATES: dict[Architecture, ModuleType] = {
    "cnn": cnn,
    "efficientnet_lite0": efficientnet_lite0,
    "efficientnet_v2_b0": efficientnet_v2_b0,
    "hpf_cnn": hpf_cnn,
    "cgface": cgface,
}
"""Each has `RECIPE` and `build(recipe)`."""
