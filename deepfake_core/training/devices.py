"""On what, and in which precision, a network is computed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import psutil

from deepfake_core.config import Precision
from deepfake_core.errors import ConfigurationError

CPU_FLAGS = Path("/proc/cpuinfo")

MIN_BFLOAT16_CAPABILITY = 8.0

TENSORFLOW_SHARE = 0.9
"""Of a GPU's memory: about what TensorFlow takes for itself."""


def choose_precision(precision: Precision, model: keras.Model) -> Precision:
    """Return float32 or bfloat16; `auto` is bfloat16 where the hardware computes the network faster in it.

    That is on GPUs from compute capability 8.0 on. With TensorFlow it is also on CPUs with AMX or AVX512-BF16, unless
    the network trains depthwise convolutions, for which its CPU kernels are slower in bfloat16
    (benchmarks/training_speed.py measures both).
    """
    if precision != "auto":
        return precision
    if not sees_only_cpus():
        return "bfloat16" if computes_bfloat16() else "float32"
    return (
        "bfloat16"
        if keras.backend.backend() == "tensorflow" and _cpu_computes_bfloat16() and not _trains_depthwise(model)
        else "float32"
    )


def sees_only_cpus() -> bool:
    return all(name.startswith("cpu") for name in keras.distribution.list_devices())


def count_replicas() -> int:
    """Return how many devices share a batch inside `spread_over`."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return int(tf.distribute.get_strategy().num_replicas_in_sync)
    distribution = keras.distribution.distribution()
    return int(np.prod(distribution.device_mesh.shape)) if distribution else 1


def read_free_bytes() -> int | None:
    """Return the memory that is free on the fullest accelerator, in bytes; None if it can't be read.

    The backends take most of it for themselves when they start, so what they took and do not use counts as free.
    """
    if keras.backend.backend() == "jax":
        import jax

        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        free = [one["bytes_limit"] - one["bytes_in_use"] for one in stats if "bytes_limit" in one]
    else:
        import tensorflow as tf

        free = []
        for number, gpu in enumerate(tf.config.list_physical_devices("GPU")):
            if not find_spec("pynvml"):  # which is for NVIDIA's GPUs on Linux
                return None
            import pynvml

            try:
                pynvml.nvmlInit()
                total = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(number)).total
            except pynvml.NVMLError:
                return None
            used = tf.config.experimental.get_memory_info(gpu.name.removeprefix("/physical_device:"))["current"]
            free.append(int(TENSORFLOW_SHARE * total) - used)
    return min(free, default=None)


def computes_bfloat16() -> bool:
    """Return whether all accelerators compute in bfloat16: NVIDIA's from compute capability 8.0 on."""
    if keras.backend.backend() == "jax":
        import jax

        versions = [getattr(device, "compute_capability", None) for device in jax.local_devices()]
    else:
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        found = [tf.config.experimental.get_device_details(gpu).get("compute_capability") for gpu in gpus]
        versions = [".".join(map(str, version)) if version else None for version in found]
    nvidias = [float(version) for version in versions if version and version[0].isdigit()]
    return all(version >= MIN_BFLOAT16_CAPABILITY for version in nvidias)


def describe_hardware() -> str:
    """Return what there is to train on, in words: accelerators by model, CPU cores, and memory in GiB."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        details = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")]
        models = [str(one.get("device_name", "GPU")) for one in details]
    else:
        import jax

        models = [str(device.device_kind) for device in jax.devices() if device.platform != "cpu"]
    accelerators = ", ".join(f"{models.count(model)} x {model}" for model in sorted(set(models))) or "no GPU"
    memory = psutil.virtual_memory().total / 2**30
    return f"{accelerators}; {os.cpu_count()} CPU cores, {memory:.0f} GiB; {keras.backend.backend()}"


def require_gpu(pool: str) -> None:
    """Refuse a machine that is to train on a GPU and has none, which would train for days.

    Raises:
        ConfigurationError: if no GPU is seen, unless CUDA_VISIBLE_DEVICES hides all of them on purpose.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if sees_only_cpus() and not hidden:
        raise ConfigurationError(
            f"A worker of the pool {pool!r} must see a GPU. Received: {describe_hardware()}. Check the driver "
            "(`nvidia-smi`), the container's GPU, and that TensorFlow's GPU libraries are installed; or start the "
            "worker with CUDA_VISIBLE_DEVICES=-1 to train on its CPU on purpose."
        )


def _cpu_computes_bfloat16() -> bool:
    if not CPU_FLAGS.exists():  # not Linux
        return False
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(CPU_FLAGS.read_text().split())


def _trains_depthwise(model: keras.Model) -> bool:
    return any(
        _trains_depthwise(layer) if isinstance(layer, keras.Model) else isinstance(layer, keras.layers.DepthwiseConv2D)
        for layer in model.layers
        if layer.trainable
    )


@contextmanager
def compute_in(precision: Precision) -> Iterator[None]:
    """Give layers that are made inside this precision; weights stay float32 (mixed precision)."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


@contextmanager
def spread_over(count: int) -> Iterator[None]:
    """Have models that are made inside train on `count` devices, each on its share of every batch.

    Accelerators, or logical CPU devices where there are none. One device is left as it is.

    Raises:
        ConfigurationError: if there are fewer.
    """
    if count == 1:
        yield
        return
    names = keras.distribution.list_devices()
    if count > len(names):
        raise ConfigurationError(
            f"`training.devices` must be no more than the devices that {keras.backend.backend()} sees. "
            f"Received: {count}; it sees {', '.join(names)}. CUDA_VISIBLE_DEVICES says which GPUs it may see."
        )
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.distribute.MirroredStrategy([f"/{name}" for name in names[:count]]).scope():
            yield
        return
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=names[:count]))
    try:
        yield
    finally:
        keras.distribution.set_distribution(before)
