"""Runs reduced over seeds: what the table shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from lipcore.demo.runs import TaskResult


@dataclass(frozen=True)
class Row:
    """One task at one level. Lipschitz constants are those of the last epoch, losses those at its end."""

    level: float
    seeds: int
    cumulative_length: float  #: per training sample, mean over seeds
    cumulative_length_sd: float  #: n - 1 in the denominator; NaN for one seed
    lipschitz_mean: float
    lipschitz_p99: float
    train_loss: float
    test_loss: float


@dataclass(frozen=True)
class Order:
    """Number of seeds that have their cumulative lengths in the order of difficulty."""

    seeds: int
    lowest_below_highest: int
    all_levels: int


def rows(result: TaskResult) -> list[Row]:
    out = []
    for level in result.task.levels:
        runs = result.at(level)
        lengths = [run.cumulative_length for run in runs]
        out.append(
            Row(
                level,
                len(runs),
                statistics.fmean(lengths),
                statistics.stdev(lengths) if len(lengths) > 1 else math.nan,
                _last(run.lipschitz_mean for run in runs),
                _last(run.lipschitz_p99 for run in runs),
                _last(run.train_loss for run in runs),
                _last(run.test_loss for run in runs),
            )
        )
    return out


def order(result: TaskResult) -> Order:
    by_level = [[run.cumulative_length for run in result.at(level)] for level in result.task.levels]
    by_seed = list(zip(*by_level, strict=True))
    return Order(
        len(by_seed),
        sum(lengths[0] < lengths[-1] for lengths in by_seed),
        sum(all(a < b for a, b in pairwise(lengths)) for lengths in by_seed),
    )


def _last(curves: Iterable[list[float]]) -> float:
    return statistics.fmean(curve[-1] for curve in curves)
