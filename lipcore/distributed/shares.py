"""Which of the ranks that hold a parameter alike keeps what is known of it, so that they share memory and work."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from lipcore.distributed.group import Group


class _Replicas(NamedTuple):
    """Ranks that hold the same part of a parameter."""

    kind: str  #: the same for parameters that the same ranks hold alike
    copies: int
    here: int  #: which of them this rank is


class Shares:
    """The shares of the replicas: each parameter, or part of one, is kept whole by one of the ranks that hold it alike,
    so that all have about as many elements. It follows from names and shapes alone, so ranks need not speak of it, and
    what a rank once keeps it goes on to keep."""

    def __init__(self) -> None:
        self._kept_by: dict[str, tuple[_Replicas, int]] = {}  # by parameter: which of the replicas

    def mine(self, parameters: Iterable[tuple[str, Any]], group: Group | None) -> set[str]:
        """Return the names of those that this rank keeps.

        Args:
            parameters: (name, tensor) of all that this rank holds, in the same order on all ranks.
            group: the ranks that hold alike what is no DTensor; None: this process alone.

        Raises:
            ValueError: some rank would keep nothing: there are more ranks than parameters, or those that it keeps are
                gone. The same on all ranks, and nothing has changed.
        """
        held = {name: (_replicas_of(tensor, group), _elements(tensor)) for name, tensor in parameters}
        before = {name: found for name, found in self._kept_by.items() if name in held and held[name][0] == found[0]}
        loads: dict[str, list[tuple[int, int]]] = {}  # elements and parameters of each replica, by kind
        for name, (replicas, elements) in held.items():
            load = loads.setdefault(replicas.kind, [(0, 0)] * replicas.copies)
            if name in before:
                load[before[name][1]] = _plus(load[before[name][1]], elements)
        for name in sorted(held.keys() - before.keys(), key=lambda name: (-held[name][1], name)):
            replicas, elements = held[name]
            load = loads[replicas.kind]
            least = min(range(replicas.copies), key=lambda place: (load[place], place))
            load[least] = _plus(load[least], elements)
            before[name] = replicas, least
        _check(loads, anew=not self._kept_by)
        self._kept_by = before
        return {name for name, (replicas, keeper) in before.items() if keeper == replicas.here}


def _check(loads: dict[str, list[tuple[int, int]]], *, anew: bool) -> None:
    """Raise ValueError where a rank would keep nothing."""
    if not all(any(not parameters for _, parameters in load) for load in loads.values()):
        return
    load = next(iter(loads.values()), [])
    count = sum(parameters for _, parameters in load)
    if anew or count < len(load):
        raise ValueError(
            f"split_replicas: {len(load)} ranks hold the same {count} parameters, and each of them has to keep one at "
            "least; leave it out"
        )
    bare = next(place for place, (_, parameters) in enumerate(load) if not parameters)
    raise ValueError(
        f"split_replicas: all parameters that one of {len(load)} ranks keeps (number {bare} of them) were removed or "
        f"frozen, and what is known of the other {count} does not move between ranks. Leave split_replicas out, or end "
        "this Monitor and make a new one with a new Trajectory, which shares them anew"
    )


def _replicas_of(tensor: Any, group: Group | None) -> _Replicas:
    if not hasattr(tensor, "placements"):
        return _Replicas("", 1, 0) if group is None else _Replicas("", group.size, group.place)
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    dims = [dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]
    here = 0
    for dim in dims:
        here = here * mesh.size(dim) + coordinate[dim]
    return _Replicas(f"{tuple(mesh.shape)} {dims}", math.prod(mesh.size(dim) for dim in dims), here)


def _elements(tensor: Any) -> int:
    return math.prod(tensor.shape)  # of the whole: shards may be uneven, and all ranks have to find the same


def _plus(load: tuple[int, int], elements: int) -> tuple[int, int]:
    return load[0] + elements, load[1] + 1
