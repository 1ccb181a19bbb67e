"""Layers that were called without the batch dimension: found by what the graph does with their outputs.

Positions [T] give an embedding [T, features], which shapes do not tell from one token for each of T samples where
T = B. But it is then spread over the batch, in front, which one token per sample is not.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from lipcore.capture.layers.layer_site import LayerSite
from lipcore.models.outputs import tensors_of

_SPREADING = frozenset({"AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "ExpandBackward0"})


def spread_layers(output: Any, samples: int) -> list[tuple[LayerSite, str]]:
    """Return the layers whose output was spread over the batch in the graph behind a model's output, and what is to be
    said of each.

    Raises:
        ValueError: a layer named in broadcast= whose expanded output got one more dimension in front.
    """
    if samples < 2:
        return []
    consumers: defaultdict[Any, list[Any]] = defaultdict(list)
    tapped: list[Any] = []
    todo = [tensor.grad_fn for tensor in tensors_of(output) if tensor.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        site = getattr(node, "site", None)
        if isinstance(site, LayerSite) and hasattr(node, "run"):  # not of a layer that is called outside another model
            tapped.append(node)
        for child, _ in node.next_functions:
            if child is None:
                continue
            consumers[child].append(node)
            if child not in seen:
                seen.add(child)
                todo.append(child)
    found: list[tuple[LayerSite, str]] = []
    for node in tapped:
        if node.site.broadcast:
            _check_expanded(node, consumers)
        elif node.run.batch.dim == 0 and node.run.batch.offsets is None and _is_spread(node, consumers, samples):
            why = (
                f"module '{node.site.name}' ({type(node.site.module).__name__}): its output {list(_shape(node))} is "
                "spread over the batch, so it is called without the batch dimension; name it in broadcast="
            )
            found.append((node.site, why))
    return found


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)


def _check_expanded(node: Any, consumers: dict[Any, list[Any]]) -> None:
    shape = _shape(node)
    if any(_shape(consumer) == (1, *shape) for consumer in consumers.get(node, ())):
        raise ValueError(
            f"broadcast: the output of layer '{node.site.name}' is expanded to {list(shape)}, and the model then puts "
            "a dimension in front of it (unsqueeze(0), [None]); give the layer an input of shape [1, T] instead"
        )


def _is_spread(node: Any, consumers: dict[Any, list[Any]], samples: int) -> bool:
    dimensions = len(_shape(node))
    todo, seen = [node], {node}
    while todo:
        current = todo.pop()
        shape = _shape(current)
        for consumer in consumers.get(current, ()):
            made = _shape(consumer)
            in_front = len(made) > dimensions and made[0] == samples and (len(made) > len(shape) or shape[0] == 1)
            if consumer.name() in _SPREADING and in_front:
                return True
            # Another layer that is tapped answers for itself.
            if made in (shape, (1, *shape)) and consumer not in seen and not hasattr(consumer, "site"):
                seen.add(consumer)
                todo.append(consumer)
    return False
