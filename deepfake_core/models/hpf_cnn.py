"""A CNN behind a high-pass filter, which leaves the noise in which generators differ from cameras."""

import keras
import numpy as np
from keras import layers

from deepfake_core.config import Recipe

RECIPE = Recipe(
    image_size=256, batch_size=32, epochs=30, patience=10, learning_rate=0.0003, schedule="cosine", warmup_epochs=1
)

HIGH_PASS = np.array([[0, -1, 0], [-1, 4, -1], [0, -1, 0]], np.float32) / 4


def build(recipe: Recipe) -> keras.Model:
    """Build the network of Mo, Chen and Luo, "Fake Faces Identification via Convolutional Neural Network",
    IH&MMSec 2018, pages 43 to 47, section 3.

    Known to us, from its abstract and what others say of it: a high-pass filter in front, three groups of convolution,
    leaky ReLU and max pooling, dense layers behind. We could not read the rest, and chose: inputs of 256 x 256, the
    Laplacian per channel as filter, 3 x 3 kernels, 32, 64 and 128 of them, dense layers of 256 and 64, dropout of 0.5
    between them, one sigmoid.
    """
    high_pass = layers.DepthwiseConv2D(3, padding="valid", use_bias=False, dtype="float32", name="high_pass")
    high_pass.trainable = False
    network = [keras.Input((recipe.image_size, recipe.image_size, 3), name="image"), high_pass]
    for filters in (32, 64, 128):
        network += [layers.Conv2D(filters, 3, padding="same"), layers.LeakyReLU(0.2), layers.MaxPooling2D(2)]
    network += [
        layers.Flatten(),
        layers.Dense(256),
        layers.LeakyReLU(0.2),
        layers.Dropout(0.5),
        layers.Dense(64),
        layers.LeakyReLU(0.2),
        layers.Dense(1, activation="sigmoid", dtype="float32", name="fake_probability"),
    ]
    model = keras.Sequential(network, name="hpf_cnn")
    high_pass.set_weights([np.repeat(HIGH_PASS[:, :, None, None], 3, axis=2)])
    return model
