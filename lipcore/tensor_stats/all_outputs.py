"""What all ranks measure of what modules return: the same everywhere, but that each stage of a pipeline has its own,
under its prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lipcore.tensor_stats.attention import HeadBounds
from lipcore.tensor_stats.extra import Extra
from lipcore.tensor_stats.logits import LogSumExp
from lipcore.tensor_stats.router import RouterShares
from lipcore.tensor_stats.watched import Watched

_KINDS: dict[str, type[Extra]] = {kind.kind: kind for kind in (HeadBounds, RouterShares, LogSumExp)}
_COLLIDE = (
    "rank {0} (prefix {1!r}) and rank {2} (prefix {3!r}) both measure '{4}', and are not ranks of one stage; give "
    "stages prefixes under which no names are the same"
)


def told_of(watched: Watched) -> dict[str, Any]:
    """Return what this rank measures, JSON-ready, for the other ranks."""
    extras = [[extra.kind, extra.place, extra.sums, extra.most, extra.named] for extra in watched.extras]
    return {"prefix": watched.prefix, "outputs": watched.places_of_outputs, "extras": extras}


@dataclass
class AllOutputs:
    """Places of the outputs of all ranks, and what is made of outputs beside statistics.

    Attributes:
        places: of outputs, those of the first rank first.
        extras: each with where its sums and its maxima stand among those of all.
        sums, most: how many of these there are.
    """

    places: list[str]
    extras: list[tuple[Extra, slice, slice]]
    sums: int
    most: int

    @classmethod
    def of(cls, told: Sequence[dict[str, Any]]) -> AllOutputs:
        """Join what ranks have told."""
        places = list(dict.fromkeys(place for each in told for place in each["outputs"]))
        extras: list[tuple[Extra, slice, slice]] = []
        sums = most = 0
        for kind, place, more, larger, named in dict.fromkeys(tuple(one) for each in told for one in each["extras"]):
            extra = _KINDS[kind].described(place, more, larger, named=named)
            extras.append((extra, slice(sums, sums + more), slice(most, most + larger)))
            sums, most = sums + more, most + larger
        return cls(places, extras, sums, most)

    def slices_of(self, extra: Extra) -> tuple[slice, slice]:
        """Return where the sums and maxima of one of this rank's stand."""
        return next((s, m) for one, s, m in self.extras if (one.kind, one.place) == (extra.kind, extra.place))


def why_not_joined(told: Sequence[dict[str, Any]], ranks: Sequence[int]) -> str:
    """Return why what the ranks measure does not go together; "" where it does."""
    first: dict[str, tuple[int, dict[str, Any]]] = {}  # by prefix
    owner: dict[tuple[str, ...], tuple[int, str]] = {}  # by what is measured
    for rank, each in zip(ranks, told, strict=True):
        prefix = each["prefix"]
        before, theirs = first.setdefault(prefix, (rank, each))
        for key in ("outputs", "extras"):
            if each[key] != theirs[key]:
                return f"{key} is {theirs[key]!r} on rank {before} and {each[key]!r} on rank {rank}"
        for place in [("output", place) for place in each["outputs"]] + [tuple(one[:2]) for one in each["extras"]]:
            other, name = owner.setdefault(place, (rank, prefix))
            if name != prefix:
                return _COLLIDE.format(other, name, rank, prefix, place[1])
    return ""
