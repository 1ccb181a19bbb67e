"""How exact long runs are: numbers held against float64, nothing timed.

The parameters follow three named trajectories, whose points are float32 before anyone measures: the truth is that of
the points, not of the formula they came from. What is measured is a Trajectory, whose compiled step is called directly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from measure import needs_memory
from numpy.typing import NDArray

import lipcore
from lipcore.trajectory.table import COLUMN

Block = NDArray[np.float32]
Make = Callable[[np.random.Generator, int, NDArray[np.float64]], NDArray[np.float64]]

_BLOCK = 4096  # points made at a time


def _drift(rng: np.random.Generator, first: int, start: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights of order 1 that move steadily by 1e-5 a step, with a little noise."""
    speed = np.linspace(-1e-5, 1e-5, len(start) + 1)[1:]
    steps = np.arange(first, first + _BLOCK)[:, None]
    return start + speed * steps + 1e-6 * rng.standard_normal((_BLOCK, len(start)))


def _random_walk(rng: np.random.Generator, first: int, start: NDArray[np.float64]) -> NDArray[np.float64]:
    points = start + (1e-3 * rng.standard_normal((_BLOCK, len(start)))).cumsum(axis=0)
    start[:] = points[-1]
    return points


def _noise(rng: np.random.Generator, first: int, start: NDArray[np.float64]) -> NDArray[np.float64]:
    """Stationary around a mean 1e4 times its deviation: E[x^2] - E[x]^2 in float32 has no digit left."""
    return 1.0 + 1e-4 * rng.standard_normal((_BLOCK, len(start)))


def _far_noise(rng: np.random.Generator, first: int, start: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same around 1e6 deviations, 8 of float32's steps wide."""
    return 1.0 + 1e-6 * rng.standard_normal((_BLOCK, len(start)))


_TRAJECTORIES: dict[str, Make] = {"drift": _drift, "random walk": _random_walk, "noise, mean/sd 1e4": _noise}


def _blocks(make: Make, steps: int, elements: int) -> Iterator[Block]:
    """steps + 1 points, the first the reference."""
    rng = np.random.default_rng(0)
    start, first = rng.standard_normal(elements), 0
    while first <= steps:
        points = make(rng, first, start).astype(np.float32)
        yield points[: steps + 1 - first]
        first += _BLOCK


class _Truth:
    """Welford's moments and the path in float64; a block joins by Chan's formula."""

    def __init__(self, elements: int) -> None:
        self.points, self.mean, self.m2 = 0, np.zeros(elements), 0.0
        self.lengths: list[float] = []
        self.last: NDArray[np.float64] | None = None
        self.squares, self.sums = np.zeros(elements, np.float32), np.zeros(elements, np.float32)

    def observe(self, block: Block) -> None:
        x = block.astype(np.float64)
        n, mean = len(x), x.mean(axis=0)
        gap, total = mean - self.mean, self.points + n
        self.m2 += float(np.square(x - mean).sum() + np.square(gap).sum() * self.points * n / total)
        self.mean += gap * (n / total)
        self.points = total
        path = x if self.last is None else np.vstack([self.last, x])
        self.lengths.append(float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum()))
        self.last = x[-1]
        self.sums += block.sum(axis=0)
        self.squares += np.square(block).sum(axis=0)

    @property
    def variance(self) -> float:
        return self.m2 / self.points

    @property
    def naive_variance(self) -> float:
        """E[x^2] - E[x]^2 in float32, as SWAG keeps it."""
        mean = self.sums / np.float32(self.points)
        return float((self.squares / np.float32(self.points) - np.square(mean)).sum())


class _Run:
    """A Trajectory taken along a trajectory, the truth beside it and the sum of the norms that every step reported."""

    def __init__(self, make: Make, steps: int, elements: int, *, norms: bool = False) -> None:
        truth, reported, measured = _Truth(elements), [], None
        column = COLUMN["update_last"]
        for block in _blocks(make, steps, elements):
            truth.observe(block)
            points: Any = block
            if measured is None:
                parameter = torch.from_numpy(block[0].copy())
                memory, measured = parameter.numpy(), lipcore.Trajectory([("w", parameter)])
                step, row, points = measured.step_call, measured._trackers["exact"].table.rows[0].numpy(), block[1:]
            found = []
            for point in points:
                memory[:] = point
                if step():  # the plan's own: its block is full
                    measured.settle()
                if norms:
                    found.append(row[column])
            reported.append(math.fsum(found))
        assert measured is not None
        self.truth, self.result = truth, measured.compute()
        assert self.result.path_length["total"].sum.count == steps == truth.points - 1
        self.reported, self.true_length = math.fsum(reported), math.fsum(truth.lengths)


