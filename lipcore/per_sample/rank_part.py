"""What the per-sample norms of one rank add to the window of all ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lipcore.capture.layers.compared_inputs import INPUT
from lipcore.distributed.contribution import Sizes
from lipcore.distributed.packed import Packed, Together
from lipcore.distributed.partial_sums import Partial
from lipcore.metric.distribution import Distribution
from lipcore.metric.rank_distributions import SUMS, RankDistributions, bins_of, distributions_of
from lipcore.metric.rank_part import Holding, RankPart
from lipcore.metric.results import MetricResult
from lipcore.models.names import with_prefix
from lipcore.models.tensor_parallel import PartRanks
from lipcore.per_sample.noise.rank_noise import RankNoise
from lipcore.per_sample.part_rows import PassRows, bits_of, observe_whole, why_unlike
from lipcore.per_sample.results import add_noise, add_norms

_ROUNDING = 1e-6  # of shares of whole numbers
COUNTS = ("unrecorded", "not_proved", "taken_back")  # details that count by reason
NOT_THE_GROUP = (
    "the gradient is the mean over ranks {0}, and the window is that of ranks {1}; pass the ranks that train one model "
    "as group="
)
_APART = "the gradient is the mean over ranks {0} on rank {1}, and over ranks {2} on rank {3}"
_OTHER_STEPS = (
    "rank {0} has {1} recorded steps of this window, and rank {2} has {3}; load the states of one checkpoint, or of "
    "none, on all ranks"
)
STAGES = "ranks hold other layers (stages of a pipeline), and no rank knows the gradient of a whole sample"


_OTHER_SAMPLES = (
    "ranks {0} hold parts of the parameters (tensor parallelism) and have recorded other samples (rank {1}: {2} "
    "micro-batches that wait, rank {3}: {4}, or other sizes or ids), so that the squares of one sample cannot be added "
    "up; give these ranks the same batches and ids"
)
_NOT_IN_GROUP = (
    "rank {0} holds parts of the parameters together with rank {1} (tensor parallelism), which is not in the group; "
    "pass all ranks that train one model as group="
)


@dataclass
class PerSamplePart(RankPart):
    """Distributions of one rank's samples over a window, and its part in the noise scale.

    Attributes:
        agreed: settings.
        layers: of this rank, with its prefix.
        total: what the sum is called.
        details: counts by reason, and of dropped samples.
        noise: its part of the noise scale; None where there is none.
        noise_off: why there is none.
        averaged: over which ranks the gradient that this one sees is averaged.
        empty: a result without numbers.
        columns: distributions per layer.
        prefix: before the names of layers.
        parts: the ranks that hold parts of samples' gradients; None where this one has whole ones.
        rows: squares that these are to add up.
        rows_off: why these are not kept.
    """

    agreed: dict[str, Any]
    holding: Holding
    layers: list[str]
    total: str
    distributions: RankDistributions
    details: Mapping[str, Mapping[str, int]]
    dropped: int
    empty: MetricResult
    noise: RankNoise | None = None
    noise_off: str = ""
    averaged: Sequence[int] = ()
    columns: int = 1
    prefix: str = ""
    parts: PartRanks | None = None
    rows: Sequence[PassRows] = ()
    rows_off: str = ""
    heard: dict[str, list[str]] = field(default_factory=dict)  #: reasons of all ranks
    _without_noise: str = ""
    _told: Mapping[int, dict[str, Any]] = field(default_factory=dict)  # by rank

    @property
    def told(self) -> dict[str, Any]:
        """Reasons on this rank, and how far it knows the noise scale's averages."""
        reasons: dict[str, Any] = {name: sorted(self.details[name]) for name in COUNTS}
        if self.parts is not None:
            off = self.rows_off or self.parts.gone
            reasons["in_parts"] = [list(self.parts.ranks), *bits_of(self.rows), off, self._waiting]
        noise: dict[str, Any] = {"off": self.noise_off, "averaged": list(self.averaged)}
        if self.noise is not None:
            noise |= {"steps": self.noise.steps, **self.noise.told}
        return reasons | {"noise": noise}

    @property
    def nbytes(self) -> int:
        """Bytes of the histograms and of the single steps."""
        rows = sum(each.nbytes for each in self.rows)
        return self.distributions.nbytes + rows + (self.noise.table.nbytes if self.noise is not None else 0)

    def hear(self, told: Sequence[dict[str, Any]]) -> None:
        """Take the reasons of all ranks."""
        self.heard = {name: sorted({reason for each in told for reason in each[name]}) for name in COUNTS}
        assert self.holding is not None
        self._told = dict(zip(self.holding.ranks, told, strict=True))
        self._without_noise = self._why_no_noise()
        if self._noise is not None:
            self._noise.hear([each["noise"] for each in told])

    def refused(self) -> str:
        """Return why the ranks that hold parts cannot add them up."""
        if self.parts is None:
            return ""
        told = {rank: each["in_parts"] for rank, each in self._told.items()}
        for rank, (ranks, count, bits, off, _) in told.items():
            if off:
                return str(off)
            for other in ranks:
                if other not in told:
                    return _NOT_IN_GROUP.format(rank, other)
                if told[other][1:3] != [count, bits]:
                    return _OTHER_SAMPLES.format(_shown(ranks), rank, count, other, told[other][1])
        return ""

    @property
    def _waiting(self) -> int:
        """Number of numbers that are to be added up."""
        return 0 if self.parts is None else sum(rows.numbers for rows in self.rows if not rows.whole)

    def partials(self) -> list[Partial]:
        """Return the squares that are to be added up."""
        parts = self.parts
        return [] if parts is None else [rows.partial(parts) for rows in self.rows if not rows.whole]

    @property
    def _counts(self) -> bool:
        """True where this rank counts its samples: one of those that have the same."""
        return self.parts is None or self.parts.counts

    def _of_samples(self) -> RankDistributions:
        """Return the distributions of this rank's samples, whole ones."""
        if self.parts is None:
            return self.distributions
        places = len(self.layers) + 1
        return RankDistributions(observe_whole(self.rows if self._counts else (), places))

    @property
    def _all_layers(self) -> list[str]:
        owners = self.holding.ownership
        assert owners is not None
        return list(dict.fromkeys(owners.groups))

    @property
    def _what_is_alike(self) -> list[str]:
        return [*self._all_layers, *(INPUT + layer for layer in self._all_layers)]

    @property
    def _on_all_ranks(self) -> bool:
        """True where every rank has all layers."""
        owners = self.holding.ownership
        assert owners is not None
        return len(owners.everywhere) == len(owners.names)

    def _why_no_noise(self) -> str:
        """Return why the ranks together have no noise scale, which all of them find alike in what they have told; ""
        where they have one, or none was wanted."""
        if not self.agreed.get("noise_scale"):
            return ""
        if not self._on_all_ranks:
            return STAGES
        told = {rank: each["noise"] for rank, each in self._told.items()}
        first, *_ = told
        offs = {each["off"] for each in told.values()}
        for rank, each in told.items():
            if off := each["off"]:
                return str(off) if len(offs) == 1 else f"on rank {rank}: {off}"
            mine, theirs = told[first]["averaged"], each["averaged"]
            # Ranks that hold parts are each among others over which these are averaged, and as many.
            if mine != theirs if self.parts is None else len(mine) != len(theirs):
                return _APART.format(_shown(mine), first, _shown(theirs), rank)
            steps, of_first = (of.get("steps", 0) for of in (each, told[first]))
            if steps != of_first:
                return _OTHER_STEPS.format(rank, steps, first, of_first)
        averaged = {rank for each in told.values() for rank in each["averaged"]}
        return "" if averaged == set(told) else NOT_THE_GROUP.format(_shown(averaged), _shown(told))

    @property
    def _noise(self) -> RankNoise | None:
        return None if self._without_noise else self.noise

    def sizes(self) -> Sizes:
        """Return how many numbers there are, by the layers of all ranks."""
        parts, noise = self.parts, self._noise
        places = (len(self._all_layers) + 1) * self.columns
        steps, of_noise = (0, 0) if noise is None else (noise.steps, noise.steps * noise.columns)
        counts = 1 + sum(len(reasons) for reasons in self.heard.values())
        return Sizes(
            SUMS * places + steps + (parts is not None),
            lambda most: counts + SUMS * places + bins_of(most[0]) + of_noise,
            self._waiting,
            None if parts is None else parts.handle,
            max((each["in_parts"][4] for each in self._told.values()), default=0) if parts is not None else 0,
        )

    def packed(self) -> Packed:
        """Return the counts, histograms and the sums of single steps."""
        owners = self.holding.ownership
        assert owners is not None
        place = {layer: i for i, layer in enumerate(self._all_layers)}
        rows = [*(place[layer] for layer in self.layers), len(place)]
        where = [row * self.columns + column for row in rows for column in range(self.columns)]
        distributions = self._of_samples()
        largest = [distributions.largest(where, (len(place) + 1) * self.columns)]
        if self._noise is not None:
            largest.append(self._noise.largest())
        if self.parts is not None:
            unlike = next((rows.unlike for rows in self.rows if rows.unlike), "")
            kind = INPUT if unlike.startswith(INPUT) else ""
            named = kind + with_prefix(self.prefix, unlike[len(kind) :])
            number = 1 + self._what_is_alike.index(named) if unlike else 0
            largest.append(torch.tensor([float(number)], dtype=torch.float64, device="cpu"))
        found = [float(self.details[name].get(why, 0)) for name in COUNTS for why in self.heard[name]]
        # Of ranks with the same samples, each counts a share.
        counts = torch.tensor([float(self.dropped), *found], dtype=torch.float64, device="cpu") / self._with_same

        def sums(most: list[Tensor]) -> list[Tensor]:
            added = [counts, *distributions.sums(where, most[0])]
            return added if self._noise is None else [*added, *self._noise.sums(owners)]

        return Packed(sums, largest)

    def result(self, together: Together) -> MetricResult:
        """Return the distributions of all ranks' samples, and their noise scale."""
        result, (counts, *sums) = self.empty, together.sums
        numbers = iter((counts - _ROUNDING).ceil().long().tolist())
        result.details["dropped_samples"] = next(numbers)
        for name in COUNTS:
            found = {why: next(numbers) for why in self.heard[name]}
            if found or name == "unrecorded":
                result.details[name] = found
        result.details["proved"] = not self.heard["not_proved"]
        if self.parts is not None and (number := int(together.largest[-1][0])):
            why = why_unlike(self._what_is_alike[number - 1])
            result.details["norms_off"] = result.details["noise_scale_off"] = why
            for rows in self.rows:  # on each of the ranks, whichever has noticed it
                rows.unlike = rows.unlike or self._what_is_alike[number - 1]
            return result
        distributions = distributions_of(together.largest[0], sums[:2])
        total = self.total
        if not self._on_all_ranks:
            distributions, total = distributions[: -self.columns], ""
            result.details["total_off"] = STAGES
        share = self.agreed["share"]
        note = f"over the covered parameters only: {share}" if share else ""
        self._add_numbers(result, total, distributions, note)
        if self.agreed.get("noise_scale"):
            self._add_noise(result, self._all_layers, together)
        return result

    @property
    def _doubt(self) -> str:
        """Reason why it is not proved that the numbers are single samples'; "" where it is."""
        return next(iter(self.heard["not_proved"]), "")

    def _add_numbers(self, result: MetricResult, total: str, distributions: Sequence[Distribution], note: str) -> None:
        add_norms(result, self._all_layers, total, distributions, self.agreed["estimated"], note, self._doubt)

    def _add_noise(self, result: MetricResult, layers: Sequence[str], together: Together) -> None:
        if self._without_noise:
            result.details["noise_scale_off"] = self._without_noise
            return
        assert self.noise is not None
        noise, skipped = self.noise.result(together.largest[1], together.sums[3:], len(self.holding.ranks))
        add_noise(result, layers, self.total, noise, None)
        result.details["noise_scale_skipped"] = skipped

    @property
    def _with_same(self) -> int:
        """Number of the ranks that have the same samples."""
        return 1 if self.parts is None else len(self.parts.ranks)


def _shown(ranks: Collection[int]) -> str:
    found = sorted(ranks)
    return ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
