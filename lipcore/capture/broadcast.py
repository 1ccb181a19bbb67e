"""Layers that were called without the batch dimension: found by what the graph does with their outputs.

Positions [T] give an embedding [T, features], which shapes do not tell from one token for each of T samples where
T = B. But it is then spread over the batch, in front, which one token per sample is not.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lipcore.capture.layer_site import LayerSite

_SPREADING = frozenset({"AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "ExpandBackward0"})
_KEEPING = frozenset({"ToCopyBackward0", "NativeDropoutBackward0", "CloneBackward0", "MulBackward0"})


def check_broadcast(output: Any, samples: int) -> None:
    """ValueError that names a layer whose output was spread over the batch, in the graph behind a model's output."""
    if samples < 2:
        return
    consumers: defaultdict[Any, list[Any]] = defaultdict(list)
    tapped: list[Any] = []
    todo = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        site = getattr(node, "site", None)
        if isinstance(site, LayerSite) and not site.broadcast:
            tapped.append(node)
        for child, _ in node.next_functions:
            if child is None:
                continue
            consumers[child].append(node)
            if child not in seen:
                seen.add(child)
                todo.append(child)
    for node in tapped:
        if node.run.batch.dim == 0 and node.run.batch.offsets is None and _is_spread(node, consumers, samples):
            raise ValueError(
                f"module '{node.site.name}' ({type(node.site.module).__name__}): its output {list(_shape(node))} is "
                "spread over the batch, so it is called without the batch dimension; name it in broadcast="
            )


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)


def _is_spread(node: Any, consumers: dict[Any, list[Any]], samples: int) -> bool:
    dimensions = len(_shape(node))
    todo = [node]
    while todo:
        current = todo.pop()
        shape = _shape(current)
        for consumer in consumers.get(current, ()):
            made = _shape(consumer)
            in_front = len(made) > dimensions and made[0] == samples and (len(made) > len(shape) or shape[0] == 1)
            if consumer.name() in _SPREADING and in_front:
                return True
            if made == (1, *shape) or (made == shape and consumer.name() in _KEEPING):
                todo.append(consumer)
    return False
