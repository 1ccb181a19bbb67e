"""Autograd Functions that are neither torch's nor lipcore's: they may free or overwrite what they keep, since they
expect one backward pass. After one of lipcore's own they have it back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lipcore.models.outputs import tensors_of


def function_of(node: Any) -> Any:
    """Return the autograd Function that a node of the graph runs, None where it is built in."""
    return getattr(type(node), "_forward_cls", None)


def is_foreign(node: Any) -> bool:
    """Return whether a node of the graph runs a Function of somebody else's."""
    function = function_of(node)
    return function is not None and function.__module__.split(".")[0] not in ("torch", "lipcore")


@contextmanager
def put_back(nodes: Iterable[Any]) -> Iterator[None]:
    """These nodes have, after the with block, the attributes and the values of tensors that they had before."""
    kept = [(node, dict(vars(node))) for node in nodes]
    tensors: dict[int, Tensor] = {}
    for node, attributes in kept:
        for tensor in tensors_of([list(node.saved_tensors), list(attributes.values())]):
            tensors[id(tensor)] = tensor
    values = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
    try:
        yield
    finally:
        for node, attributes in kept:
            vars(node).clear()
            vars(node).update(attributes)
        for tensor, value in values:
            if not torch.equal(tensor.detach(), value):
                tensor.data.copy_(value)  # without a new version, which the graph would refuse
