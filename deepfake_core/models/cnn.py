"""The reference CNN."""

import keras
from keras import layers

from deepfake_core.config import Recipe

RECIPE = Recipe(image_size=150, batch_size=32, epochs=50, patience=10, learning_rate=0.001)


def build(recipe: Recipe) -> keras.Model:
    """Build three convolutions, one dense layer, one sigmoid; the reference's input is 150 x 150.

    Each ReLU comes behind the pooling: the greatest of four is the same either way, and a quarter is left to compute.
    """
    return keras.Sequential(
        [
            keras.Input((recipe.image_size, recipe.image_size, 3), name="image"),
            layers.Rescaling(1 / 255),
            layers.Conv2D(32, 3),
            layers.MaxPooling2D(2),
            layers.ReLU(),
            layers.Conv2D(64, 3),
            layers.MaxPooling2D(2),
            layers.ReLU(),
            layers.Conv2D(128, 3),
            layers.MaxPooling2D(2),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(256, activation="relu"),
            layers.Dense(1, activation="sigmoid", dtype="float32", name="fake_probability"),
        ],
        name="cnn",
    )
