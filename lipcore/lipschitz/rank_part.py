"""What the constants of one rank add to the window of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lipcore.distributed.contribution import Sizes
from lipcore.distributed.packed import Packed, Together
from lipcore.lipschitz.weight_in_parts import WeightInParts
from lipcore.lipschitz.window_facts import Facts
from lipcore.metric.distribution import Distribution
from lipcore.metric.rank_distributions import SUMS, RankDistributions, bins_of, distributions_of
from lipcore.metric.rank_part import Holding, RankPart
from lipcore.metric.results import MetricResult, weakest

STAGES = (
    "ranks hold other parameters (stages of a pipeline), and the constant of a stage is not that of the model; each "
    "stage's own is in its rank's windows"
)
_WORTH = ("label", "note", "lambda_note", "unproved", "because")


@dataclass
class LipschitzPart(RankPart):
    """Distributions of r and lambda of one rank's samples over a window, and what is known beside them.

    Attributes:
        facts: of this rank; once the others have told theirs, of all.
        empty: a result without numbers.
        counts: this rank is the one that adds its samples, of those that see the same ones (tensor parallelism).
    """

    agreed: dict[str, Any]
    holding: Holding
    distributions: RankDistributions
    facts: Facts
    empty: MetricResult
    counts: bool

    @classmethod
    def of(cls, facts: Facts, holding: Holding, distributions: RankDistributions, *, counts: bool) -> LipschitzPart:
        """Return the part with these facts."""
        agreed = {
            "first_layer": facts.first_layer,
            "output": facts.place,
            "quantity": facts.quantity,
            "normalized_gradient_norm_off": facts.first_off,
            "local_lipschitz_off": facts.lambda_off,
            "sandwich": None if facts.theorem is None else facts.theorem.sigma is not None,
            "first_weight": None if (parts := _weight_of(facts)) is None else parts.agreed,
            "sigma": None if parts is None else parts.asked,
        }
        return cls(agreed, holding, distributions, facts, MetricResult(facts.name), counts)

    @property
    def nbytes(self) -> int:
        """Bytes of the histograms, and of W_1 where its singular values are yet to be computed."""
        theorem, parts = self.facts.theorem, _weight_of(self.facts)
        kept = 0 if theorem is None or theorem.sigma is None else theorem.sigma.nbytes
        kept += 0 if parts is None else parts.nbytes
        return self.distributions.nbytes + kept

    @property
    def told(self) -> dict[str, Any]:
        """Words for what the numbers of this rank are worth."""
        moved = self.facts.theorem is not None and self.facts.theorem.moved
        parts = _weight_of(self.facts)
        inputs = None if parts is None else parts.inputs
        alone = self.facts.theorem is None or self.facts.theorem.alone
        found = {name: getattr(self.facts, name) for name in _WORTH}
        return found | {"moved": moved, "inputs": inputs, "alone": alone}

    def hear(self, told: Sequence[dict[str, Any]]) -> None:
        """Take what the numbers of all ranks are worth: as much as the weakest of them."""
        facts = self.facts
        facts.label = weakest(each["label"] for each in told)
        facts.note, facts.lambda_note = next(
            (each["note"], each["lambda_note"]) for each in told if each["label"] == facts.label
        )
        facts.unproved = next((each["unproved"] for each in told if each["unproved"]), "")
        facts.because = list(dict.fromkeys(why for each in told for why in each["because"]))
        if facts.theorem is not None:
            facts.theorem.moved = any(each["moved"] for each in told)
            facts.theorem.alone = all(each["alone"] for each in told)
        if (parts := _weight_of(facts)) is not None:
            parts.hear([each["inputs"] for each in told])

    def refused(self) -> str:
        """Return why ranks hold no one model."""
        owners = self.holding.ownership
        return "" if owners is None or len(owners.everywhere) == len(owners.names) else STAGES

    def sizes(self) -> Sizes:
        """Return how many numbers there are, by the shape of the first weight."""
        parts = _weight_of(self.facts)
        weight = 0 if parts is None or parts.refused else parts.numbers
        return Sizes(3 * SUMS, lambda most: 2 + weight + 3 * SUMS + bins_of(most[0]))

    def packed(self) -> Packed:
        """Return counts, what gives the singular values of a first weight in parts, and histograms."""
        samples = self.distributions if self.counts else RankDistributions([Distribution() for _ in range(3)])
        where, counts = range(3), [float(self.facts.unrecorded or 0), float(self.facts.taken_back)]
        parts, owners = _weight_of(self.facts), self.holding.ownership
        counts_it = parts is not None and owners is not None and parts.name in owners.mine
        weight = torch.zeros(0, dtype=torch.float64, device="cpu") if parts is None else parts.addend(counts=counts_it)

        def sums(most: list[torch.Tensor]) -> list[torch.Tensor]:
            numbers = torch.tensor(counts, dtype=torch.float64, device="cpu") * self.counts
            return [numbers, weight, *samples.sums(where, most[0])]

        return Packed(sums, [samples.largest(where, 3)])

    def result(self, together: Together) -> MetricResult:
        """Return the constants at the samples of all ranks."""
        (counts, weight, *sums), (largest,) = together.sums, together.largest
        if self.facts.theorem is not None and (parts := _weight_of(self.facts)) is not None:
            self.facts.theorem.sigma = parts.singular_values(weight)
        unrecorded, taken_back = counts.long().tolist()
        self.facts.unrecorded = unrecorded if self.facts.unrecorded is not None else None
        self.facts.taken_back = taken_back
        ratios, lambdas, paired = distributions_of(largest, sums)
        return self.facts.result(ratios, lambdas, paired, into=self.empty)


def _weight_of(facts: Facts) -> WeightInParts | None:
    return None if facts.theorem is None else facts.theorem.in_parts
