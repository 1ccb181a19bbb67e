"""Distributions of all ranks together: bins stand at fixed places and add up, moments as deviations from one number
that all ranks know."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lipcore import _core
from lipcore.metric.distribution import Distribution

_MEAN, _MAX, _LESS_MIN, _LAST, _LESS_FIRST = range(5)  # columns of maxima over ranks
_COUNT, _OFF, _SQUARES, _MISSING, _INVALID = range(5)  # columns of sums
SUMS = 5  #: numbers of a place that are added up, and as many of which the largest is taken
_BYTES = 8 << 10  # of a histogram, about


class RankDistributions:
    """Distributions of this rank in some of the places of all ranks, as they are now.

    Args:
        distributions: of this rank, one per place of it.
    """

    def __init__(self, distributions: Sequence[Distribution]) -> None:
        self._distributions = [Distribution() for _ in distributions]
        for copied, one in zip(self._distributions, distributions, strict=True):
            copied.merge(one)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept, about."""
        return _BYTES * len(self._distributions)

    def largest(self, where: Sequence[int], places: int) -> Tensor:
        """Return what ranks are to agree on before they add up, [places, 5]: by its maxima over ranks all know between
        which bins the values of a place lie, and a number near their mean.

        Args:
            where: which place each of the distributions has among those of all ranks.
            places: how many these are.
        """
        rows = torch.full((places, 5), -torch.inf, dtype=torch.float64, device="cpu")
        for place, one in zip(where, self._distributions, strict=True):
            if one.count:
                bins = one.core.bins()[::2]
                numbers = [one.mean, one.max, -one.min, bins[-1], -bins[0]]
                rows[place] = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return rows

    def sums(self, where: Sequence[int], largest: Tensor) -> list[Tensor]:
        """Return what ranks add up: moments [places, 5], and the bins of all places behind each other."""
        moments = torch.zeros(len(largest), 5, dtype=torch.float64, device="cpu")
        begins = _begins(largest)
        counts = np.zeros(begins[-1])
        for place, one in zip(where, self._distributions, strict=True):
            count, off = one.count, one.mean - float(largest[place, _MEAN]) if one.count else 0.0
            numbers = [count, count * off, count * (one.variance + off * off) if count else 0.0]
            numbers += [one.missing, one.invalid]
            moments[place] += torch.tensor(numbers, dtype=torch.float64, device="cpu")
            pairs = np.array(one.core.bins(), dtype=np.int64).reshape(-1, 2)
            if len(pairs):
                counts[begins[place] + pairs[:, 0] + int(largest[place, _LESS_FIRST])] += pairs[:, 1]
        return [moments, torch.from_numpy(counts)]


def _begins(largest: Tensor) -> list[int]:
    """Return where the bins of each place begin among those of all, and where the last ones end."""
    last, less_first = largest[:, _LAST], largest[:, _LESS_FIRST]
    sizes = torch.where(last.isfinite(), last + less_first + 1, 0.0)
    return [0, *sizes.cumsum(0).long().tolist()]


def bins_of(largest: Tensor) -> int:
    """Return how many bins all places have together, by the maxima over all ranks."""
    return _begins(largest)[-1]


def distributions_of(largest: Tensor, sums: Sequence[Tensor]) -> list[Distribution]:
    """Return the distributions of all ranks together, from :class:`RankDistributions` of all of them reduced."""
    moments, counts = sums
    begins, found = _begins(largest), []
    for place, (row, most) in enumerate(zip(moments.tolist(), largest.tolist(), strict=True)):
        count, missing, invalid = row[_COUNT], int(row[_MISSING]), int(row[_INVALID])
        one = Distribution()
        mean = m2 = low = high = 0.0
        pairs: list[int] = []
        if count:
            off = row[_OFF] / count
            mean, m2 = most[_MEAN] + off, max(row[_SQUARES] - count * off * off, 0.0)
            low, high = -most[_LESS_MIN], most[_MAX]
            bins = counts[begins[place] : begins[place + 1]].numpy()
            used = np.flatnonzero(bins)
            pairs = np.stack([used - int(most[_LESS_FIRST]), bins[used].astype(np.int64)], axis=1).reshape(-1).tolist()
        core = _core.Distribution()
        core.set_state(count, mean, m2, low, high, missing, invalid, pairs)
        one.core.merge(core)
        found.append(one)
    return found
