"""What float32 state does to long runs: errors after 1e5 steps against float64 references in two passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lipcore import Trajectory, _core

PARAMETERS = 200


def drift(rng, steps, n):
    """Weights of order 1 that move steadily by 1e-5 a step, with a little noise."""
    speed = 1e-5 * rng.standard_normal(n)
    noise = 1e-6 * rng.standard_normal((steps + 1, n))
    return rng.standard_normal(n) + speed * np.arange(steps + 1)[:, None] + noise


def random_walk(rng, steps, n):
    moves = 1e-3 * rng.standard_normal((steps + 1, n))
    moves[0] = rng.standard_normal(n)
    return moves.cumsum(axis=0)


def stationary(rng, steps, n):
    """Noise around a mean 1e4 times its size: E[x^2] - E[x]^2 in float32 would have no digit left."""
    return 1.0 + 1e-4 * rng.standard_normal((steps + 1, n))


TRAJECTORIES = [drift, random_walk, stationary]


def run(make, steps, n):
    """(points as float32, variance by Trajectory, path length by the ledger, norms the ledger reported)."""
    points = make(np.random.default_rng(0), steps, n).astype(np.float32)
    parameter = torch.from_numpy(points[0].copy())
    owner = {"w": parameter}
    trajectory = Trajectory(owner.items())
    # The plan alone, beside it, so that the norm of every step can be read where it is reported.
    state = [parameter.clone(), torch.zeros(n), None]
    rows = torch.zeros(3, _core.LEDGER_COLUMNS, dtype=torch.float64)
    recent, cursor = torch.zeros(1, 3, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    plan = _core.TrajectoryPlan([(owner, "w", "w", *state)], _core.Ledger(rows, recent, cursor, 1))
    memory, reported, row = parameter.numpy(), np.empty(steps), recent[0, 0].numpy()
    for t in range(steps):
        memory[:] = points[t + 1]
        trajectory.update()
        plan.step()
        reported[t] = np.sqrt(row[0])
    return points, trajectory.compute(), reported


def two_pass_variance(points):
    """1 / (n + 1) sum ||w_t - mean||^2, with the mean taken first."""
    mean = points.mean(axis=0, dtype=np.longdouble).astype(np.float64)
    return sum(np.square(block - mean).sum() for block in np.array_split(points, 50)) / len(points)


def true_length(points):
    blocks = (points[i : i + 2001].astype(np.float64) for i in range(0, len(points) - 1, 2000))
    return sum(np.linalg.norm(np.diff(block, axis=0), axis=1).sum() for block in blocks)


def check(make, steps, n):
    points, result, reported = run(make, steps, n)
    assert result.variance["w"].last.value == pytest.approx(two_pass_variance(points), rel=1e-6)
    length = result.path_length["w"].sum.value
    assert length == pytest.approx(float(reported.astype(np.longdouble).sum()), rel=1e-9)
    assert length == pytest.approx(true_length(points), rel=5e-8)
    assert result.path_length["total"].cumulative.value == length
    distance = np.linalg.norm(points[-1].astype(np.float64) - points[0])
    assert result.distance["w"].last.value == pytest.approx(distance, rel=1e-6)


@pytest.mark.ci
@pytest.mark.parametrize("make", TRAJECTORIES, ids=lambda f: f.__name__)
def test_1e5_steps(make):
    check(make, 100_000, PARAMETERS)


@pytest.mark.parametrize("make", TRAJECTORIES, ids=lambda f: f.__name__)
def test_1e4_steps(make):
    check(make, 10_000, PARAMETERS)


@pytest.mark.slow
@pytest.mark.parametrize("make", TRAJECTORIES, ids=lambda f: f.__name__)
def test_1e5_steps_of_more_parameters(make):
    check(make, 100_000, 3_000)


@pytest.mark.slow
@pytest.mark.parametrize("make", TRAJECTORIES, ids=lambda f: f.__name__)
def test_path_length_of_1e6_steps(make):
    points, result, reported = run(make, 1_000_000, 32)
    length = result.path_length["w"].sum.value
    assert length == pytest.approx(float(reported.astype(np.longdouble).sum()), rel=1e-9)
    assert length == pytest.approx(true_length(points), rel=5e-8)
