"""What a TensorStats on one rank adds to the window of all ranks: sums of powers about one number per place that all
ranks know, and histograms between bins that all know."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipcore import _core
from lipcore.distributed.contribution import Sizes
from lipcore.distributed.packed import Packed, Together
from lipcore.metric.rank_part import Holding, RankPart
from lipcore.metric.results import MetricResult
from lipcore.metric.values import Level
from lipcore.tensor_stats.all_outputs import AllOutputs, told_of, why_not_joined
from lipcore.tensor_stats.block import Numbers
from lipcore.tensor_stats.describe import add_extras, add_rows
from lipcore.tensor_stats.watched import Watched
from lipcore.trajectory.moved_alike import gradients_of, unreduced

_COUNT, _MEAN, _M2, _M3, _M4, _MIN, _MAX, _ZEROS, _NONFINITE = range(_core.TENSOR_STATS)
_NEAR, _HIGH, _LESS_LOW, _LAST, _LESS_FIRST = range(5)  # columns of maxima over ranks
_SUMS = 7  # count, sums of the first to fourth powers of x - near, zeros, nonfinite


@dataclass
class TensorStatsPart(RankPart):
    """Statistics of one rank over a window. Parameters and gradients count on the rank that owns them (a part of them);
    outputs on all, as those of other samples.

    Attributes:
        watched: what is measured here.
        numbers: of the window.
        untrue: why gradients are not what they are called.
        empty: a result without numbers.
    """

    agreed: dict[str, Any]
    holding: Holding | None
    watched: Watched
    numbers: Numbers
    passes: int
    untrue: str
    empty: MetricResult
    _told: Sequence[dict[str, Any]] = ()  # by all ranks

    @classmethod
    def of(
        cls, watched: Watched, holding: Holding | None, numbers: Numbers, passes: int, untrue: str, empty: MetricResult
    ) -> TensorStatsPart:
        """Return the part with these numbers."""
        agreed = {
            "every_steps": empty.details["every_steps"],
            "sampled_steps": empty.details["sampled_steps"],
            "untrue": untrue,
        }
        return cls(agreed, holding, watched, numbers, passes, untrue, empty)

    @property
    def told(self) -> dict[str, Any]:
        """What this rank measures of what modules return."""
        return told_of(self.watched)

    def hear(self, told: Sequence[dict[str, Any]]) -> None:
        """Take what all ranks measure of it."""
        self._told = told

    def refused(self) -> str:
        """Return why what they measure does not go together."""
        ranks = range(len(self._told)) if self.holding is None else self.holding.ranks
        return why_not_joined(self._told, ranks) if self._told else ""

    @functools.cached_property
    def _all(self) -> AllOutputs:
        return AllOutputs.of(self._told or [self.told])

    @property
    def nbytes(self) -> int:
        """Bytes of rows and histograms."""
        return self.watched.size.nbytes

    @property
    def _rows(self) -> list[tuple[str, str, str, Level]]:
        """Quantity, place, group and level of every row of all ranks."""
        owners = None if self.holding is None else self.holding.ownership
        names = [] if owners is None else list(zip(owners.names, owners.groups, strict=True))
        rows: list[tuple[str, str, str, Level]] = []
        for quantity in ("parameter", "gradient"):
            rows += [(quantity, name, group, "tensor") for name, group in names]
        return [*rows, *(("output", place, "", "group") for place in self._all.places)]

    def _where(self) -> list[tuple[int, int]]:
        """Return which row here is which of all ranks, for those that this rank counts."""
        owners = None if self.holding is None else self.holding.ownership
        index = {row[:2]: i for i, row in enumerate(self._rows)}
        return [
            (i, index[quantity, name])
            for i, (quantity, name, _, _) in enumerate(self.watched.rows)
            if quantity == "output" or (owners is not None and name in owners.mine)
        ]

    def sizes(self) -> Sizes:
        """Return how many numbers there are, by the rows of all ranks."""
        count, sums, most = len(self._rows), self._all.sums, self._all.most
        return Sizes(5 * count + most + 2, lambda largest: _SUMS * count + _begins(largest[0])[-1] + sums + 1)

    def packed(self) -> Packed:
        """Return rows and histograms with a place for each of all ranks."""
        where, count = self._where(), len(self._rows)
        rows, bins = self.numbers.rows, self.numbers.bins
        largest = torch.full((count, 5), -torch.inf, dtype=torch.float64, device="cpu")
        for i, place in where:
            if rows[i, _COUNT]:
                used = bins[i].nonzero().flatten()
                numbers = [rows[i, _MEAN], rows[i, _MAX], -rows[i, _MIN], used[-1], -used[0]]
                largest[place] = torch.tensor([float(number) for number in numbers], dtype=torch.float64, device="cpu")

        extra_sums, extra_most = self._extras()

        def sums(most: list[Tensor]) -> list[Tensor]:
            return [*self._sums(where, most[0]), extra_sums, extra_sums.new_tensor([float(self.passes)])]

        return Packed(sums, [largest, extra_most, gradients_of({"gradient": self._squares()}, [0])])

    def _extras(self) -> tuple[Tensor, Tensor]:
        """Return sums and maxima with a place for those of all ranks."""
        sums = torch.zeros(self._all.sums, dtype=torch.float64, device="cpu")
        most = torch.full((self._all.most,), -torch.inf, dtype=torch.float64, device="cpu")
        for extra, in_sums, in_most in self.watched.slices:
            to_sums, to_most = self._all.slices_of(extra)
            sums[to_sums], most[to_most] = self.numbers.sums[in_sums], self.numbers.most[in_most]
        return sums, most

    def _squares(self) -> Tensor:
        """Return the sum of squares of gradients of the parameters that every rank holds whole; nothing where it holds
        none."""
        owners = None if self.holding is None else self.holding.ownership
        names = frozenset() if owners is None else owners.replicas
        same = [i for i, (q, name, *_) in enumerate(self.watched.rows) if q == "gradient" and name in names]
        rows = self.numbers.rows[same]
        squares = (rows[:, _M2] + rows[:, _COUNT] * rows[:, _MEAN].square()).nan_to_num(0.0, 0.0, 0.0)
        return squares.sum().reshape(1, 1) if same else squares.reshape(0, 1)

    def _sums(self, where: list[tuple[int, int]], largest: Tensor) -> list[Tensor]:
        moments = torch.zeros(len(largest), _SUMS, dtype=torch.float64, device="cpu")
        begins = _begins(largest)
        counts = np.zeros(begins[-1])
        for i, place in where:
            row = self.numbers.rows[i].tolist()
            n, m2, m3, m4 = row[_COUNT], row[_M2], row[_M3], row[_M4]
            d = row[_MEAN] - float(largest[place, _NEAR]) if n else 0.0
            d2 = d * d  # products are inf where they leave the range of float64; d**4 would raise
            powers = [n * d, m2 + n * d2, m3 + 3 * d * m2 + n * d2 * d, m4 + 4 * d * m3 + 6 * d2 * m2 + n * d2 * d2]
            numbers = [n, *powers, row[_ZEROS], row[_NONFINITE]]
            moments[place] += torch.tensor(numbers, dtype=torch.float64, device="cpu")
            used = self.numbers.bins[i].nonzero().flatten().numpy()
            if len(used):
                counts[begins[place] + used + int(largest[place, _LESS_FIRST])] += self.numbers.bins[i].numpy()[used]
        return [moments, torch.from_numpy(counts)]

    def result(self, together: Together) -> MetricResult:
        """Return the numbers of whole parameters, and of the outputs on all ranks."""
        (moments, counts, sums, passes), (largest, most, gradients) = together.sums, together.largest
        begins = _begins(largest)
        rows = torch.zeros(len(largest), _core.TENSOR_STATS, dtype=torch.float64, device="cpu")
        bins = torch.zeros(len(largest), _core.TENSOR_BINS, dtype=torch.int64, device="cpu")
        for place, (numbers, limits) in enumerate(zip(moments.tolist(), largest.tolist(), strict=True)):
            n, s1, s2, s3, s4, zeros, nonfinite = numbers
            rows[place, [_ZEROS, _NONFINITE]] = rows.new_tensor([zeros, nonfinite])
            if not n:
                continue
            d = s1 / n
            d2 = d * d
            m2, m3 = s2 - n * d2, s3 - 3 * d * s2 + 2 * n * d2 * d
            m4 = s4 - 4 * d * s3 + 6 * d2 * s2 - 3 * n * d2 * d2
            low, high = -limits[_LESS_LOW], limits[_HIGH]
            if low == high:
                m2 = m3 = m4 = 0.0
            row = [n, limits[_NEAR] + d, max(m2, 0.0), m3, max(m4, 0.0), low, high]
            rows[place, :_ZEROS] = rows.new_tensor(row)
            first = -int(limits[_LESS_FIRST])
            bins[place, first : int(limits[_LAST]) + 1] = counts[begins[place] : begins[place + 1]].long()
        if "forward_passes" in self.empty.details:
            self.empty.details["forward_passes"] = int(passes)
            if passes:
                self.empty.details.pop("output_off", None)
        add_rows(self.empty, self._rows, rows, bins, self.untrue or unreduced(gradients[0]))
        add_extras(self.empty, self.watched, self._all.extras, sums, most)
        return self.empty


def _begins(largest: Tensor) -> list[int]:
    """Return where the bins of each place begin among those of all, and where the last ones end."""
    last, less_first = largest[:, _LAST], largest[:, _LESS_FIRST]
    sizes = torch.where(last.isfinite(), last + less_first + 1, 0.0)
    return [0, *sizes.cumsum(0).long().tolist()]
