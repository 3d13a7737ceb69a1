"""CGFace: five convolutional layers, for faces that a generator made."""

import keras
from keras import layers

from deepfake_core.config import Recipe

RECIPE = Recipe(
    image_size=64, batch_size=64, epochs=50, patience=10, learning_rate=0.001, schedule="cosine", warmup_epochs=1
)


def build(recipe: Recipe) -> keras.Model:
    """Build the network of Dang, Hassan, Im, Lee, Lee and Moon, "Deep Learning Based Computer Generated Face
    Identification Using Convolutional Neural Network", Applied Sciences 8(12), 2610, 2018, section 4.1.

    Known to us, from its abstract and headings: five convolutional layers, batch normalisation, dropout, Adam. We
    could not read the rest, and chose: inputs of 64 x 64, 3 x 3 kernels, 32 to 256 of them, a pooling after each of
    the first four convolutions, one dense layer of 256, dropout of 0.5, one sigmoid. The paper's second stage
    (boosted trees on these features, for unequal classes) is left out.
    """
    network = [keras.Input((recipe.image_size, recipe.image_size, 3), name="image"), layers.Rescaling(1 / 255)]
    for filters in (32, 64, 128, 256):
        network += [
            layers.Conv2D(filters, 3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.MaxPooling2D(2),
        ]
    network += [
        layers.Conv2D(256, 3, padding="same", use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.Flatten(),
        layers.Dense(256, activation="relu"),
        layers.Dropout(0.5),
        layers.Dense(1, activation="sigmoid", dtype="float32", name="fake_probability"),
    ]
    return keras.Sequential(network, name="cgface")
