"""What a model holds besides its registered parameters: plain tensors, containers, objects and generators, wherever its
modules keep them."""

from __future__ import annotations

import functools
import random
import weakref
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lipcore.models.containers import attributes_of

GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
CONTAINERS = (dict, list, set, deque)  # that can change
ARRAYS = (np.ndarray, bytearray, array)  # of numbers, outside of torch
_LARGEST = 16 << 20  # bytes of an array that may be state; a larger one is data
_PLAIN = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size}
    | {weakref.ProxyType, weakref.CallableProxyType}  # which look like what they stand for
)
#: How many objects, one in the other, are gone into: a trainer that a module knows holds the rest of the program.
_DEEPEST = 3
#: Up to where what an object holds is put back, too; data loaders and loggers, with threads of their own, lie deeper.
_OWNED = 2
#: Kinds of modules whose parameters come and go within a pass, as other ranks hold parts of them.
_SHARDED = frozenset({"FSDPModule", "FullyShardedDataParallel"})
_FOREIGN = ("lipcore", "torch._")  # whose objects are in the middle of the pass themselves


class Held:
    """State that the modules of a model hold, found once.

    Attributes:
        modules: those of the model, and others that stand in attributes and containers without being registered.
        tensors: plain ones in attributes, containers and objects.
        arrays: of numbers, outside of torch.
        generators: of random numbers.
        containers: that may be changed, entries of containers and attributes among them.
        objects: whose attributes may be changed.
        sharded: parameters are spread over ranks; they are left alone then, and so are attributes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = []
        self.arrays: list[Any] = []
        self.generators: list[Any] = []
        self.containers: list[Any] = []
        self.objects: list[Any] = []
        self._seen: set[int] = set()
        left: list[tuple[Any, int, bool]] = [(model, 0, True)]
        while left:
            value, depth, owned = left.pop()
            if type(value) in _PLAIN or id(value) in self._seen:
                continue
            self._seen.add(id(value))
            left += self._inside(value, depth, owned)
        self.sharded = any(_is_sharded(type(module)) for module in self.modules)
        if self.sharded:
            self.arrays, self.containers, self.objects = [], [], []

    def parameters(self) -> Iterator[Tensor]:
        """Yield the parameters of all modules."""
        return (p for module in self.modules for p in module.parameters(recurse=False))

    def watched(self) -> Iterable[Tensor]:
        """Return the tensors that a pass may write into and that are not copied beforehand."""
        return () if self.sharded else (*self.parameters(), *self.tensors)

    def buffers(self) -> Iterator[Tensor]:
        """Yield the buffers of all modules."""
        return (b for module in self.modules for b in module.buffers(recurse=False))

    def _inside(self, value: Any, depth: int, owned: bool) -> Iterable[tuple[Any, int, bool]]:
        """Sort a value, and return what is in it, with how deep that is, and whether it belongs to the model."""
        inside: Iterable[Any] = ()
        if isinstance(value, nn.Module):
            self.modules.append(value)
            own = (entry for key, entry in value.__dict__.items() if not _is_of_torch(key))
            return [(entry, depth, True) for entry in (*own, *value._modules.values())]
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif isinstance(value, ARRAYS):
            if owned and _size(value) <= _LARGEST:
                self.arrays.append(value)
        elif isinstance(value, GENERATORS):
            self.generators.append(value)
        elif isinstance(value, (*CONTAINERS, tuple, frozenset)):
            if owned and isinstance(value, CONTAINERS):
                self.containers.append(value)
            inside = value.values() if isinstance(value, dict) else value
            return [(entry, depth, owned) for entry in inside if type(entry) not in _PLAIN]
        elif depth < _DEEPEST and not isinstance(value, (type, ModuleType)):
            inside = self._parts(value, owned and depth < _OWNED)
            owned = owned and not isinstance(value, FunctionType)  # others use the variables around it, too
        return [(entry, depth + 1, owned) for entry in inside]

    def _parts(self, value: Any, owned: bool) -> Iterable[Any]:
        if isinstance(value, functools.partial):
            return value.func, *value.args, *value.keywords.values()
        if isinstance(value, MethodType):
            return (value.__self__,)
        if isinstance(value, FunctionType):
            return [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        if type(value).__module__.startswith(_FOREIGN):
            return ()
        attributes = attributes_of(value)
        if owned and attributes:
            self.objects.append(value)
        return attributes.values()


def _size(value: Any) -> int:
    """Return the bytes of an array's numbers; more than any where they cannot be written."""
    if isinstance(value, np.ndarray):
        return value.nbytes if value.flags.writeable else 1 << 62
    return len(value) * (value.itemsize if isinstance(value, array) else 1)


def _is_sharded(kind: type) -> bool:
    return not _SHARDED.isdisjoint(base.__name__ for base in kind.__mro__)


def _is_of_torch(key: str) -> bool:
    return key in ("_parameters", "_buffers", "_modules") or "_hooks" in key


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False
