"""Modes in which tensors in emulated device memory say that they are on a GPU, and torch's functions keep them there.

torch itself computes on the CPU memory that it is. So the same tests, written for a GPU, run on either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from emulated_core import emulator
from emulated_memory import HOST, device_of, on_device, placed
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_GETTERS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.is_cuda.__get__: on_device,
    Tensor.is_cpu.__get__: lambda tensor: tensor.is_cpu and not on_device(tensor),
    Tensor.device.__get__: lambda tensor: (
        tensor.device if (index := device_of(tensor)) == HOST else torch.device("cuda", index)
    ),
    Tensor.get_device: device_of,
}
_READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "equal", "allclose"}
_JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack", "einsum"}
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


def catch_up(device: int) -> None:
    """Let the current stream of a device do what torch's operation, which comes after it, may read."""
    emulator.synchronize_stream(emulator.current_stream(device), device)


def index_of(device: Any) -> int:
    """Return the index of a device that has a name or a number; without an index it is the current one."""
    named = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if named.type != "cuda":
        return HOST
    return emulator.device() if named.index is None else named.index


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda"))


class ResultsStay(TorchDispatchMode):
    """The mode below autograd: what is computed from a device's tensors, gradients too, lies on the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = tensors_in(args, kwargs)
        devices = [device for device in map(device_of, inputs) if device != HOST]
        if not devices:
            return function(*args, **(kwargs or {}))
        for device in {*devices}:
            catch_up(device)
        known = {id(tensor) for tensor in inputs}
        result = function(*args, **(kwargs or {}))
        if _is_foreach(function) and isinstance(result, (list, tuple)):  # each where it is
            listed = next(value for value in args if isinstance(value, (list, tuple)))  # pow(0.9, tensors) too
            pairs = zip(result, map(device_of, listed), strict=True)
            return [part if device == HOST else _there(part, known, device) for part, device in pairs]
        return _there(result, known, devices[0])

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its wrapper costs as much as all that is done here


def _is_foreach(function: Any) -> bool:
    return getattr(function, "__name__", "").startswith("_foreach_")


def _there(result: Any, known: set[int], device: int) -> Any:
    """Return what a function has returned, with copies on the device of all that is new and not there."""
    if isinstance(result, Tensor):
        return result if id(result) in known or on_device(result) else placed(result, device)
    if isinstance(result, (list, tuple)):
        return type(result)(_there(part, known, device) for part in result)
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
        there = [device_of(tensor) for tensor in tensors]
        devices = {device for device in there if device != HOST}
        _refuse_two_devices(name, args, kwargs)
        waits = name in _READS and bool(devices)
        asynchronous = kwargs.get("non_blocking", False)
        args, kwargs, device = _without_device(name, args, kwargs)
        to_device = device if device is not None else next((one for one in there if one != HOST), HOST)
        waits = waits or (not asynchronous and _crosses(name, args, there, to_device))
        if waits or devices:
            self._look(name, waits, devices)
        if name == "to" and device is None:
            to_device = there[-1]
        run = _Run(function, args, kwargs, tensors, to_device)
        if self.record is None or not (to_device != HOST or devices):
            return run()
        return run.recorded(name, self.record)

    def _look(self, name: str, waits: bool, devices: set[int]) -> None:
        """Let the devices catch up: torch's operation comes after what was launched on its stream before it."""
        if waits:
            if self.refuse_reads:
                raise RuntimeError(f"called a synchronizing operation: {name} between the host and the emulated device")
            self.reads += 1
        if self.record is None:
            for device in devices:
                catch_up(device)


def _refuse_two_devices(name: str, args: Any, kwargs: Any) -> None:
    """Raise torch's error for an operation on tensors of two devices; those of lists are worked on one by one, each
    with that of its place in other lists, unless they are joined."""
    values = [*args, *kwargs.values()]
    alone = [value for value in values if isinstance(value, Tensor)]
    groups = [tensors_in(values) if name in _JOINS else alone]
    if name.startswith("_foreach_"):
        lists = [value for value in values if isinstance(value, (list, tuple))]
        groups += [[*alone, *tensors_in(*together)] for together in zip(*lists, strict=False)]
    found = max(({device_of(value) for value in group} - {HOST} for group in groups), key=len)
    if len(found) > 1 and name != "copy_" and name not in _MOVES:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found two in {name}: cuda:0 and cuda:1!"
        )


def _bmm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """torch.bmm with a wider result, which torch has for CUDA alone."""
    if a.dtype not in (torch.bfloat16, torch.float16) or b.dtype != a.dtype or out_dtype != torch.float32:
        raise RuntimeError(f"out_dtype is for products of 16-bit numbers in float32, not {a.dtype} in {out_dtype}")
    return torch.bmm(a.float(), b.float())


def _crosses(name: str, args: Any, there: list[int], to_device: int) -> bool:
    """Return whether a call copies from pageable host memory to the device or back, for which torch waits."""
    if name in ("tensor", "as_tensor", "from_numpy"):
        return to_device != HOST and not any(device != HOST for device in there)
    if name in _MOVES or name == "copy_":
        return len({*there, to_device}) > 1 and HOST in (*there, to_device)
    if name in ("__getitem__", "__setitem__") and any(device != HOST for device in there):
        return _has_indices_on_the_host(args[1])
    return False


def _has_indices_on_the_host(index: Any) -> bool:
    if isinstance(index, tuple):
        return any(map(_has_indices_on_the_host, index))
    return isinstance(index, list) or (isinstance(index, Tensor) and index.dim() > 0 and not on_device(index))


def _without_device(name: str, args: Any, kwargs: Any) -> tuple[Any, Any, int | None]:
    """Return the arguments with the CPU for every device, and which device they name: HOST for it, None for none."""
    if name == "cpu":
        return args[:1], {}, HOST
    if name == "cuda":
        named = args[1] if len(args) > 1 else kwargs.get("device")
        return args[:1], {}, emulator.device() if named is None else index_of(named)
    named = [v for v in (*args, *kwargs.values()) if _is_device(v)]
    if not named:
        return args, kwargs, None
    args = tuple(torch.device("cpu") if _is_device(v) else v for v in args)
    kwargs = {k: torch.device("cpu") if _is_device(v) else v for k, v in kwargs.items()}
    return args, kwargs, index_of(named[0])


class _Run:
    """One call of torch, whose results end on the emulated device or off it."""

    def __init__(self, function: Any, args: Any, kwargs: Any, tensors: list[Tensor], to_device: int) -> None:
        self._function, self._args, self._kwargs = function, args, kwargs
        self._inputs, self._to_device = {id(tensor) for tensor in tensors}, to_device
        self._moves = getattr(function, "__name__", "") in _MOVES
        self._is_foreach = _is_foreach(function)  # whose results ResultsStay places, each where its input is

    def __call__(self) -> Any:
        if self._function is Tensor.cuda:
            return self._moved(self._args[0])
        result = self._function(*self._args, **self._kwargs)
        if self._moves:
            return self._moved(result)
        if self._is_foreach:
            return result
        for tensor in tensors_in(result):
            if self._to_device != HOST and id(tensor) not in self._inputs and not on_device(tensor):
                tensor.data = placed(tensor, self._to_device)
        return result

    def _moved(self, tensor: Tensor) -> Tensor:
        if device_of(tensor) == self._to_device:
            return tensor
        if id(tensor) in self._inputs or on_device(tensor):
            with _disable_current_modes():
                tensor = tensor.clone()
        if self._to_device != HOST:
            tensor.data = placed(tensor, self._to_device)
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
