"""Which rank counts which part of which parameter, found from what the ranks hold."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lipcore.distributed.layouts import Layout, Place, is_alone, layout_of, place_of
from lipcore.models.bits import bits_of
from lipcore.models.dtensors import local_of
from lipcore.models.torch_internals import shard_of

Shape = tuple[int, ...]
Description = dict[str, Any]  #: JSON-ready


@dataclass(frozen=True)
class Piece:
    """What one rank holds of one parameter."""

    group: str  #: to which group of parameters it adds
    whole: Shape  #: shape of the whole parameter
    offset: Shape
    shape: Shape
    bits: str  #: a sum of its elements' bits: replicas have the same; "" where there can be none
    kept: bool = True  #: this rank could count it

    @property
    def place(self) -> tuple[Shape, Shape]:
        """Where in the whole parameter it lies."""
        return self.offset, self.shape

    @property
    def count(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


def describe(
    parameters: Iterable[tuple[str, str, Any]], kept: Collection[str] | None = None, ranks: Sequence[int] = ()
) -> Description:
    """Return what this rank holds, for :meth:`Ownership.of`; waits for the device once. Ranks that hold other parts of
    the same DTensors have the same to say of them, as far as no two of `ranks` hold the same part.

    Args:
        parameters: (name, group, tensor) of each; of a DTensor, the tensor itself.
        kept: names of those that this rank could count; None: of all.
        ranks: of the group.
    """
    found = list(parameters)
    local = [local_of(tensor).detach() for _, _, tensor in found]
    layouts = [layout_of(t) if hasattr(t, "placements") else None for *_, t in found]
    alone = [layout is not None and is_alone(layout, ranks) for layout in layouts]
    asked = [bits_of(part) for part, unique in zip(local, alone, strict=True) if not unique]
    sums = iter(torch.stack(asked).tolist() if asked else [])
    bits = ["" if unique else f"{next(sums) & (1 << 64) - 1:016x}" for unique in alone]  # as long for other values
    different: list[Layout] = []
    out: Description = {"names": [], "groups": [], "whole": [], "offset": [], "shape": [], "bits": bits}
    out["layouts"] = different
    for (name, group, tensor), part, layout in zip(found, local, layouts, strict=True):
        out["names"].append(name)
        out["groups"].append(group)
        out["whole"].append(list(tensor.shape))
        if layout is not None and layout not in different:
            different.append(layout)
        in_parts = layout is None and part is not tensor and hasattr(tensor, "_local_tensor")
        offset = shard_of(tensor)[1] if in_parts else ()
        # The number of a layout in the place of offset and shape.
        out["offset"].append(different.index(layout) if layout is not None else list(offset) or [0] * tensor.ndim)
        out["shape"].append(None if layout is not None else list(part.shape))
    if kept is not None:
        out["kept"] = [int(name in kept) for name in out["names"]]
    return out


class Ownership:
    """Every parameter's pieces over the ranks of a group, each counted by one of them.

    Attributes:
        names: of all parameters on all ranks, in the order in which ranks name them.
        groups: the group of each.
        mine: those of them of which this rank counts its piece.
        copies: on how many ranks the piece of a parameter is that this rank holds, this one included.
        everywhere: those that every rank holds, wholly or in part.
        whole: those of which one rank counts all.
        replicas: those that every rank holds whole, and measures.
    """

    def __init__(self, pieces: Sequence[Mapping[str, Piece]], ranks: Sequence[int], here: int) -> None:
        self.names = list(dict.fromkeys(name for each in pieces for name in each))
        self.groups: list[str] = []
        self.mine: frozenset[str] = frozenset()
        self.copies: dict[str, int] = {}
        counted: dict[str, set[int]] = {}
        replicas: list[str] = []
        empty: dict[str, set[int]] = {}
        for name in self.names:
            held = [(i, each[name]) for i, each in enumerate(pieces) if name in each]
            owners = _owners(name, held, ranks)
            self.groups.append(held[0][1].group)
            counted[name] = set(owners.values())
            empty[name] = {i for i, piece in held if not piece.count}
            alike = len(held) == len(pieces) and len({piece.place for _, piece in held}) == 1
            if alike and all(piece.kept for _, piece in held):
                replicas.append(name)
            if name in pieces[here]:
                place = pieces[here][name].place
                self.copies[name] = sum(piece.place == place for _, piece in held)
        self.mine = frozenset(name for name, owners in counted.items() if here in owners)
        self.whole = frozenset(name for name, owners in counted.items() if len(owners) == 1)
        self.everywhere = frozenset(name for name in self.names if all(name in each for each in pieces))
        self.replicas = frozenset(replicas)
        self._counted, self._empty = counted, empty

    @classmethod
    def of(cls, descriptions: Sequence[Description], ranks: Sequence[int], here: int) -> Ownership:
        """Find it from the descriptions of all ranks, the same on each of them.

        Raises:
            ValueError: pieces of one name that do not make one parameter; the message names the parameter and ranks.
        """
        for i, description in enumerate(descriptions):
            if "refused" in description:
                raise ValueError(f"rank {ranks[i]}: {description['refused']}")
        known: dict[Any, Place] = {}  # of all ranks' layouts
        return cls([_pieces(each, rank, known) for each, rank in zip(descriptions, ranks, strict=True)], ranks, here)

    def alone(self, names: Iterable[str]) -> bool:
        """Return whether one rank counts all of these parameters, whole."""
        owners = [self._counted[name] for name in names]
        return len(set().union(*owners)) == 1

    def counted_together(self, names: Iterable[str]) -> bool:
        """Return whether each rank counts all of what it holds of these parameters, or none of it."""
        names = list(names)
        some = set().union(*(self._counted[name] for name in names))
        return all(some - self._counted[name] <= self._empty[name] for name in names)


def _pieces(description: Description, rank: int, known: dict[Any, Place]) -> dict[str, Piece]:
    """Return what a rank holds, by name; `known` are places that were found for the same words before."""
    layouts = description.get("layouts", [])
    words = [json.dumps([each["placements"], each["sizes"], each["mesh"].index(rank)]) for each in layouts]

    def place(whole: Shape, offset: Any, shape: Any) -> Place:
        if shape is not None:
            return tuple(offset), tuple(shape)
        key = words[offset], whole
        if key not in known:
            known[key] = place_of(layouts[offset], whole, rank)
        return known[key]

    names = description["names"]
    kept = description.get("kept", [1] * len(names))
    rows = zip(*(description[key] for key in ("groups", "whole", "offset", "shape", "bits")), kept, strict=True)
    return {
        name: Piece(group, tuple(whole), *place(tuple(whole), offset, shape), bits, bool(keeps))
        for name, (group, whole, offset, shape, bits, keeps) in zip(names, rows, strict=True)
    }


def _owners(name: str, held: Sequence[tuple[int, Piece]], ranks: Sequence[int]) -> dict[tuple[Shape, Shape], int]:
    """Return the rank that counts each piece: the lowest that holds it."""
    first, reference = held[0]
    owners: dict[tuple[Shape, Shape], int] = {}
    bits: dict[tuple[Shape, Shape], tuple[int, str]] = {}
    for i, piece in held:
        if piece.whole != reference.whole:
            raise ValueError(
                f"parameter '{name}' has shape {list(reference.whole)} on rank {ranks[first]} and {list(piece.whole)} "
                f"on rank {ranks[i]}, so these are not parts of one parameter. Stages of a pipeline: give each rank "
                "names of its own with prefix=; pieces that are not DTensors (FSDP1) cannot be merged: use "
                "fully_shard()"
            )
        if piece.group != reference.group:
            raise ValueError(
                f"parameter '{name}' is in group {reference.group!r} on rank {ranks[first]} and in {piece.group!r} on "
                f"rank {ranks[i]}; pass the same groups= on all ranks"
            )
        other, its_bits = bits.setdefault(piece.place, (i, piece.bits))
        if its_bits != piece.bits:
            raise ValueError(
                f"parameter '{name}' has other values on rank {ranks[i]} than on rank {ranks[other]}, where it should "
                "be the same. Models that are trained apart: pass group= (or group=None), the ranks that train one "
                "model; stages of a pipeline: prefix=; weights that ranks average now and then (local SGD): "
                "group=None, for each rank's own numbers"
            )
        if piece.count and piece.kept:
            owners.setdefault(piece.place, i)
    if nobodys := [i for i, piece in held if piece.count and piece.place not in owners]:
        raise ValueError(
            f"parameter '{name}': rank {ranks[nobodys[0]]} leaves it to another rank (split_replicas), and no rank of "
            "the group keeps it: the ranks that share parameters have to be those of group=, and all of them have to "
            "hold the same ones (stages of a pipeline do not); leave split_replicas out"
        )
    covered, total = sum(math.prod(shape) for _, shape in owners), math.prod(reference.whole)
    if covered != total:
        raise ValueError(
            f"parameter '{name}': the ranks hold {covered} of its {total} elements between them, so its pieces overlap "
            "or one is missing; pass as group= all ranks that hold a part of it"
        )
    return owners or {reference.place: first}
