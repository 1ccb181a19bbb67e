"""A call that all ranks of a group make, once they have agreed on it: all memory that its collectives take is there on
each of them before one starts, so that a rank on which there is none leaves no other in a collective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lipcore.distributed.group import Group
from lipcore.distributed.meeting import Header
from lipcore.distributed.partners import Partners

_MOST_WORDS = 240  # characters of an error that other ranks are told
_LEAST, _MOST_KEPT = 1 << 10, 8 << 20  # numbers
_NO_MEMORY = (
    "{0}: there is no memory for {1} of it ({2}). No collective was started; this rank's own numbers can be read, and "
    "the next call asks anew"
)


@dataclass(frozen=True)
class Agreed:
    """A call.

    Attributes:
        partners: by which the ranks meet.
        group: its ranks.
        what: it is, in words.
        step: of the training.
    """

    partners: Partners
    group: Group
    what: str
    step: int

    def say(self, about: str, words: Header) -> list[Header]:
        """Return what all ranks say, in their order; no collective. What :meth:`Partners.meet` raises."""
        return self.partners.meet(self.group, f"{self.what}: {about}", self.step, words)

    def room(self, count: int) -> Tensor:
        """Return so many float64 numbers on the device of the group's collectives; the same on all ranks, which call
        this with the same count. What the last call returned is overwritten. Where they have not had as many before,
        each says whether it has them now.

        Raises:
            RuntimeError: on all ranks, where one has no memory or does not come.
        """
        kept = self.partners.kept(self.group)
        if len(kept) and len(kept[0]) >= count:
            return kept[0][:count]
        size = max(_LEAST, count if count > _MOST_KEPT else min(2 * count, _MOST_KEPT))
        found, error = None, ""
        try:
            found = torch.zeros(size, dtype=torch.float64, device=self.group.device)
        except Exception as why:  # what an allocator raises
            error = words_of(why)
        said = zip(self.group.ranks, self.say(f"memory for {count} numbers", {"error": error}), strict=True)
        if lacks := {rank: other["error"] for rank, other in said if other["error"]}:
            ranks = ", ".join(f"rank {rank}" for rank in lacks)
            raise RuntimeError(f"lipcore: {_NO_MEMORY.format(self.what, ranks, next(iter(lacks.values())))}")
        assert found is not None
        if size <= _MOST_KEPT:
            kept[:] = [found]
        return found[:count]


def words_of(error: Exception) -> str:
    """Return the kind and the words of an error, as short and plain as other ranks are told them."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)[:_MOST_WORDS]
