"""Read tensors from a PyTorch checkpoint, without PyTorch and without running what the file says.

The legacy format (`torch.save` before 1.6; torch/serialization.py, `_legacy_save`) is five pickles (magic number,
protocol, system, the object, the keys of the storages), then each storage: its count of elements (int64), its elements.
"""

import math
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from deepfake_core.errors import ModelError

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_STORAGES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


@dataclass
class _Storage:
    """Elements that tensors share; they come after the tensors' descriptions."""

    elements: np.ndarray


@dataclass
class _Tensor:
    """What the file says of a tensor: offset, shape and strides count elements of its storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self) -> np.ndarray:
        elements = self.storage.elements
        last = self.offset + sum((side - 1) * stride for side, stride in zip(self.shape, self.strides, strict=True))
        if min(self.offset, *self.shape, *self.strides, 0) < 0 or max(last, math.prod(self.shape) - 1) >= len(elements):
            raise ValueError(f"a tensor of shape {self.shape} lies outside its storage of {len(elements)} elements")
        strides = [stride * elements.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(elements[self.offset :], self.shape, strides).copy()


class _TensorUnpickler(pickle.Unpickler):
    """Admit tensors, their storages and ordered dictionaries; refuse every other name."""

    def __init__(self, file: BinaryIO, storages: dict[str, _Storage]) -> None:
        super().__init__(file)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, shape, strides)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, *_ = pid
        return self._storages.setdefault(key, _Storage(np.empty(0, dtype)))


def read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a PyTorch state dictionary by name.

    Only tensors, their storages and ordered dictionaries are admitted, so that no code comes from the file.

    Returns:
        float32 or int64 arrays in PyTorch's layouts.

    Raises:
        ModelError: if the file is no such checkpoint, or names anything else.
    """
    storages: dict[str, _Storage] = {}
    try:
        with path.open("rb") as file:
            magic, _, _, tensors, keys = (_TensorUnpickler(file, storages).load() for _ in range(5))
            if magic != _MAGIC_NUMBER:
                raise ValueError("it does not begin with PyTorch's magic number")
            for key in keys:
                storages[key].elements = _read_elements(file, storages[key].elements.dtype, path.stat().st_size)
        return {name: tensor.read() for name, tensor in tensors.items()}
    except (pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError) as exc:
        raise ModelError(
            f"A checkpoint must be a PyTorch state dictionary of tensors in the format before 1.6. Received: {path}: "
            f"{exc}. Install the package that holds it again: `make` does so after `rm -r .venv`."
        ) from exc


def _read_elements(file: BinaryIO, dtype: np.dtype, file_size: int) -> np.ndarray:
    count = int.from_bytes(file.read(8), "little")
    if count * dtype.itemsize > file_size - file.tell():
        raise ValueError(f"a storage of {count} elements goes past the end of the file")
    return np.frombuffer(file.read(count * dtype.itemsize), dtype)
