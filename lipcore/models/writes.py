"""Writes into a model's tensors during a pass of lipcore's own: each is noticed, and its value put back.

A copy of the whole model beforehand would take its memory once more. So tensors are copied where an operation is about
to write into them, which its schema says: a teacher that follows its student, rows of an embedding that are
renormalised, weights that are kept in range through `.data`.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lipcore.models.torch_internals import TorchDispatchMode, preserved_version

#: Operations that change running statistics, and whose schemas do not say so.
_UNDECLARED = ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")

_lock = threading.Lock()
_stances: list[Any] = []  # what takes the stance back, then one entry per pass under way


class Kept:
    """The value and the version that a tensor has at one moment."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version
        self._preserved: AbstractContextManager[Any] = preserved_version(tensor)
        self._value = tensor.detach().clone()

    def put_back(self) -> None:
        """Give the tensor its value and its version, which a graph of the user's asks for."""
        now = self._tensor.detach()
        if self._tensor._version == self._version and now.layout == torch.strided and torch.equal(now, self._value):
            return
        self.write_back()

    def write_back(self) -> None:
        """Give the tensor its value and its version, without a look at what it holds, for which a GPU is waited for."""
        with self._preserved:
            self._tensor.data.copy_(self._value)


@contextmanager
def writes_put_back(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put back what operations within the with block write into these tensors, and exchange in them (`p.data = q`).
    What is compiled runs as it is written."""
    watched = [(tensor, tensor.data) for tensor in tensors if _can_be_watched(tensor)]
    writes = _Writes([tensor for tensor, _ in watched])
    try:
        with _eager(), writes:
            yield
    finally:
        for tensor, data in watched:
            if not tensor.is_set_to(data):
                tensor.data = data
        for kept in writes.kept:
            kept.write_back()


@contextmanager
def _eager() -> Iterator[None]:
    """Compile nothing, and run nothing compiled: modes do not see into it, and `fullgraph=True` refuses to run under
    one."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _lock:  # the stance is every thread's: the first sets it, and the last takes it back
        if not _stances:
            _stances.append(torch.compiler.set_stance("force_eager"))
            _stances[0].__enter__()
        _stances.append(None)
    try:
        yield
    finally:
        with _lock:
            _stances.pop()
            if len(_stances) == 1:
                _stances.pop().__exit__(None, None, None)


def _can_be_watched(tensor: Tensor) -> bool:
    """Return whether it is one array of numbers; what is sharded or quantised consists of others."""
    return not (
        tensor.is_meta
        or tensor.is_inference()
        or tensor.layout != torch.strided
        or is_lazy(tensor)
        or hasattr(tensor, "__tensor_flatten__")
        or tensor.grad_fn is not None
    )


class _Writes(TorchDispatchMode):
    """Mode that keeps the tensors that an operation is about to write into.

    Attributes:
        kept: in the order they were first written into.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[Kept] = []
        self._unchanged: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            self._unchanged.setdefault(_storage(tensor), []).append(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place, name in _written(function):
            value = args[place] if place < len(args) else kwargs.get(name)
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                    self.kept += map(Kept, self._unchanged.pop(_storage(tensor), ()))
        return function(*args, **kwargs)


@functools.cache
def _written(function: Any) -> list[tuple[int, str]]:
    """Return the places and the names of the arguments that an operation writes into."""
    schema = getattr(function, "_schema", None)  # operators of higher order have none
    arguments = () if schema is None else schema.arguments
    hidden = schema is not None and schema.name.removeprefix("aten::") in _UNDECLARED
    return [
        (place, argument.name)
        for place, argument in enumerate(arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or (hidden and argument.name.startswith("running_"))
    ]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
