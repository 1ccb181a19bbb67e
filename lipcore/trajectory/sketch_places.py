"""Where the elements of parameters stand among those of the whole model, and which parameters share a sketch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

from lipcore.models.torch_internals import shard_of
from lipcore.trajectory.parameters import WatchedParameter

_ALIGN = 64  # elements; every parameter starts a run of whole groups of the hash


def first_indices(watched: Sequence[WatchedParameter]) -> list[int]:
    """Return the index of the first element of each parameter here: no two elements of the whole model have the same,
    whichever rank holds them, so that the sketches of shards add up to that of the model."""
    found, after = [], 0
    for parameter in watched:
        tensor: Any = parameter.owner[parameter.key]
        found.append(after + (start_of(tensor.shape, *shard_of(tensor)) if _is_shard(tensor) else 0))
        after += -(-tensor.numel() // _ALIGN) * _ALIGN
    return found


def start_of(whole: Sequence[int], shape: Sequence[int], offset: Sequence[int]) -> int:
    """Return how many elements of a parameter stand before a shard: those of the shards before it along the last
    dimension that is cut, then along the one before. Along the first dimension this is the index in memory of the whole
    parameter; along others shards have stretches of their own, which depend on the cuts."""
    block, before = list(whole), 0
    for dim in reversed(range(len(block))):
        if shape[dim] != whole[dim]:
            before += offset[dim] * math.prod(block[:dim] + block[dim + 1 :])
            block[dim] = shape[dim]
    return before


def holders_of(parameter: WatchedParameter) -> Hashable:
    """Return what parameters have alike that the same ranks hold copies of; those of a group share a sketch."""
    tensor: Any = parameter.owner[parameter.key]
    if not _is_shard(tensor):
        return ()
    mesh = tensor.device_mesh
    copies = tuple(bool(placement.is_replicate()) for placement in tensor.placements)
    return (tuple(mesh.mesh.shape), tuple(mesh.mesh.flatten().tolist()), copies)


def _is_shard(tensor: Any) -> bool:
    return type(tensor).__name__ == "DTensor"
