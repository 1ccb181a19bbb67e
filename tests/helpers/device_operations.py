"""Counts what a step would do on a device: torch's operations, kernels of the core, waits, copies from the host."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from emulated_core import emulator
from emulated_memory import on_device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_VIEWS = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "detach", "alias", "unsqueeze"),
    *("squeeze", "as_strided", "split", "split_with_sizes", "unbind", "_reshape_alias", "unfold", "diagonal"),
}
_MEMORY = {"empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like", "set_"}
_QUESTIONS = {"promote_types", "is_nonzero"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal"}
#: Of torch.use_deterministic_algorithms(): those that raise on CUDA, for floating-point numbers at least.
_REFUSED = {"cumsum", "put_", "put", "kthvalue", "histc", "bincount", "scatter_reduce", "scatter_reduce_", "median"}
#: Sums in the order in which threads come, unless that flag makes them slower.
_UNORDERED = {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_reduce", "index_reduce_"}


@dataclass
class Counts:
    """What was counted."""

    operations: Counter[str] = field(default_factory=Counter)  #: torch's that queue a kernel or a copy
    kernels: int = 0  #: of the core
    waits: Counter[str] = field(default_factory=Counter)  #: operations whose results the host needs to go on
    from_host: int = 0  #: copies of lists, numbers or arrays to the device
    unordered: Counter[str] = field(default_factory=Counter)  #: of floats: their bits may change from run to run
    refused: Counter[str] = field(default_factory=Counter)  #: those that raise under deterministic algorithms
    memory: int = 0  #: results with memory of their own

    @property
    def all(self) -> int:
        """Operations and kernels."""
        return self.operations.total() + self.kernels


class DeviceOperations(TorchDispatchMode):
    """The mode that counts. What is done with the host's tensors alone is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self._begin = 0

    def __enter__(self) -> Any:
        if emulator is not None:
            emulator.synchronize()  # what was launched before is no part of it
            self._begin = emulator.launches()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if emulator is not None:
            emulator.synchronize()
            self.counts.kernels = emulator.launches() - self._begin

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function._schema.name.split("::")[1]
        inputs = _tensors_in([*args, *kwargs.values()])
        results = _tensors_in([result])
        if not any(map(_is_on_device, inputs + results)):
            return result
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.counts.memory += sum(
            tensor.numel() > 0 and tensor.untyped_storage()._cdata not in known for tensor in results
        )
        if name in _VIEWS or name in _MEMORY or name in _QUESTIONS:
            return result
        self.counts.operations[name] += 1
        if name in _WAITS or (name.startswith("index") and _has_mask(args)):
            self.counts.waits[name] += 1
        self.counts.from_host += name in ("copy_", "_to_copy") and any(
            tensor.dim() and not _is_on_device(tensor) for tensor in inputs
        )
        if any(tensor.is_floating_point() for tensor in (inputs or results)):
            self.counts.unordered.update([name] if name in _UNORDERED else [])
            self.counts.refused.update([name] if name in _REFUSED else [])
        return result


def _is_on_device(tensor: Tensor) -> bool:
    return tensor.is_cuda if emulator is None else on_device(tensor)


def _tensors_in(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors_in(value)
    return found


def _has_mask(args: Any) -> bool:
    return any(
        isinstance(index, Tensor) and index.dtype == torch.bool
        for indices in args[1:2]
        if isinstance(indices, (list, tuple))
        for index in indices
    )
