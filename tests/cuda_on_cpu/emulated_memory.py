"""Tensors in emulated device memory. To torch they are tensors on the CPU like any others."""

from __future__ import annotations

import ctypes

import torch
from emulated_core import emulator
from torch import Tensor

HOST = -1  #: in place of a device's index


class _Memory:
    """A piece of device memory that is given back with the last tensor on it."""

    def __init__(self, size: int, device: int) -> None:
        self._begin, self.size = emulator.allocate(size, device), size

    def buffer(self) -> ctypes.Array[ctypes.c_char]:
        array = (ctypes.c_char * self.size).from_address(self._begin)
        array.owner = self  # type: ignore[attr-defined]
        return array

    def __del__(self) -> None:
        emulator.free(self._begin)


def device_of(tensor: Tensor) -> int:
    """Return the index of the emulated device on which a tensor's memory lies, whatever the mode says; or HOST."""
    with torch._C.DisableTorchFunction():
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return HOST
        try:
            return emulator.device_of(tensor.untyped_storage().data_ptr())
        except (RuntimeError, NotImplementedError):  # a tensor without a storage, as those of torch.func
            return HOST


def on_device(tensor: Tensor) -> bool:
    """Return whether a tensor's memory is emulated device memory."""
    return device_of(tensor) != HOST


def placed(tensor: Tensor, device: int) -> Tensor:
    """Return a copy in a device's memory, strides included, that knows no gradients."""
    tensor = tensor.detach()
    strides = tensor.stride() if torch.ops.aten.is_non_overlapping_and_dense(tensor) else tensor.contiguous().stride()
    count = max(tensor.numel(), 1)
    flat = torch.frombuffer(_Memory(count * tensor.itemsize, device).buffer(), dtype=tensor.dtype, count=count)
    return flat.as_strided(tensor.shape, strides).copy_(tensor)
