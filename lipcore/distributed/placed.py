"""Tensors that lie as a parameter does: whole on each rank, or in parts of which a DTensor knows where they belong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def placed_like(local: Tensor, parameter: Any) -> Tensor:
    """Return a tensor of this rank's elements of a parameter with that one's placements, so that a checkpoint can cut
    it for another number of ranks; of a parameter that is no DTensor, the tensor itself. No collective."""
    if not hasattr(parameter, "placements"):
        return local
    from torch.distributed.tensor import DTensor

    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    return DTensor.from_local(local, mesh, parameter.placements, run_check=False, shape=shape, stride=stride)


def counts_here(tensor: Any, place: int) -> bool:
    """Return whether the rank at this place of its group is the one that counts the part of a parameter that it holds,
    as far as its mesh and placements say it: each part is counted once where :func:`tied_to` says nothing."""
    if not hasattr(tensor, "placements"):
        return place == 0
    coordinate = tensor.device_mesh.get_coordinate()
    pairs = zip(coordinate, tensor.placements, strict=True)
    return all(at == 0 for at, placement in pairs if placement.is_replicate())


def tied_to(tensor: Any, ranks: Sequence[int]) -> str:
    """Say on which of the ranks a parameter lies, where it is not all of them: whether others hold replicas of it, or
    other parts, its placements do not say then. "" where they say all."""
    if not hasattr(tensor, "placements"):
        return ""
    mesh = sorted(tensor.device_mesh.mesh.flatten().tolist())
    return "" if mesh == sorted(ranks) else f"lies on a mesh of ranks {_shown(mesh)} out of {_shown(sorted(ranks))}"


def _shown(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
