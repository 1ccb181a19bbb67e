"""The linear programme of Theorem 2 against HiGHS, in the shapes that coverage makes and in degenerate ones."""

from __future__ import annotations

import numpy as np
import pytest
from few import few

from lipcore.regions.least_cost import LeastCost

linprog = pytest.importorskip("scipy.optimize").linprog


def highs(columns: np.ndarray, costs: np.ndarray, target: np.ndarray) -> float:
    found = linprog(np.tile(costs, 2), A_eq=np.hstack([columns, -columns]), b_eq=target, bounds=(0, None))
    assert found.status == 0
    return float(found.fun)


def unit_columns(random: np.random.Generator, rank: int, count: int) -> np.ndarray:
    columns = random.standard_normal((rank, count))
    return columns / np.linalg.norm(columns, axis=0)


@pytest.mark.parametrize(("rank", "count"), [(1, 1), (1, 5), (2, 2), (3, 40), (20, 20), (20, 21), (30, 300)])
def test_many_targets_of_one_set(rank: int, count: int) -> None:
    random = np.random.default_rng(rank * 1000 + count)
    columns, costs = unit_columns(random, rank, count), random.uniform(0.1, 2.0, count)
    programme = LeastCost(columns, costs)
    for _ in range(30):
        target = columns @ (random.standard_normal(count) * (random.random(count) < 0.3))
        used, factors = programme.least(target)
        assert np.abs(columns[:, used] @ factors - target).max() <= 1e-7
        assert np.abs(factors) @ costs[used] == pytest.approx(highs(columns, costs, target), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("rank", few([3, 17], 1))
@pytest.mark.parametrize("what", ["free columns", "twins", "equal costs", "binary"])
def test_degenerate_programmes(rank: int, what: str) -> None:
    """Costs of zero (regions where the function is flat), columns that are the same, costs that tie, patterns."""
    random = np.random.default_rng(rank)
    columns, costs = unit_columns(random, rank, 8 * rank), random.uniform(0.1, 2.0, 8 * rank)
    if what == "free columns":
        costs[::3] = 0.0
    elif what == "twins":
        columns[:, 1::2] = columns[:, ::2]
    elif what == "equal costs":
        costs[:] = 1.0
    else:
        columns = random.integers(0, 2, columns.shape).astype(float)
        columns = columns[:, columns.any(axis=0)]
        columns, costs = columns / np.linalg.norm(columns, axis=0), np.ones(columns.shape[1])
    programme = LeastCost(columns, costs)
    for _ in range(30):
        target = columns @ (random.standard_normal(len(costs)) * (random.random(len(costs)) < 0.2))
        used, factors = programme.least(target)
        assert np.abs(columns[:, used] @ factors - target).max() <= 1e-7
        assert np.abs(factors) @ costs[used] == pytest.approx(highs(columns, costs, target), rel=1e-6, abs=1e-7)


def test_all_regions_flat() -> None:
    programme = LeastCost(np.eye(3), np.zeros(3))
    used, factors = programme.least(np.array([1.0, -2.0, 0.0]))
    assert np.abs(np.eye(3)[:, used] @ factors - [1.0, -2.0, 0.0]).max() <= 1e-9


def test_highs_takes_over_where_rounding_spoilt_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    columns, costs = unit_columns(random, 5, 30), random.uniform(0.1, 2.0, 30)
    target = columns @ random.standard_normal(30)
    monkeypatch.setattr(LeastCost, "_certified", lambda *_: False)
    used, factors = LeastCost(columns, costs).least(target)
    assert np.abs(factors) @ costs[used] == pytest.approx(highs(columns, costs, target), rel=1e-6)
