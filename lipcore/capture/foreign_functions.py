"""Autograd Functions that are neither torch's nor lipcore's. They may free or overwrite what they keep, since they
expect one backward pass; after a backward pass of lipcore's own they have it back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lipcore.models.held import CONTAINERS
from lipcore.models.module_state import copied, restore
from lipcore.models.outputs import tensors_of
from lipcore.models.torch_internals import keeps_by_hooks


def function_of(node: Any) -> Any:
    """Return the autograd Function that a node of the graph runs; None where the node is built into torch."""
    return vars(type(node)).get("_forward_cls")  # of its very type: a class that lacks an attribute is slow to say so


def is_foreign(node: Any) -> bool:
    """Return whether a node of the graph runs an autograd Function that is neither torch's nor lipcore's."""
    function = function_of(node)
    return function is not None and function.__module__.split(".")[0] not in ("torch", "lipcore")


@contextmanager
def put_back(nodes: Iterable[Any]) -> Iterator[None]:
    """Give these nodes back, after the with block, the attributes and tensor values that they had before it, and what
    was in containers among these."""
    kept = [(node, dict(vars(node))) for node in nodes]
    containers = [each for _, attributes in kept for each in _containers(attributes)]
    tensors: dict[int, Tensor] = {}
    for node, attributes in kept:
        # Inside a checkpoint they are others in every backward pass; asked for here, they would be run for once more.
        saved = [] if keeps_by_hooks(node) else list(node.saved_tensors)
        for tensor in tensors_of([saved, list(attributes.values())]):
            tensors[id(tensor)] = tensor
    values = [(tensor, tensor.detach().clone(), tensor.untyped_storage().nbytes()) for tensor in tensors.values()]
    try:
        yield
    finally:
        for node, attributes in kept:
            vars(node).clear()
            vars(node).update(attributes)
        for container, before in containers:
            restore(container, before)
        for tensor, value, size in values:
            if tensor.untyped_storage().nbytes() < size:  # it was freed
                tensor.untyped_storage().resize_(size)
            if not torch.equal(tensor.detach(), value):
                tensor.data.copy_(value)  # without a new version, which the graph would refuse


def _containers(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the containers in a value that can change, each with a copy of it."""
    if isinstance(value, CONTAINERS):
        yield value, copied(value)
        for each in list(value.values() if isinstance(value, dict) else value):
            yield from _containers(each)
