"""Layers whose rows may be other samples' in every pass: the model puts its samples into an order of its own before
them, and back behind them. A proof finds whose rows they are in its own pass alone, and where the first batches happen
to be in order, all looks right."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from lipcore.capture.graph.kept_tensors import is_once_only
from lipcore.capture.graph.orders import joins
from lipcore.capture.graph.row_moves import is_permutation, keeps_samples, may_move, moves_along
from lipcore.capture.graph.walk import shapes
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.models.outputs import nodes_before, nodes_of, tensors_of
from lipcore.models.torch_internals import saved

_PLACES = ("MaskedScatter", "IndexPut", "Scatter", "ScatterAdd", "IndexAdd", "IndexCopy")
WHY = (
    "the model puts its samples into another order between this layer and its output ({0}), which may be a new one in "
    "every pass"
)


def reordered_layers(output: Any, samples: int, *, joining: bool = False) -> list[tuple[LayerSite, str]]:
    """Return the layers to which every way from one of a model's outputs leads through a node that may put as many rows
    as there are samples into another order, or may put its rows where other samples are (the pictures in a text), and
    what is to be said of each; with `joining`, through one too that joins rows in an order which its edges say."""
    if samples < 2:
        return []
    moves: dict[Any, tuple[int, ...]] = {}  # by node, the edges that lead to rows in another order
    for node in nodes_of(output):
        if _reorders(node, samples) or (joining and joins(node, samples)):
            moves[node] = tuple(range(len(node.next_functions)))
        elif edges := _placed_at_will(node, samples):
            moves[node] = edges
    if not moves:
        return []
    why, found = WHY.format(next(iter(moves)).name()), dict[LayerSite, str]()
    behind = nodes_before(node.next_functions[e][0] for node, edges in moves.items() for e in edges)
    sites = [(node, site) for node in behind if isinstance(site := getattr(node, "site", None), LayerSite)]
    returned = [tensor for tensor in tensors_of(output) if tensor.grad_fn is not None]
    # A loss beside, one number, may choose among the rows of what is returned.
    returned = [tensor for tensor in returned if tensor.numel() > 1] or returned
    for root in dict.fromkeys(tensor.grad_fn for tensor in returned):
        free, mine = _free(root, moves), _free(root, {})
        found |= {site: why for node, site in sites if node in mine and node not in free}
    return list(found.items())


def _free(root: Any, moves: Mapping[Any, Container[int]]) -> set[Any]:
    """Return the nodes that are reached from one without these edges."""
    found, todo = {root}, [root]
    while todo:
        node = todo.pop()
        closed = moves.get(node, ())
        for edge, (child, _) in enumerate(node.next_functions):
            if child is not None and child not in found and edge not in closed:
                found.add(child)
                todo.append(child)
    return found


def _placed_at_will(node: Any, samples: int) -> tuple[int, ...]:
    """Return the edges of a node to tensors whose rows it puts into places of another, or of which it takes other rows
    than there are samples, whatever its mask or index is in this pass; none where these are rows of their own
    samples."""
    name: str = node.name().partition("Backward")[0]
    if name in ("Index", "IndexSelect"):
        return (0,) if _takes_rows(node, samples) else ()
    if name not in _PLACES or keeps_samples(node, samples):
        return ()
    if name in ("Scatter", "ScatterAdd", "IndexAdd", "IndexCopy") and not moves_along(node, 0, len(shapes(node)[0])):
        return ()
    return (1,)


def _takes_rows(node: Any, samples: int) -> bool:
    """Return whether a node takes rows along the first dimension by one index of numbers, of a tensor that may have as
    many for every sample."""
    shape, child = shapes(node)[0], node.next_functions[0][0]
    if is_once_only(node) or child is None or not shape or shape[0] == samples:
        return False
    rows = shapes(child)[0][:1]
    if not rows or rows[0] % samples or not moves_along(node, 0, len(shape)):
        return False
    indices = saved(node, "indices")
    if not isinstance(indices, (tuple, list)):
        return True
    given = [each for each in indices if isinstance(each, Tensor)]
    return len(given) == 1 and indices[0] is not None and given[0].dtype not in (torch.bool, torch.uint8)


def _reorders(node: Any, samples: int) -> bool:
    """Return whether a node may put `samples` rows into another order, whatever its index is in this pass."""
    name: str = node.name()
    product = is_permutation(node, samples)
    if not (may_move(node) or product) or name.startswith("Masked"):
        return False  # masks keep the order
    shape = shapes(node)[0]
    if not shape or shape[0] != samples:
        return False
    if product:
        return True
    behind = [child for child, _ in node.next_functions]
    if all(child is None or shapes(child)[0][:1] != (samples,) for child in behind):
        return False
    indices = None if is_once_only(node) else saved(node, "indices")
    if isinstance(indices, (tuple, list)):
        given = [each for each in indices if isinstance(each, Tensor)]
        # Two are a place in each sample, x[torch.arange(B), last].
        return len(given) == 1 and indices[0] is not None and given[0].dtype not in (torch.bool, torch.uint8)
    return moves_along(node, 0, len(shape))
