"""The gradient noise scale of all ranks: their samples as they entered the gradient that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lipcore.distributed.ownership import Ownership
from lipcore.metric.state import is_count, under_key
from lipcore.per_sample.noise.carried_steps import CarriedSteps, PlacedOwners
from lipcore.per_sample.noise.noise_scale import NoiseScale
from lipcore.per_sample.noise.noise_sums import JENSEN, NO_SAMPLES
from lipcore.per_sample.noise.rank_steps import NOTHING, StepTable

NOT_REDUCED = (
    "ranks hold other gradients of parameters that they hold alike when the backward pass is over, so that it is no "
    "gradient of all their samples; reduce it in the backward pass (DistributedDataParallel, fully_shard()), or pass "
    "group=None where each rank trains a model of its own"
)
ON_ONE_RANK = "a rank has recorded no backward pass in it, and others have"
_SAME = 1e-9  # of sums of the same squares in another order
_SAMPLES, _ONES, _SQUARES, _NOTHING, _ALL = range(5)  # columns of `totals`


@dataclass
class NoiseSoFar:
    """The noise scale up to a step, whose exponential averages go on in later windows."""

    scale: NoiseScale | None = None
    end: int = -1  #: after how many steps

    def state(self) -> dict[str, Any]:
        """Return it as a checkpoint holds it."""
        if self.scale is None or self.end < 0:
            return {}
        return {"end": self.end, "places": self.scale.places, "scale": self.scale.state_dict()}

    @classmethod
    def of_state(cls, state: Any) -> NoiseSoFar:
        """Return it from :meth:`state`; ValueError naming what does not fit."""
        if state == {}:
            return cls()
        if not isinstance(state, dict) or not is_count(state.get("end")) or not is_count(state.get("places")):
            raise ValueError(f"so_far: expected a step and a number of places, got {state!r:.80}")
        scale = NoiseScale(state["places"])
        with under_key("so_far.scale"):
            scale.load_state_dict(state.get("scale"))  # type: ignore[arg-type]
        return cls(scale, state["end"])

    def of(self, places: int, begin: int) -> NoiseScale:
        """Return it, with an empty window, where it is known up to this step; else a new one."""
        if self.scale is None or self.end != begin or self.scale.places != places:
            self.scale = NoiseScale(places)
        self.scale.reset()
        return self.scale


@dataclass
class RankNoise:
    r"""Part of one rank in the noise scale of a window.

    The gradient that ranks share is :math:`c \sum_r w_r \sum_{i \in r} \nabla l_i`, with :math:`w_r` = 1 / f of rank
    r, and c = 1 / ranks where it is averaged. Divided by the sum of all weights :math:`c\,w_r` it is a weighted mean
    :math:`\sum v_i \nabla l_i`. With :math:`s = \sum v_i^2` and :math:`q = \sum v_i^2 \|\nabla l_i\|^2`, its squared
    norm g has the expectation :math:`|G|^2 + s\,\mathrm{tr}\,\Sigma`, and q has :math:`s\,(|G|^2 +
    \mathrm{tr}\,\Sigma)`. So :math:`|G|^2 \approx (g - q) / (1 - s)`, and 1 / s stands where the number of samples does
    with equal weights.

    Attributes:
        table: of the window's steps.
        layers: the place of each parameter's layer among the places; the total is the last place.
        names: the parameters.
        begin, end: steps before and after the window.
        averaged: over how many ranks the gradient is the mean.
        so_far: of windows before.
        carried: steps that other ranks have made before.
        window: the noise scale of one process that has made steps before, with its window.
        reasons: those of all ranks, once they have been told.
        counts: this rank counts its samples; of those that have the same ones, and hold parts of their gradients, one
            does.
    """

    table: StepTable
    layers: list[int]
    names: list[str]
    places: int
    begin: int
    end: int
    averaged: int
    so_far: NoiseSoFar
    carried: CarriedSteps | None = None
    window: NoiseScale | None = None
    reasons: list[str] = field(default_factory=list)
    counts: bool = True

    @property
    def steps(self) -> int:
        """Steps of the window that ranks add up."""
        return len(self.table.codes) + (0 if self.carried is None else len(self.carried.codes))

    @property
    def columns(self) -> int:
        """Numbers that ranks add up for each step."""
        return 3 * self.places + _ALL + 1

    @property
    def _own_reasons(self) -> list[str]:
        return sorted({*self.table.reasons, *(self.carried.reasons if self.carried is not None else ())})

    @property
    def told(self) -> dict[str, Any]:
        """Words for the other ranks: reasons, and up to which step this one knows the averages."""
        return {"reasons": self._own_reasons, "averages": self.so_far.end}

    def hear(self, told: Sequence[dict[str, Any]]) -> None:
        """Take what the ranks have told."""
        self.reasons = sorted({reason for each in told for reason in each["reasons"]})
        if len({each["averages"] for each in told}) > 1:
            self.so_far.end = -1  # all ranks begin anew

    def largest(self) -> Tensor:
        """Return why steps are left out, [steps]: 0, or 1 + the number of a reason."""
        numbers = [0.0, *(1.0 + self.reasons.index(reason) for reason in self.table.reasons)]
        codes = torch.tensor(numbers, dtype=torch.float64, device="cpu")[self.table.codes.clamp(min=0).long()]
        return codes if self.carried is None else torch.cat([self.carried.codes_among(self.reasons), codes])

    def sums(self, owners: Ownership | PlacedOwners) -> list[Tensor]:
        """Return what the ranks add up, per step and place."""
        if self.carried is None:
            return self._sums(owners)
        both = zip(self.carried.scaled_to(self.averaged), self._sums(owners), strict=True)
        return [torch.cat(pair) for pair in both]

    def share(self, owners: PlacedOwners) -> CarriedSteps:
        """Return what this rank adds, for a rank that goes on from here."""
        self.reasons = self._own_reasons
        return CarriedSteps(self.sums(owners), self.largest(), self.reasons, self.averaged)

    def _sums(self, owners: Ownership | PlacedOwners) -> list[Tensor]:
        table = self.table
        weights, samples = table.weights[:, None], table.samples * self.counts
        counts = [name in owners.mine for name in self.names]
        counted = table.gradients * torch.tensor(counts, dtype=torch.float64, device="cpu")
        gradients = table.gradients.new_zeros(len(counted), self.places)
        index = torch.tensor(self.layers, dtype=torch.int64, device="cpu")
        gradients.index_add_(1, index, counted)
        gradients[:, -1] = counted.sum(1)
        shares = torch.tensor([1.0 / owners.copies[name] for name in self.names], dtype=torch.float64, device="cpu")
        nothing = (table.codes == NOTHING).double()
        columns = [
            samples,
            weights[:, 0] * samples,
            weights[:, 0].square() * samples,
            nothing,
            table.gradients @ shares,
        ]
        return [weights * table.squares, weights.square() * table.squares, gradients, torch.stack(columns, dim=1)]

    def result(self, codes: Tensor, sums: Sequence[Tensor], ranks: int) -> tuple[NoiseScale, dict[str, int]]:
        """Return the noise scale of the window, and how many steps were left out, by reason."""
        means, squares, gradients, totals = sums
        weight, weight_sq = totals[:, _ONES, None], totals[:, _SQUARES, None]
        scaled = gradients / (weight / self.averaged).square()
        noise, skipped = self.so_far.of(self.places, self.begin), dict[str, int]()
        if self.window is not None:
            noise = self.so_far.scale = self.window.copy()
        effective = (weight.square() / weight_sq)[:, 0].tolist()
        for t, (code, row) in enumerate(zip(codes.long().tolist(), totals.tolist(), strict=True)):
            if row[_NOTHING] == ranks or not (code or row[_SAMPLES]):  # nothing at all, or an empty batch
                continue
            why = self.reasons[code - 1] if code else ON_ONE_RANK if row[_NOTHING] else ""
            whole, shared = float(gradients[t, -1]), row[_ALL]
            if not why and not abs(whole - shared) <= _SAME * max(whole, shared):
                why = NOT_REDUCED if abs(whole - shared) > 0 else ""  # one that is not finite is skipped by itself
            batch = scaled[t]
            impossible = batch > means[t] / weight[t] * JENSEN
            if not why and bool(impossible.any()):
                impossible[-1] = True
                skipped[NO_SAMPLES] = skipped.get(NO_SAMPLES, 0) + 1
                batch = batch.masked_fill(impossible, torch.nan)
            if why:
                skipped[why] = skipped.get(why, 0) + 1
                batch = torch.full_like(batch, torch.nan)
            observe(noise, squares[t] / weight_sq[t], batch, int(row[_SAMPLES]), effective[t])
        self.so_far.end = self.end
        return noise, skipped


def observe(noise: NoiseScale, mean: Tensor, batch: Tensor, samples: int, effective: float) -> None:
    """Add a step of so many samples, whose weights are as far from equal as those of `effective` equal ones."""
    if math.isfinite(effective) and abs(effective - round(effective)) <= 1e-9 * effective:  # NaN of no samples
        effective = round(effective)
    noise.observe_weighted(mean, batch, samples, effective)
