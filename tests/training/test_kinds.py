"""A head for each source's fakes: labels, loss, and the network that is served."""

from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest

from deepfake_core.config import AugmentationParameters
from deepfake_core.detector import Detector
from deepfake_core.models import CANDIDATES
from deepfake_core.models.heads import join_heads, split_head
from deepfake_core.training import kinds
from deepfake_core.training.export import check_parity, load_network
from deepfake_core.training.fit import Training, train_candidate
from deepfake_core.training.heat_map import ExplainedNetwork
from deepfake_core.training.kinds import choose_kinds, measure_kinds, number_kinds
from tests.builders import RECIPE, SIZE, stripes


def of_sources(names):
    return replace(stripes(len(names), 0), rows=pd.DataFrame({"source": names}))


def test_a_source_has_a_head_from_enough_fakes_on(monkeypatch):
    monkeypatch.setattr(kinds, "MIN_FAKES_OF_KIND", 3)
    images = of_sources(["b", "b"] * 3 + ["a", "a"] * 4 + ["few", "few"] * 2)
    assert choose_kinds(images) == ("a", "b")
    assert number_kinds(images, ("a", "b")).labels.tolist() == [0, 2] * 3 + [0, 1] * 4 + [0, -1] * 2
    assert number_kinds(images, ()).labels.tolist() == [0, -1] * 9
    assert choose_kinds(of_sources(["a"] * 20 + ["few"] * 4)) == ()


def test_the_loss_asks_each_head_of_its_own_fakes_and_of_all_reals():
    scores = np.array([[0.2, 0.9]] * 4, np.float32)
    losses, right = (np.asarray(one) for one in measure_kinds(np.array([0, 1, 2, -1], np.float32), scores))
    any_head = 1 - 0.8 * 0.1
    expected = [-np.log(0.8) - np.log(0.1), -np.log(0.2), -np.log(0.9), -np.log(any_head)]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert right.tolist() == [0, 1, 1, 1]
    whole, _ = measure_kinds(np.array([0, -1], np.float32), scores[:2])  # of P(fake) itself, as for validation
    kerass = keras.ops.binary_crossentropy(np.array([0, 1], np.float32), np.full(2, any_head, np.float32))
    assert np.asarray(whole) == pytest.approx(np.asarray(kerass), rel=1e-4)


def test_the_loss_is_finite_where_heads_are_certain():
    scores = np.array([[0, 0], [1, 1], [1, 0]] * 4, np.float32)
    losses, _ = measure_kinds(np.repeat([0, 1, 2, -1], 3).astype(np.float32), scores)
    assert np.isfinite(np.asarray(losses)).all()


@pytest.mark.slow
def test_two_kinds_are_learned_by_two_heads_and_served_as_one_score(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "MIN_FAKES_OF_KIND", 20)
    train, val = (of_sources(["one", "one", "two", "two"] * count) for count in (30, 12))
    for images in (train, val):
        second = (images.rows["source"] == "two").to_numpy()
        images.pixels[second] = images.pixels[second][:, :, ::-1]  # bright on the other side
    recipe = RECIPE.model_copy(update={"head_per_source": True, "epochs": 8})
    candidate = train_candidate(Training("cnn", recipe), train, val, tmp_path)
    scores = Detector(candidate.folder).score(val.pixels)
    assert scores[val.labels == 1].min() > scores[val.labels == 0].max()
    assert candidate.history["val_accuracy"].max() == 1
    assert check_parity(candidate.folder, val) < 0.001
    network = load_network(candidate.folder)
    assert network.output_shape == (None, 1)
    assert network.layers[-2].output.shape == (None, 2)
    one = recipe.model_copy(update={"head_per_source": False})
    assert CANDIDATES["cnn"].build(one).count_params() < network.count_params()


def test_the_heat_map_is_the_gradient_of_the_joined_score():
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    small = RECIPE.model_copy(update={"augmentation": AugmentationParameters()})
    network = join_heads(split_head(CANDIDATES["cnn"].build(small), 3))
    images = stripes(4, 0).pixels.astype(np.float32)
    last = [layer for layer in network.layers if len(layer.output.shape) == 4][-1]
    parts = keras.Model(network.inputs[0], [last.output, network.output])
    with tf.GradientTape() as tape:
        features, scores = parts(images)
        logits = tf.math.log(scores) - tf.math.log1p(-scores)
    weights = tf.reduce_mean(tape.gradient(logits, features), (1, 2))
    expected = tf.reduce_sum(features * weights[:, None, None, :], -1)
    found, heat = ExplainedNetwork(network)(images)
    assert heat.shape[1] <= SIZE
    np.testing.assert_allclose(found, scores, rtol=1e-5)
    np.testing.assert_allclose(heat, expected, rtol=1e-3, atol=1e-5)
