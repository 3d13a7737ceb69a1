"""Training from an accelerator's memory, on logical CPU devices: same losses as the CPU's path, and what goes wrong."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from deepfake_core.config import AugmentationParameters
from deepfake_core.errors import DeviceError, TransientError
from deepfake_core.training import accelerator
from deepfake_core.training.batches import Batches
from deepfake_core.training.checkpoints import EPOCH_METRICS, EpochRecorder
from deepfake_core.training.fit import Training, train_checkpoint
from deepfake_core.training.steps import TensorFlowSteps
from tests.builders import RECIPE, ROOT, SIZE, needs_jax, stripes

pytestmark = pytest.mark.sweep

MOVED = AugmentationParameters(rotation=0, zoom=0, colours=0.5)
"""Colours, and shifts and flips by whole pixels, which every path does alike."""

CHILD = """
import json, sys
from pathlib import Path
from deepfake_core.training import kinds
from tests.training.test_accelerator import train
kinds.MIN_FAKES_OF_KIND = 10
losses = {}
for devices in (1, 2):
    for feeding in ("host", "resident", "streamed"):
        losses[f"{feeding} on {devices}"] = train(
            Path(sys.argv[1]) / feeding / str(devices), feeding, devices=devices, head_per_source=sys.argv[2] == "heads"
        )
print("losses", json.dumps(losses))
"""
TWO_CPUS = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
"""


def train(folder, feeding, devices=1, on_epoch=None, architecture="cnn", **changes):
    """Train on 60 images, validate on 21: neither is a number of whole batches. Return all losses and accuracies."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = RECIPE.model_copy(update={"epochs": 2, "augmentation": MOVED, **changes})
    record = EpochRecorder(architecture, recipe, folder, folder, on_epoch, None, 60)
    train_checkpoint(
        Training(architecture, recipe, 1, devices), two_kinds(60, 0), two_kinds(21, 1), folder, record, feeding
    )
    return pd.read_csv(folder / "history.csv")[list(EPOCH_METRICS)].to_numpy().ravel().tolist()


def two_kinds(count, seed):
    """Return images of two sources, whose fakes differ."""
    images = stripes(count, seed)
    second = np.arange(count) % 4 > 1
    images.pixels[second] = images.pixels[second][:, :, ::-1]
    return replace(images, rows=pd.DataFrame({"source": np.where(second, "two", "one")}))


def run_child(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("heads", ["one head", "heads"])
@pytest.mark.parametrize("backend", ["tensorflow", pytest.param("jax", marks=needs_jax)])
def test_every_path_and_number_of_devices_learns_the_same(backend, heads, tmp_path):
    if backend == "tensorflow":
        out = run_child(TWO_CPUS + CHILD, tmp_path, heads)
    else:
        flags = "--xla_force_host_platform_device_count=2"
        out = run_child(CHILD, tmp_path, heads, KERAS_BACKEND="jax", XLA_FLAGS=flags)
    losses = json.loads(out.split("losses ")[1])
    assert len(losses) == 6
    first = losses["host on 1"]
    assert first[4] < first[0]  # the training loss of the second epoch, of the first
    for found in losses.values():
        assert found == pytest.approx(first, rel=1e-4)


LAYERS = """
import jax, keras, numpy as np
from keras import layers
from deepfake_core.training.jax_layers import replace_layers

def gradients(model, images):
    groups = model.trainable_variables, model.non_trainable_variables
    trainable, fixed = ([one.value for one in group] for group in groups)
    def total(trainable, images):
        return keras.ops.sum(keras.ops.sin(model.stateless_call(trainable, fixed, images)[0]))
    return jax.tree.leaves(jax.grad(total, argnums=(0, 1))(trainable, images))

replaced = set()
for size in (12, 13):
    for kernel, stride, padding in ((3, 1, "same"), (5, 2, "same"), (3, 2, "valid"), (5, 1, "valid")):
        model = keras.Sequential([
            keras.Input((size, size, 3)),
            layers.Conv2D(4, 1, use_bias=False),
            layers.DepthwiseConv2D(kernel, strides=stride, padding=padding, use_bias=False),
            layers.MaxPooling2D(2),
        ])
        copy = replace_layers(model)
        replaced |= {type(layer).__name__ for layer in copy.layers}
        images = np.random.default_rng(size).normal(size=(2, size, size, 3)).astype("float32")
        np.testing.assert_allclose(copy(images), model(images), rtol=1e-4, atol=1e-5)
        for ours, kerass in zip(gradients(copy, images), gradients(model, images), strict=True):
            np.testing.assert_allclose(ours, kerass, rtol=1e-3, atol=1e-4)
