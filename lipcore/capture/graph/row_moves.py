"""Nodes of a graph that may move rows from one place to another by tensors that are others in every pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lipcore.capture.graph.kept_tensors import is_once_only
from lipcore.capture.graph.orders import joins
from lipcore.capture.graph.walk import Walk, shapes
from lipcore.models.torch_internals import saved

_KINDS = ("Index", "UnsafeIndex", "Gather", "Scatter", "Masked", "Take", "Sort", "Topk", "Kthvalue")
#: Products of matrices: what keeps their factors.
_PRODUCTS = {
    "Mm": ("self", "mat2"),
    "Bmm": ("self", "mat2"),
    "Addmm": ("mat1", "mat2"),
    "Baddbmm": ("batch1", "batch2"),
}


def may_move(node: Any) -> bool:
    """Return whether a node's name is one of those that choose rows by the values of a tensor."""
    name: str = node.name()
    if name.startswith("EmbeddingBackward"):  # of a table that the model has made of its samples
        table = node.next_functions[0][0]
        return table is not None and not hasattr(table, "variable")
    return name.startswith(_KINDS) and not name.startswith("MaskedFill")


def is_permutation(node: Any, samples: int) -> bool:
    """Return whether a node is the product of a square matrix that needs no gradient with as many rows as samples: of 0
    and 1, it puts them into another order."""
    return _matrix(node, samples) is not None


def _matrix(node: Any, samples: int) -> Tensor | None:
    """Return that matrix of a product, which may stand left or right; None where there is none."""
    name: str = node.name().partition("Backward")[0]
    if name not in _PRODUCTS or is_once_only(node):
        return None
    factors = _PRODUCTS[name]
    edges = node.next_functions[-len(factors) :]
    for factor, (child, _) in zip(factors, edges, strict=True):
        matrix = saved(node, factor) if child is None else None
        if isinstance(matrix, Tensor) and tuple(matrix.shape[-2:]) == (samples, samples):
            return matrix
    return None


def moves_along(node: Any, dim: int, dimensions: int) -> bool:
    """Return whether such a node chooses along a dimension of its output; those that say none may."""
    along = saved(node, "dim")
    if not isinstance(along, int):
        return True
    return along % (1 << 64) % dimensions == dim if along >= 0 else along % dimensions == dim


def keeps_samples(node: Any, samples: int) -> bool:
    """Return whether an index takes each sample's own row: `x[torch.arange(B), last]`, or none along the batch; or a
    product is with a matrix of ones on its diagonal."""
    if is_once_only(node):  # read once more it may raise
        return False
    matrix = _matrix(node, samples)
    if matrix is not None:
        return torch.equal(matrix, torch.eye(samples, dtype=matrix.dtype, device=matrix.device).expand_as(matrix))
    indices = saved(node, "indices")
    if isinstance(indices, (tuple, list)) and indices:
        if indices[0] is None:
            return True
        first = indices[0]
    else:
        first = saved(node, "index")
    if not isinstance(first, Tensor) or first.dtype == torch.bool or first.numel() != samples:
        return False
    return torch.equal(first.reshape(-1), torch.arange(samples, dtype=first.dtype, device=first.device))


class Moves:
    """The nodes that move rows along the batch by the values of a tensor, and what lies behind them; with `joining`,
    those too that join rows in an order which their edges say.

    Attributes:
        below: places behind one of them.
        inside: places to which every way from one of the model's outputs leads through one: where rows may be in
            another order although there are as many as samples.
        indexed: nodes that do not move rows as long as their index is each sample's own.
    """

    def __init__(self, walk: Walk, samples: int, *, joining: bool = False) -> None:
        self.indexed: list[int] = []
        moves = {place for place, node in enumerate(walk.nodes) if self._moves(place, node, samples)}
        if joining:
            moves |= {place for place, node in enumerate(walk.nodes) if joins(node, samples)}
        self.below = walk.behind(c for place in moves for c in walk.next[place])
        self.inside = self.below - walk.behind(walk.roots, moves)
        # A loss beside, one number, may choose among the rows of what is returned.
        several = [root for root in walk.roots if math.prod(walk.shapes(root)[0]) > 1] if moves else []
        for root in several:
            self.inside |= (self.below & walk.behind([root])) - walk.behind([root], moves)

    def _moves(self, place: int, node: Any, samples: int) -> bool:
        if not (may_move(node) or is_permutation(node, samples)):
            return False
        shape = shapes(node)[0]
        if shape and shape[0] == samples and not moves_along(node, 0, len(shape)):
            return False
        if keeps_samples(node, samples):
            self.indexed.append(place)
            return False
        return True
