"""Where each rank's part of a DTensor lies, said in words that all of its ranks say alike, so that they need not read
each other's: its mesh and how it is placed there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lipcore.models.torch_internals import shard_at, shard_of

Shape = tuple[int, ...]
Place = tuple[Shape, Shape]  #: offset in the whole tensor, and shape
Layout = dict[str, Any]  #: JSON-ready
_KINDS: Mapping[str, tuple[str, ...]] = {"Replicate": (), "Shard": ("dim",), "_StridedShard": ("dim", "split_factor")}


def layout_of(tensor: Any) -> Layout | None:
    """Return how a DTensor lies on its ranks; None where such words do not lead back to what this rank holds."""
    kinds = [(type(each).__name__, each) for each in tensor.placements]
    mesh = tensor.device_mesh
    if any(kind not in _KINDS for kind, _ in kinds) or mesh.get_coordinate() is None:
        return None
    words = [[kind, {name: int(getattr(each, name)) for name in _KINDS[kind]}] for kind, each in kinds]
    found: Layout = {"mesh": mesh.mesh.flatten().tolist(), "sizes": list(mesh.shape), "placements": words}
    shape, offset = shard_of(tensor)
    return found if place_of(found, tuple(tensor.shape), mesh.get_rank()) == (offset, shape) else None


def is_alone(layout: Layout, ranks: Sequence[int]) -> bool:
    """Return whether each of these ranks holds a part that no other one holds."""
    on_each = zip(layout["placements"], layout["sizes"], strict=True)
    cut = all(kind != "Replicate" or size == 1 for (kind, _), size in on_each)
    return cut and sorted(layout["mesh"]) == sorted(ranks)


def place_of(layout: Layout, whole: Shape, rank: int) -> Place:
    """Return where a rank's part of a tensor of this shape lies; ValueError where the rank is not on the mesh."""
    at, sizes = layout["mesh"].index(rank), layout["sizes"]
    coordinate = [at // math.prod(sizes[i + 1 :]) % size for i, size in enumerate(sizes)]
    shape, offset = shard_at(whole, sizes, coordinate, layout["placements"])
    return offset, shape
