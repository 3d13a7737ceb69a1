"""Precision by hardware, several devices, and the other backend; each in a process of its own, since all are global."""

import os
import subprocess
import sys

import keras
import pytest
import tensorflow as tf

from deepfake_core.detector import Detector
from deepfake_core.errors import ConfigurationError
from deepfake_core.models import CANDIDATES
from deepfake_core.training import devices
from deepfake_core.training.devices import choose_precision, describe_hardware, require_gpu
from tests.builders import ROOT, needs_jax, stripes


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


def test_more_devices_than_there_are_are_said():
    with pytest.raises(ConfigurationError, match="must be no more than the devices"), devices.spread_over(99):
        pass


EXPORT = """
import sys
from pathlib import Path
from deepfake_core.training.fit import Training, train_candidate
from tests.builders import RECIPE, stripes
recipe = RECIPE.model_copy(update={"epochs": 8})
train_candidate(Training("cnn", recipe), stripes(60, 0), stripes(16, 1), Path(sys.argv[1]))
"""


@pytest.mark.sweep
@pytest.mark.process
@pytest.mark.slow
@needs_jax
def test_what_jax_trained_is_exported_by_way_of_tensorflow(tmp_path):
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    command = [sys.executable, "-c", EXPORT, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = Detector(tmp_path / "detector").score(stripes(40, 2).pixels)
    assert ((scores >= 0.5) == stripes(40, 2).labels).mean() > 0.9


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [([(9, 0)], "bfloat16"), ([(8, 0), (8, 6)], "bfloat16"), ([(7, 5)], "float32"), ([(9, 0), (7, 0)], "float32")],
)
def test_auto_is_bfloat16_on_gpus_that_compute_in_it(capabilities, chosen, monkeypatch):
    details = [{"compute_capability": one} for one in capabilities]
    monkeypatch.setattr(devices, "sees_only_cpus", lambda: False)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: list(range(len(details))))
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda number: details[number])
    assert choose_precision("auto", build("cnn")) == chosen


@pytest.mark.skipif(not devices.sees_only_cpus(), reason="a GPU is here")
def test_a_machine_without_gpu_says_so_and_trains_for_a_gpu_pool_only_on_purpose(monkeypatch):
    assert describe_hardware().startswith(f"no GPU; {os.cpu_count()} CPU cores, ")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigurationError, match=r"'gpu' must see a GPU. Received: no GPU;.*CUDA_VISIBLE_DEVICES=-1"):
        require_gpu("gpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    require_gpu("gpu")