print(sorted(replaced))
"""


@pytest.mark.process
@pytest.mark.slow
@needs_jax
def test_layers_for_jax_compute_what_those_of_keras_do():
    out = run_child(LAYERS, KERAS_BACKEND="jax")
    assert out.strip() == "['DepthwiseConvolution', 'MaxPooling', 'PointwiseConvolution']"


class Killed(BaseException):
    """Ends a training as a kill would, but for this process."""


@pytest.mark.slow
def test_a_killed_training_goes_on_as_an_uninterrupted_one(tmp_path):
    changes = {"architecture": "cgface", "image_size": SIZE, "epochs": 3}  # has dropout and batch normalisation

    def die(epoch, _):
        if epoch == 2:  # recorded, but not backed up
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "killed", "resident", on_epoch=die, **changes)
    resumed = train(tmp_path / "killed", "resident", **changes)
    assert resumed == pytest.approx(train(tmp_path / "whole", "streamed", **changes), rel=1e-3)


@pytest.mark.slow
def test_pixels_that_do_not_fit_are_streamed_and_it_is_said(tmp_path, monkeypatch, caplog):
    put = TensorFlowSteps.put
    refused = []

    def fill_up(self, array):
        if len(array) == 60 and not refused:  # the whole split
            refused.append(True)
            raise tf.errors.ResourceExhaustedError(None, None, "out of memory")
        return put(self, array)

    monkeypatch.setattr(TensorFlowSteps, "put", fill_up)
    losses = train(tmp_path / "a", "resident", epochs=1)
    assert refused
    assert "did not fit into the accelerator's memory" in caplog.text
    assert losses == pytest.approx(train(tmp_path / "b", "streamed", epochs=1), rel=1e-4)


@pytest.mark.slow
def test_a_device_that_is_lost_in_an_epoch_is_a_failure_that_a_retry_mends(tmp_path, monkeypatch):
    step, calls = TensorFlowSteps.train, []

    def lose(self, block):
        calls.append(block)
        if len(calls) == 6:  # in the second epoch
            raise tf.errors.InternalError(None, None, "the device is gone\nand more")
        return step(self, block)

    monkeypatch.setattr(TensorFlowSteps, "train", lose)
    with pytest.raises(DeviceError, match=r"Received: the device is gone. Run the flow again") as caught:
        train(tmp_path / "lost", "resident")
    assert isinstance(caught.value, TransientError)
    epochs = []
    train(tmp_path / "lost", "resident", on_epoch=lambda epoch, _: epochs.append(epoch))
    assert epochs == [1, 2]
    assert len(calls) == 6 + 4  # the first epoch was not trained again


@pytest.mark.parametrize(
    ("cpus", "free", "chosen"),
    [
        (True, 10**12, "host"),
        (False, 10**12, "resident"),
        (False, 2 * 81 * SIZE * SIZE * 3, "resident"),
        (False, 2 * 81 * SIZE * SIZE * 3 - 2, "streamed"),
        (False, None, "streamed"),
    ],
)
def test_images_are_resident_where_they_fit(cpus, free, chosen, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(accelerator, "sees_only_cpus", lambda: cpus)
    monkeypatch.setattr(accelerator, "read_free_bytes", lambda: free)
    assert accelerator.choose_feeding(Batches(stripes(60, 0), 16), Batches(stripes(21, 1), 16)) == chosen
    if not cpus:
        assert "free on the accelerator: " + ("unknown" if free is None else f"{free / 1e9:.1f} GB") in caplog.text


def test_an_accelerator_that_waits_is_warned_of_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(accelerator, "MAX_WAITING_SHARE", -1)
    train(tmp_path, "streamed")
    assert caplog.text.count("The accelerator waited for images") == 1


@pytest.mark.slow
def test_pixels_of_a_selection_are_found_in_the_array_that_holds_them(tmp_path):
    images = stripes(60, 0)
    chosen = images.select(images.labels == 1).select(np.arange(30) % 3 == 0)
    array, places = chosen.locate()
    assert array is images.pixels
    assert np.array_equal(array[places], chosen.pixels[np.arange(10)])
    recipe = RECIPE.model_copy(update={"epochs": 1, "augmentation": MOVED, "batch_size": 4})
    losses = []
    for feeding in ("resident", "streamed", "host"):
        folder = tmp_path / feeding
        folder.mkdir()
        record = EpochRecorder("cnn", recipe, folder, folder, None, None, 10)
        train_checkpoint(Training("cnn", recipe), chosen, stripes(8, 1), folder, record, feeding)
        losses.append(pd.read_csv(folder / "history.csv")[list(EPOCH_METRICS)].to_numpy().ravel())
    assert np.allclose(losses[0], losses[1], rtol=1e-4)
    assert np.allclose(losses[0], losses[2], rtol=1e-4)
