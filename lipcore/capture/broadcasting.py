"""A layer whose output has no batch dimension, and as many rows as the batch has samples: the graph tells it apart."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

_BROADCASTING = {"AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "ExpandBackward0"}


def without_batch(output: Any) -> list[str]:
    """Names of tapped layers whose output, [T, ...] with T = B, is broadcast to [B, T, ...] further on.

    Position embeddings do that. Their rows are positions and not samples, which no shape tells where T = B.
    """
    consumers = _consumers(output)
    found: dict[str, None] = {}
    for node, site, batch in _taps(consumers):
        shape = _shape(node)
        if site.broadcast or batch.size < 2 or batch.offsets is not None or not shape or shape[0] != batch.size:
            continue
        if _is_broadcast(node, shape, consumers):
            found[site.name] = None
    return list(found)


def check_expanded(output: Any) -> None:
    """ValueError when the output of a layer that was expanded to [B, T, ...] got one more dimension in front."""
    consumers = _consumers(output)
    for node, site, _ in _taps(consumers):
        shape = _shape(node)
        if site.broadcast and shape and any(_shape(c) == (1, *shape) for c in consumers[node]):
            raise ValueError(
                f"broadcast: the output of layer '{site.name}' is expanded to {list(shape)}, and the model then puts a "
                "dimension in front of it (unsqueeze(0), [None]); give the layer an input of shape [1, T] instead"
            )


def _taps(consumers: dict[Any, list[Any]]) -> Iterator[tuple[Any, Any, Any]]:
    """Nodes of the graph that are taps, their sites, and where the samples are."""
    for node in consumers:
        site, run = getattr(node, "site", None), getattr(node, "run", None)
        if site is not None and run is not None:
            yield node, site, run.batch


def _consumers(output: Any) -> dict[Any, list[Any]]:
    """Of every node behind the output, those that read what it made."""
    consumers: dict[Any, list[Any]] = {}
    todo = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            consumers.setdefault(child, []).append(node)
            if child not in seen:
                seen.add(child)
                todo.append(child)
    return consumers


def _is_broadcast(node: Any, shape: tuple[int, ...], consumers: dict[Any, list[Any]]) -> bool:
    """Whether the tensor, or one of its shape that was made of it, becomes [B, *shape]."""
    todo, seen = deque([node]), {node}
    while todo:
        for consumer in consumers.get(todo.popleft(), ()):
            made = _shape(consumer)
            if made == (shape[0], *shape) and consumer.name() in _BROADCASTING:
                return True
            # Another layer that is tapped answers for itself.
            if made in (shape, (1, *shape)) and consumer not in seen and not hasattr(consumer, "site"):
                seen.add(consumer)
                todo.append(consumer)
    return False


def _shape(node: Any) -> tuple[int, ...] | None:
    """The shape of a node's first output; None where torch does not say."""
    metadata = getattr(node, "_input_metadata", None)
    return tuple(metadata[0].shape) if metadata else None
