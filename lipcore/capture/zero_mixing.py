"""Samples that are mixed by factors which are 0 in a pass, and need not be in another one: a gate that begins at 0."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch

from lipcore.capture.foreign_functions import function_of, is_foreign
from lipcore.capture.graph.orders import joins
from lipcore.capture.graph.row_moves import is_permutation, may_move, moves_along
from lipcore.capture.graph.walk import shapes
from lipcore.capture.proof import Point, RowIds, squared_norms
from lipcore.capture.seeds import Seeds
from lipcore.models.outputs import nodes_of
from lipcore.models.torch_internals import BackwardHookFunction

BY_ZERO = (
    "in a pass that was proved the model mixed its samples by a factor of exactly 0 (a gate that begins there, or a "
    "mask), which need not be 0 in this pass"
)


def mixes_by_zero(seeds: Seeds, points: Sequence[Point], rows: Sequence[RowIds | None]) -> bool:
    """Return whether rows of a sample depend on another sample's outputs by a factor that is 0.

    One more backward pass shows it, in which one sample's gradients are NaN, since 0 times NaN is NaN too. It is run
    where the graph has a node that may mix samples, and no function or hook of the user's that would see NaN.
    """
    nodes = list(nodes_of(seeds.outputs))
    if not _may_be_asked(nodes, seeds.size):
        return False
    sample = seeds.size // 2
    weights = torch.ones(seeds.size, device="cpu")
    weights[sample] = torch.nan
    try:
        with torch.autograd.set_detect_anomaly(False):
            found = squared_norms(seeds, points, weights)
    except Exception:  # a hook on a tensor that wants no NaN
        return False
    pairs = [(row, each) for row, each in zip(rows, found, strict=True) if row is not None and each is not None]
    return any(bool((each.isnan() & (row.ids >= 0) & (row.ids != sample)).any()) for row, each in pairs)


def _may_be_asked(nodes: Collection[Any], samples: int) -> bool:
    for node in nodes:
        # What a permutation matrix does is known otherwise.
        if is_foreign(node) or function_of(node) is BackwardHookFunction or is_permutation(node, samples):
            return False
    return any(_may_mix(node, samples) for node in nodes)


def _may_mix(node: Any, samples: int) -> bool:
    """Return whether a node makes one of all samples, or something of each two, or puts them into another order."""
    shape = shapes(node)[0]
    if shape.count(samples) > 1 or joins(node, samples):
        return True
    if may_move(node):
        return bool(shape) and moves_along(node, 0, len(shape))
    behind = [shapes(child)[number] for child, number in node.next_functions if child is not None]
    fewer = [other for other in behind if math.prod(shape) < math.prod(other)]  # flattened rows are as many
    return samples not in shape and any(other[:1] == (samples,) for other in fewer)
