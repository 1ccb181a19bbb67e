"""What the per-sample norms of one rank add to the window of all ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lipcore.distributed.packed import Packed, Together
from lipcore.metric.distribution import Distribution
from lipcore.metric.rank_distributions import RankDistributions, distributions_of
from lipcore.metric.rank_part import Holding, RankPart
from lipcore.metric.results import MetricResult
from lipcore.per_sample.noise.rank_noise import RankNoise
from lipcore.per_sample.results import add_noise, add_norms

COUNTS = ("unrecorded", "not_proved", "taken_back")  # details that count by reason
NOT_THE_GROUP = (
    "the gradient is the mean over ranks {0}, and the window is that of ranks {1}; pass the ranks that train one model "
    "as group="
)
STAGES = "ranks hold other layers (stages of a pipeline), and no rank knows the gradient of a whole sample"


@dataclass
class PerSamplePart(RankPart):
    """Distributions of one rank's samples over a window, and its part in the noise scale.

    Attributes:
        agreed: settings, and over which ranks the gradient is averaged.
        layers: of this rank, with its prefix.
        total: what the sum is called.
        details: counts by reason, and of dropped samples.
        noise: its part of the noise scale; None where there is none.
        empty: a result without numbers.
        columns: distributions per layer.
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
    columns: int = 1
    heard: dict[str, list[str]] = field(default_factory=dict)  #: reasons of all ranks

    @property
    def told(self) -> dict[str, Any]:
        """Reasons on this rank, and how far it knows the noise scale's averages."""
        reasons: dict[str, Any] = {name: sorted(self.details[name]) for name in COUNTS}
        return reasons | {"noise": self.noise.told if self.noise is not None else {}}

    @property
    def nbytes(self) -> int:
        """Bytes of the histograms and of the single steps."""
        return self.distributions.nbytes + (self.noise.table.nbytes if self.noise is not None else 0)

    def hear(self, told: Sequence[dict[str, Any]]) -> None:
        """Take the reasons of all ranks."""
        self.heard = {name: sorted({reason for each in told for reason in each[name]}) for name in COUNTS}
        if self.noise is not None:
            self.noise.hear([each["noise"] for each in told])

    @property
    def _all_layers(self) -> list[str]:
        owners = self.holding.ownership
        assert owners is not None
        return list(dict.fromkeys(owners.groups))

    @property
    def _on_all_ranks(self) -> bool:
        """True where every rank has all layers."""
        owners = self.holding.ownership
        assert owners is not None
        return len(owners.everywhere) == len(owners.names)

    @property
    def _noise(self) -> RankNoise | None:
        return self.noise if self._on_all_ranks else None

    def packed(self) -> Packed:
        """Return the counts, histograms and the sums of single steps."""
        owners = self.holding.ownership
        assert owners is not None
        place = {layer: i for i, layer in enumerate(self._all_layers)}
        rows = [*(place[layer] for layer in self.layers), len(place)]
        where = [row * self.columns + column for row in rows for column in range(self.columns)]
        largest = [self.distributions.largest(where, (len(place) + 1) * self.columns)]
        if self._noise is not None:
            largest.append(self._noise.largest())
        found = [float(self.details[name].get(why, 0)) for name in COUNTS for why in self.heard[name]]
        counts = torch.tensor([float(self.dropped), *found], dtype=torch.float64, device="cpu")

        def sums(most: list[Tensor]) -> list[Tensor]:
            added = [counts, *self.distributions.sums(where, most[0])]
            return added if self._noise is None else [*added, *self._noise.sums(owners)]

        return Packed(sums, largest)

    def result(self, together: Together) -> MetricResult:
        """Return the distributions of all ranks' samples, and their noise scale."""
        result, (counts, *sums) = self.empty, together.sums
        numbers = iter(counts.long().tolist())
        result.details["dropped_samples"] = next(numbers)
        for name in COUNTS:
            found = {why: next(numbers) for why in self.heard[name]}
            if found or name == "unrecorded":
                result.details[name] = found
        result.details["proved"] = not self.heard["not_proved"]
        distributions = distributions_of(together.largest[0], sums[:2])
        total = self.total
        if not self._on_all_ranks:
            distributions, total = distributions[: -self.columns], ""
            result.details["total_off"] = STAGES
        share = self.agreed["share"]
        note = f"over the covered parameters only: {share}" if share else ""
        self._add_numbers(result, total, distributions, note)
        if self.agreed.get("noise_scale") is not None:
            self._add_noise(result, self._all_layers, together)
        return result

    @property
    def _doubt(self) -> str:
        """Reason why it is not proved that the numbers are single samples'; "" where it is."""
        return next(iter(self.heard["not_proved"]), "")

    def _add_numbers(self, result: MetricResult, total: str, distributions: Sequence[Distribution], note: str) -> None:
        add_norms(result, self._all_layers, total, distributions, self.agreed["estimated"], note, self._doubt)

    def _add_noise(self, result: MetricResult, layers: Sequence[str], together: Together) -> None:
        averaged, ranks = self.agreed["averaged_over"], self.holding.ranks
        off = self.agreed["noise_scale"] or ("" if self._on_all_ranks else STAGES)
        if not off and set(averaged) != set(ranks):
            off = NOT_THE_GROUP.format(_shown(averaged), _shown(ranks))
        if off:
            result.details["noise_scale_off"] = off
            return
        assert self.noise is not None
        noise, skipped = self.noise.result(together.largest[1], together.sums[3:], len(ranks))
        add_noise(result, layers, self.total, noise, None)
        result.details["noise_scale_skipped"] = skipped


def _shown(ranks: Collection[int]) -> str:
    found = sorted(ranks)
    return ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
