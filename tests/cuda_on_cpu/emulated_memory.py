"""Tensors in emulated device memory. To torch they are tensors on the CPU like any others."""

from __future__ import annotations

import ctypes

import torch
from emulated_core import emulator
from torch import Tensor

CUDA = torch.device("cuda", 0)


class _Memory:
    """A piece of device memory that is given back with the last tensor on it."""

    def __init__(self, size: int) -> None:
        self._begin, self.size = emulator.allocate(size), size

    def buffer(self) -> ctypes.Array[ctypes.c_char]:
        array = (ctypes.c_char * self.size).from_address(self._begin)
        array.owner = self  # type: ignore[attr-defined]
        return array

    def __del__(self) -> None:
        emulator.free(self._begin)


def on_device(tensor: Tensor) -> bool:
    """Return whether a tensor's memory is emulated device memory, whatever the mode says of its device."""
    with torch._C.DisableTorchFunction():
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return False
        try:
            return bool(emulator.is_device(tensor.untyped_storage().data_ptr()))
        except (RuntimeError, NotImplementedError):  # a tensor without a storage, as those of torch.func
            return False


def placed(tensor: Tensor) -> Tensor:
    """Return a copy in device memory, strides included, that knows no gradients."""
    tensor = tensor.detach()
    strides = tensor.stride() if torch.ops.aten.is_non_overlapping_and_dense(tensor) else tensor.contiguous().stride()
    count = max(tensor.numel(), 1)
    flat = torch.frombuffer(_Memory(count * tensor.itemsize).buffer(), dtype=tensor.dtype, count=count)
    return flat.as_strided(tensor.shape, strides).copy_(tensor)
