"""Precision by hardware, several devices, and the other backend; each in a process of its own, since all are global."""

import os
import subprocess
import sys
from importlib.util import find_spec

import keras
import pytest

from deepfake_core.detector import Detector
from deepfake_core.errors import ConfigurationError
from deepfake_core.models import CANDIDATES
from deepfake_core.training import devices
from deepfake_core.training.devices import choose_precision, describe_hardware, require_gpu
from tests.builders import ROOT, stripes


def build(architecture):
    recipe = CANDIDATES[architecture].RECIPE.model_copy(update={"image_size": 32, "weights": "none"})
    return CANDIDATES[architecture].build(recipe)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "architecture", "chosen"),
    [
        ("fpu avx512f avx512_bf16", "cnn", "bfloat16"),
        ("fpu amx_bf16 amx_tile", "cgface", "bfloat16"),
        ("fpu avx2 avx512f", "cnn", "float32"),
        ("fpu avx512_bf16", "efficientnet_lite0", "float32"),
        ("fpu avx512_bf16", "efficientnet_v2_b0", "float32"),
        ("fpu avx512_bf16", "hpf_cnn", "bfloat16"),  # its one depthwise convolution is fixed, and in float32
    ],
)
def test_auto_is_bfloat16_where_the_cpu_gains_by_it(flags, architecture, chosen, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\nbugs\t\t: spectre_v1\n")
    monkeypatch.setattr(devices, "CPU_FLAGS", tmp_path / "cpuinfo")
    model = build(architecture)
    assert choose_precision("auto", model) == chosen
    assert choose_precision("float32", model) == "float32"
    assert choose_precision("bfloat16", model) == "bfloat16"


def test_a_machine_that_lists_no_flags_computes_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "CPU_FLAGS", tmp_path / "none")
    assert choose_precision("auto", build("cnn")) == "float32"


def test_precision_is_of_the_computation_and_ends_with_its_block():
    with devices.compute_in("bfloat16"):
        model = build("cnn")
    assert {str(weight.dtype) for weight in model.weights} == {"float32"}
    assert model.layers[1].compute_dtype == "bfloat16"
    assert model.layers[-1].compute_dtype == "float32"
    assert keras.config.dtype_policy().name == "float32"


TRAIN = """
import sys
from pathlib import Path
from deepfake_core.training.fit import Training, train_candidate
from tests.builders import RECIPE, stripes
recipe = RECIPE.model_copy(update={"epochs": 2})
for count in (1, 2):
    folder = Path(sys.argv[1]) / str(count)
    candidate = train_candidate(Training("cnn", recipe, 1, count), stripes(60, 0), stripes(16, 1), folder)
    print("losses", *candidate.history["loss"], *candidate.history["val_loss"])
"""
TWO_CPUS = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
"""


def train(folder, before="", **environment):
    """Train on one device and on two, in a process of their own; return both's losses."""
    command = [sys.executable, "-c", before + TRAIN, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (line.split()[1:] for line in done.stdout.splitlines() if line.startswith("losses"))
    return [float(loss) for loss in one], [float(loss) for loss in two]


@pytest.mark.process
@pytest.mark.slow
def test_two_devices_learn_as_one_does_from_the_same_batches(tmp_path):
    one, two = train(tmp_path, before=TWO_CPUS)
    assert two == pytest.approx(one, rel=1e-4)


def test_more_devices_than_there_are_are_said():
    with pytest.raises(ConfigurationError, match="must be no more than the devices"), devices.spread_over(99):
        pass


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.skipif(find_spec("jax") is None, reason="jax is not installed")
def test_jax_trains_too_and_on_two_devices_as_on_one(tmp_path):
    one, two = train(tmp_path, KERAS_BACKEND="jax", XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert one[1] < one[0]  # the training loss of the second epoch, of the first
    assert two == pytest.approx(one, rel=1e-4)
    scores = Detector(tmp_path / "1" / "detector").score(stripes(40, 2).pixels)  # exported by way of TensorFlow
    assert ((scores >= 0.5) == stripes(40, 2).labels).mean() > 0.9


@pytest.mark.skipif(not devices.sees_only_cpus(), reason="a GPU is here")
def test_a_machine_without_gpu_says_so_and_trains_for_a_gpu_pool_only_on_purpose(monkeypatch):
    assert describe_hardware().startswith(f"no GPU; {os.cpu_count()} CPU cores, ")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigurationError, match=r"'gpu' must see a GPU. Received: no GPU;.*CUDA_VISIBLE_DEVICES=-1"):
        require_gpu("gpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    require_gpu("gpu")
