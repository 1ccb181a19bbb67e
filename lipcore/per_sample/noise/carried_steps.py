"""Steps of the open window that other ranks have made, after which the noise scale of all ranks goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipcore.distributed.placed import counts_here, tied_to
from lipcore.distributed.rank_axis import Place
from lipcore.metric.state import checked_tensor, is_count

_GRADIENTS, _TOTALS = 2, 3  # of `sums`
_NOTHING, _ALL = 3, 4  # columns of the totals


@dataclass
class CarriedSteps:
    """Sums that ranks add up per step, as :meth:`RankNoise.sums` of one of them says it, and why steps are left out.

    Attributes:
        sums: weighted squares, squares with squared weights and gradients [steps, places], totals [steps, 5].
        codes: [steps], 0 or 1 + the number of a reason.
        averaged: over how many ranks the gradient was the mean.
    """

    sums: list[Tensor]
    codes: Tensor
    reasons: list[str]
    averaged: int

    @classmethod
    def nothing(cls, steps: int, places: int, averaged: int) -> CarriedSteps:
        """Return those of a rank that goes on from none of the ranks that have made so many steps."""
        zeros = torch.zeros(steps, places, dtype=torch.float64, device="cpu")
        sums = [zeros, zeros.clone(), zeros.clone(), zeros.new_zeros(steps, 5)]
        return cls(sums, zeros.new_zeros(steps), [], averaged)

    def plus(self, other: CarriedSteps) -> CarriedSteps:
        """Return those of several ranks over the same steps."""
        reasons = sorted({*self.reasons, *other.reasons})
        codes = torch.maximum(self.codes_among(reasons), other.codes_among(reasons))
        added = [mine + theirs for mine, theirs in zip(self.sums, other.sums, strict=True)]
        return CarriedSteps(added, codes, reasons, self.averaged)

    def followed_by(self, later: CarriedSteps) -> CarriedSteps:
        """Return these steps and later ones of the same window."""
        reasons = sorted({*self.reasons, *later.reasons})
        codes = torch.cat([self.codes_among(reasons), later.codes_among(reasons)])
        both = zip(self.scaled_to(later.averaged), later.sums, strict=True)
        return CarriedSteps([torch.cat(pair) for pair in both], codes, reasons, later.averaged)

    def codes_among(self, reasons: Sequence[str]) -> Tensor:
        """Return the codes by the numbers that reasons have in this list."""
        numbers = [0.0, *(1.0 + reasons.index(reason) for reason in self.reasons)]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")[self.codes.clamp(min=0).long()]

    def scaled_to(self, averaged: int) -> list[Tensor]:
        """Return the sums as if the gradient had been the mean over so many ranks, all of which had made the steps."""
        ratio = averaged / self.averaged
        gradients, totals = self.sums[_GRADIENTS] / ratio**2, self.sums[_TOTALS].clone()
        totals[:, _NOTHING] *= ratio
        totals[:, _ALL] /= ratio**2
        return [*self.sums[:_GRADIENTS], gradients, totals]

    def state(self) -> dict[str, Any]:
        """Return it as a checkpoint holds it."""
        return {"sums": self.sums, "codes": self.codes, "reasons": self.reasons, "averaged": self.averaged}

    @classmethod
    def of_state(cls, state: Any, places: int) -> CarriedSteps:
        """Return it from :meth:`state`; ValueError naming what does not fit."""
        if not isinstance(state, dict) or not is_count(state.get("averaged")) or not state["averaged"]:
            raise ValueError(f"averaged: expected steps over a number of ranks, got {state!r:.80}")
        codes = checked_tensor("codes", state.get("codes"), torch.float64, (None,))
        sums, reasons = state.get("sums"), state.get("reasons")
        if not isinstance(sums, list) or len(sums) != 4 or not isinstance(reasons, list):
            raise ValueError(f"sums: expected four tensors and reasons, got {sums!r:.80}")
        widths = [places, places, places, 5]
        found = [
            checked_tensor(f"sums[{i}]", each, torch.float64, (len(codes), width))
            for i, (each, width) in enumerate(zip(sums, widths, strict=True))
        ]
        if not bool((codes <= len(reasons)).all()):
            raise ValueError("codes: a reason is not among those that are named")
        return cls(found, codes, [str(reason) for reason in reasons], state["averaged"])


@dataclass
class PlacedOwners:
    """Owners of parameters, as their placements say it, without a word of other ranks.

    Attributes:
        mine: those that this rank counts.
        copies: on how many ranks the part of a parameter is that this rank holds.
        tied: why that cannot be said; "" where it can.
    """

    mine: frozenset[str]
    copies: Mapping[str, int]
    tied: str

    @classmethod
    def of(cls, held: Sequence[tuple[str, str, Any]], place: Place) -> PlacedOwners:
        """Find it for (name, group, tensor) of each parameter."""
        tied = next((f"parameter '{name}' {why}" for name, _, t in held if (why := tied_to(t, place.numbers))), "")
        mine = frozenset(name for name, _, tensor in held if counts_here(tensor, place.rank))
        return cls(mine, {name: _copies(tensor, place) for name, _, tensor in held}, tied)


def _copies(tensor: Any, place: Place) -> int:
    if not hasattr(tensor, "placements"):
        return place.ranks
    mesh = tensor.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(tensor.placements) if placement.is_replicate())
