"""Runs reduced over seeds: what the table shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lipcore.demo.runs import Run, TaskResult
from lipcore.theory.falling import first_at


@dataclass(frozen=True)
class Row:
    """One task at one level. Gradient norm and Lipschitz constants are those of the last epoch, losses those at its
    end."""

    level: float
    seeds: int
    cumulative_length: float  #: per training sample, mean over seeds
    cumulative_length_sd: float  #: n - 1 in the denominator; NaN for one seed
    epochs_to_equal_loss: float  #: until the training loss was first at :func:`equal_loss`
    grad_norm: float
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


def equal_loss(result: TaskResult) -> float:
    """Return the lowest training loss that all runs have come down to."""
    return max(min(run.train_loss) for run in result.runs)


def epochs_to(level: float, run: Run) -> int:
    """Return in which epoch a run's training loss first was at most `level`."""
    at = first_at(np.array(run.train_loss), level)
    assert at is not None  # which all runs reach
    return at + 1


def rank_correlations(result: TaskResult) -> dict[str, float]:
    """Return Spearman's rank correlation of numbers of all runs with their test loss; NaN where one is the same in all
    runs."""
    from scipy.stats import spearmanr  # comes with scikit-learn

    level = equal_loss(result)
    numbers = {
        "cumulative length": [run.cumulative_length for run in result.runs],
        "epochs to equal loss": [float(epochs_to(level, run)) for run in result.runs],
        "gradient norm": [run.grad_norm[-1] for run in result.runs],
        "training loss": [run.train_loss[-1] for run in result.runs],
    }
    test = [run.test_loss[-1] for run in result.runs]
    return {
        name: float(spearmanr(each, test)[0]) if len(set(each)) > 1 and len(set(test)) > 1 else math.nan
        for name, each in numbers.items()
    }


def rows(result: TaskResult) -> list[Row]:
    out, level_of_loss = [], equal_loss(result)
    for level in result.task.levels:
        runs = result.at(level)
        lengths = [run.cumulative_length for run in runs]
        out.append(
            Row(
                level,
                len(runs),
                statistics.fmean(lengths),
                statistics.stdev(lengths) if len(lengths) > 1 else math.nan,
                statistics.fmean(epochs_to(level_of_loss, run) for run in runs),
                _last(run.grad_norm for run in runs),
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
