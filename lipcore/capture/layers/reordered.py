"""Layers whose rows may be other samples' in every pass: the model puts its samples into an order of its own before
them, and back behind them. A proof finds whose rows they are in its own pass alone, and where the first batches happen
to be in order, all looks right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipcore.capture.graph.kept_tensors import is_once_only
from lipcore.capture.graph.row_moves import may_move, moves_along
from lipcore.capture.graph.walk import shapes
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.models.outputs import nodes_before, nodes_of, tensors_of
from lipcore.models.torch_internals import saved

_PRODUCTS = ("Mm", "Bmm")  # with a matrix of 0 and 1
WHY = (
    "the model puts its samples into another order between this layer and its output ({0}), which may be a new one in "
    "every pass"
)


def reordered_layers(output: Any, samples: int) -> list[tuple[LayerSite, str]]:
    """Return the layers to which every way from a model's outputs leads through a node that may put as many rows as
    there are samples into another order, and what is to be said of each."""
    if samples < 2:
        return []
    moves = [node for node in nodes_of(output) if _reorders(node, samples)]
    if not moves:
        return []
    roots = [tensor.grad_fn for tensor in tensors_of(output) if tensor.grad_fn is not None]
    free = set(nodes_before(roots, without=moves))
    why = WHY.format(moves[0].name())
    found = {
        site: why
        for node in nodes_before(moves)
        if node not in free and isinstance(site := getattr(node, "site", None), LayerSite)
    }
    return list(found.items())


def _reorders(node: Any, samples: int) -> bool:
    """Return whether a node may put `samples` rows into another order, whatever its index is in this pass."""
    name: str = node.name()
    if not (may_move(node) or name.startswith(_PRODUCTS)) or name.startswith("Masked"):
        return False  # masks keep the order
    shape = shapes(node)[0]
    if not shape or shape[0] != samples:
        return False
    behind = [child for child, _ in node.next_functions]
    if name.startswith(_PRODUCTS):
        return behind[0] is None and not is_once_only(node) and _is_square(saved(node, "self"), samples)
    if all(child is None or shapes(child)[0][:1] != (samples,) for child in behind):
        return False
    indices = None if is_once_only(node) else saved(node, "indices")
    if isinstance(indices, (tuple, list)):
        given = [each for each in indices if isinstance(each, Tensor)]
        # Two are a place in each sample, x[torch.arange(B), last].
        return len(given) == 1 and indices[0] is not None and given[0].dtype not in (torch.bool, torch.uint8)
    return moves_along(node, 0, len(shape))


def _is_square(matrix: Any, samples: int) -> bool:
    return isinstance(matrix, Tensor) and tuple(matrix.shape[-2:]) == (samples, samples)
