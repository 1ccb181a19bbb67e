"""Modes in which tensors in emulated device memory say that they are on cuda:0, and torch's functions keep them there.

torch itself computes on the CPU memory that it is. So the same tests, written for a GPU, run on either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from emulated_core import emulator
from emulated_memory import CUDA, on_device, placed
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_GETTERS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.is_cuda.__get__: on_device,
    Tensor.is_cpu.__get__: lambda tensor: tensor.is_cpu and not on_device(tensor),
    Tensor.device.__get__: lambda tensor: CUDA if on_device(tensor) else tensor.device,
    Tensor.get_device: lambda tensor: 0 if on_device(tensor) else tensor.get_device(),
}
_READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "equal", "allclose"}
_MOVES = {"to", "cuda", "cpu"}
#: Functions that make no tensor and read none.
_QUESTIONS = {
    "device",
    "_parse_to",
    "data_ptr",
    "untyped_storage",
    "storage_offset",
    "stride",
    "size",
    "dim",
    "numel",
    "is_contiguous",
    "__get__",
    "__set__",
}


def tensors_in(*values: Any) -> list[Tensor]:
    """Return the tensors of arguments or results, those in lists, tuples and dicts too."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda"))


class ResultsStay(TorchDispatchMode):
    """The mode below autograd: what is computed from a device's tensors, gradients too, lies on the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = tensors_in(args, kwargs)
        if not any(map(on_device, inputs)):
            return function(*args, **(kwargs or {}))
        emulator.synchronize()
        known = {id(tensor) for tensor in inputs}
        return _there(function(*args, **(kwargs or {})), known)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its wrapper costs as much as all that is done here


def _there(result: Any, known: set[int]) -> Any:
    """Return what a function has returned, with copies on the device of all that is new and not there."""
    if isinstance(result, Tensor):
        return result if id(result) in known or on_device(result) else placed(result)
    if isinstance(result, (list, tuple)):
        return type(result)(_there(part, known) for part in result)
    return result


class EmulatedTensors(TorchFunctionMode):
    """The mode; one at a time.

    Attributes:
        refuse_reads: whether reading a device tensor from the host is an error, as under ``set_sync_debug_mode``.
        record: takes the operations of a graph that is captured.
        reads: how often the host has read.
        entered: how often it was entered and not left.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refuse_reads = False
        self.record: Callable[[Callable[[], Any]], None] | None = None
        self.reads = 0
        self.entered = 0

    def __enter__(self) -> Any:
        self.entered += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.entered -= 1
        super().__exit__(*error)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        if function in _GETTERS:
            return _GETTERS[function](*args)
        name = getattr(function, "__name__", "")
        if function is torch.bmm and "out_dtype" in kwargs:
            function = _bmm
        if name in _QUESTIONS:
            return function(*args, **kwargs)
        tensors = tensors_in(args, kwargs)
        there = [on_device(tensor) for tensor in tensors]
        waits = name in _READS and any(there)
        asynchronous = kwargs.get("non_blocking", False)
        args, kwargs, device = _without_device(name, args, kwargs)
        to_device = device if device is not None else any(there)
        waits = waits or (not asynchronous and _crosses(name, args, there, to_device))
        if waits or any(there):
            self._look(name, waits)
        if name == "to" and device is None:
            to_device = there[-1]
        run = _Run(function, args, kwargs, tensors, to_device)
        if self.record is None or not (to_device or any(there)):
            return run()
        return run.recorded(name, self.record)

    def _look(self, name: str, waits: bool) -> None:
        """Let the device catch up: torch's operation comes after what was launched before it."""
        if waits:
            if self.refuse_reads:
                raise RuntimeError(f"called a synchronizing operation: {name} between the host and the emulated device")
            self.reads += 1
        if self.record is None:
            emulator.synchronize()


def _bmm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """torch.bmm with a wider result, which torch has for CUDA alone."""
    if a.dtype not in (torch.bfloat16, torch.float16) or b.dtype != a.dtype or out_dtype != torch.float32:
        raise RuntimeError(f"out_dtype is for products of 16-bit numbers in float32, not {a.dtype} in {out_dtype}")
    return torch.bmm(a.float(), b.float())


def _crosses(name: str, args: Any, there: list[bool], to_device: bool) -> bool:
    """Return whether a call copies from pageable host memory to the device or back, for which torch waits."""
    if name in ("tensor", "as_tensor", "from_numpy"):
        return to_device and not any(there)
    if name in _MOVES or name == "copy_":
        return len({*there, to_device}) > 1
    if name in ("__getitem__", "__setitem__") and any(there):
        return _has_indices_on_the_host(args[1])
    return False


def _has_indices_on_the_host(index: Any) -> bool:
    if isinstance(index, tuple):
        return any(map(_has_indices_on_the_host, index))
    return isinstance(index, list) or (isinstance(index, Tensor) and index.dim() > 0 and not on_device(index))


def _without_device(name: str, args: Any, kwargs: Any) -> tuple[Any, Any, bool | None]:
    """Return the arguments with the CPU for every device, and whether they name the emulated one (None: none)."""
    if name in ("cuda", "cpu"):
        return args[:1], {}, name == "cuda"
    named = [v for v in (*args, *kwargs.values()) if _is_device(v)]
    if not named:
        return args, kwargs, None
    args = tuple(torch.device("cpu") if _is_device(v) else v for v in args)
    kwargs = {k: torch.device("cpu") if _is_device(v) else v for k, v in kwargs.items()}
    return args, kwargs, torch.device(named[0]).type == "cuda"


class _Run:
    """One call of torch, whose results end on the emulated device or off it."""

    def __init__(self, function: Any, args: Any, kwargs: Any, tensors: list[Tensor], to_device: bool) -> None:
        self._function, self._args, self._kwargs = function, args, kwargs
        self._inputs, self._to_device = {id(tensor) for tensor in tensors}, to_device
        self._moves = getattr(function, "__name__", "") in _MOVES

    def __call__(self) -> Any:
        if self._function is Tensor.cuda:
            return self._moved(self._args[0])
        result = self._function(*self._args, **self._kwargs)
        if self._moves:
            return self._moved(result)
        for tensor in tensors_in(result):
            if self._to_device and id(tensor) not in self._inputs and not on_device(tensor):
                tensor.data = placed(tensor)
        return result

    def _moved(self, tensor: Tensor) -> Tensor:
        if on_device(tensor) == self._to_device:
            return tensor
        if id(tensor) in self._inputs or on_device(tensor):
            with _disable_current_modes():
                tensor = tensor.clone()
        if self._to_device:
            tensor.data = placed(tensor)
        return tensor

    def recorded(self, name: str, record: Callable[[Callable[[], Any]], None]) -> Any:
        """Run at every replay; now only where the result's shape is asked for."""
        if (name.endswith("_") and not name.endswith("__")) or "out" in self._kwargs or name == "__setitem__":
            record(self)
            return self._kwargs.get("out", self._args[0])
        result = self()

        def again() -> None:
            for old, new in zip(tensors_in(result), tensors_in(self()), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        record(again)
        return result
