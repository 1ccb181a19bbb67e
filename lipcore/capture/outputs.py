"""The tensors in what a model returns, however it is packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_of(output: Any) -> Iterator[Tensor]:
    """In tuples, lists, dicts, mappings and dataclasses."""
    if isinstance(output, Tensor):
        yield output
        return
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                yield from tensors_of(getattr(leaf, field.name))
        elif isinstance(leaf, Mapping):
            for value in leaf.values():
                yield from tensors_of(value)


def nodes_of(output: Any) -> Iterator[Any]:
    """The nodes of the graph behind the output's tensors."""
    todo = [tensor.grad_fn for tensor in tensors_of(output) if tensor.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                todo.append(child)


def on_backward(output: Any, hook: Callable[[Any], None]) -> None:
    """Call the hook with the gradients when the backward pass enters the graph behind one of the output's tensors, at
    each of them."""
    for tensor in tensors_of(output):
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(hook)