def _error(found: float, expected: float) -> float:
    return abs(found / expected - 1)


@pytest.mark.parametrize(("steps", "elements", "target"), [(10**5, 200, 1e-6), (10**6, 32, 3e-6)], ids=["1e5", "1e6"])
@pytest.mark.parametrize("name", _TRAJECTORIES)
def bench_variance_error(benchmark: Any, report: Any, name: str, steps: int, elements: int, target: float) -> None:
    run = benchmark.pedantic(_Run, (_TRAJECTORIES[name], steps, elements), rounds=1)
    error = _error(run.result.variance["total"].last.value, run.truth.variance)
    title = f"trajectory, {name}, {steps:.0e} steps: error of the variance".replace("e+0", "e")
    naive = _error(run.truth.naive_variance, run.truth.variance)
    report.add(title, error, "relative", target=target, better="lower", float32_mean_of_squares=naive)


def bench_variance_error_far_mean(benchmark: Any, report: Any) -> None:
    run = benchmark.pedantic(_Run, (_far_noise, 10**5, 200), rounds=1)
    error = _error(run.result.variance["total"].last.value, run.truth.variance)
    naive = _error(run.truth.naive_variance, run.truth.variance)
    title = "trajectory, noise, mean/sd 1e6, 1e5 steps: error of the variance"
    report.add(title, error, "relative", target=1e-6, better="lower", float32_mean_of_squares=naive)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("drift", 10**6),
        ("random walk", 10**7),
        pytest.param("drift", 10**7, marks=pytest.mark.slow),
        pytest.param("noise, mean/sd 1e4", 10**7, marks=pytest.mark.slow),
    ],
)
def bench_path_length_error(benchmark: Any, report: Any, name: str, steps: int) -> None:
    run = benchmark.pedantic(_Run, (_TRAJECTORIES[name], steps, 8), {"norms": True}, rounds=1)
    length = run.result.path_length["total"].sum.value
    title = f"trajectory, {name}, {steps:.0e} steps: error of the path length".replace("e+0", "e")
    against_norms, against_truth = _error(length, run.reported), _error(length, run.true_length)
    report.add(f"{title}, of the sum of norms", against_norms, "relative", target=1e-9, better="lower")
    report.add(title, against_truth, "relative", target=5e-8, better="lower")


@pytest.mark.slow
def bench_more_than_2_31_elements(benchmark: Any, report: Any) -> None:
    """One bfloat16 parameter too long for 32-bit counters; what lies beyond 2^31 dominates every sum."""
    limit, beyond = 2**31, 10**6 + 3
    elements = limit + beyond
    needs_memory(10 * elements)  # 2 the parameter, 4 the copies, 4 the mean
    parameter = torch.full((elements,), 0.5, dtype=torch.bfloat16)
    trajectory = lipcore.Trajectory([("w", parameter)])
    for _ in range(2):  # by 0.25, and by 1000 beyond
        parameter[:limit] += 0.25
        parameter[limit:] += 1000.0
        trajectory.update()
    result = benchmark.pedantic(trajectory.compute, rounds=1)
    last = float(parameter[-1])  # bfloat16 rounds 2000.5
    moves = [torch.tensor(0.5 + 1000).bfloat16().item() - 0.5]
    moves.append(last - 0.5 - moves[0])
    lengths = [math.sqrt(limit * 0.25**2 + beyond * move**2) for move in moves]
    distance = math.sqrt(limit * 0.5**2 + beyond * sum(moves) ** 2)
    expected = {"path_length": (sum(lengths), "sum"), "distance": (distance, "last")}
    # Three points at 0, a and a + b around their mean.
    deviations = [(limit, 0.25, 0.25), (beyond, *moves)]
    variance = math.fsum(n * ((a * a + (a + b) ** 2) / 3 - ((2 * a + b) / 3) ** 2) for n, a, b in deviations)
    expected["variance"] = (variance, "last")
    errors = {q: _error(getattr(getattr(result, q)["total"], r).value, x) for q, (x, r) in expected.items()}
    title = "trajectory, 2^31 + 1e6 elements, bf16: largest error"
    report.add(title, max(errors.values()), "relative", target=1e-6, better="lower", **errors)
