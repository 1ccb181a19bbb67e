"""Windows of a Trajectory with steps that were left out; quantiles of long windows; sliding windows of Lipschitz."""

from __future__ import annotations

import math

import pytest
import torch
from models import seeded
from paths import ALL, Path, check, check_elements, mlp, observe, tensors_of, walk

from lipcore import Lipschitz, Monitor, Trajectory
from lipcore.metric.distribution import Distribution

LONG = 5e-6  # of the variance, over blocks of 512 steps


# ---- steps that were left out

BROKEN = {3: ("a.bias",), 515: ("a.bias", "b.weight"), 516: ("b.weight",), 1100: ("a.weight",)}


@pytest.mark.parametrize("steps", [6, 520, 1300])
def test_steps_that_were_left_out(steps: int) -> None:
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items()), Path(tensors)
    walk(tensors, steps, observe(trajectory, path), nan_at=BROKEN)
    check(trajectory.compute(), path, tolerance=LONG)


def test_left_out_steps_in_sliding_windows() -> None:
    tensors = tensors_of()
    trajectory = Trajectory(tensors.items(), window_blocks=3, stats=[*ALL, "element_variance"])
    path = Path(tensors)
    for block in range(6):
        # A tensor may be missing from a block's first steps, from its last, or from a whole block.
        nan = {0: {0: ("a.bias",)}, 2: {199: ("b.weight",)}, 3: dict.fromkeys(range(200), ("b.weight",))}.get(block, {})
        walk(tensors, 200, observe(trajectory, path), seed=block, nan_at=nan)
        start = max(0, 200 * (block - 2))
        if block != 3:  # else: the last step of a group is that of its finite members alone
            check(trajectory.compute(), path, start=start, from_start=start == 0, tolerance=LONG)
        check_elements(trajectory, path, start, from_start=start == 0)
        trajectory.advance()


@pytest.mark.parametrize("first", [True, False])
def test_a_step_without_any_finite_parameter_is_left_out_everywhere(first: bool) -> None:
    """Of groups and of the total too: they neither stood still nor have they norm zero."""
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items()), Path(tensors)
    at = {0 if first else 5: tuple(tensors), 3: ("b.weight",)}
    walk(tensors, 6, observe(trajectory, path), nan_at=at)
    result = trajectory.compute()
    assert result.unmoved_steps["total"].sum.value == 0
    assert result.weight_norm["total"].last.value == pytest.approx(
        float(torch.cat([(path.points[6] if first else path.points[5])[n] for n in tensors]).norm()), rel=1e-6
    )
    assert result.nonfinite_steps["total"].sum.value == 2
    assert result.update_norm["total"].last.count == 5
    truth = path.expected(list(tensors))
    for quantity in ("update_norm", "path_length", "update_ratio", "variance"):
        for reducer, value in result[quantity]["total"].items():
            near = 0.01 if reducer in ("p50", "p99") else 1e-6
            assert value.value == pytest.approx(float(truth[quantity][reducer]), rel=near), (quantity, reducer)
    assert trajectory.drain().update_norm[:, -1].isnan().sum() == 1


# ---- quantiles


@pytest.mark.parametrize("ring", [512, 1024])
def test_quantiles_over_more_steps_than_the_ring_holds(ring: int) -> None:
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items(), ring=ring, stats=["update_norm", "update_ratio"]), Path(tensors)
    walk(tensors, 2500, observe(trajectory, path))
    result = trajectory.compute()
    for name in tensors:
        points = torch.stack([p[name] for p in path.points])
        norms = points.diff(dim=0).norm(dim=1)
        ratios = norms / points[1:].norm(dim=1)
        for quantity, values in (("update_norm", norms), ("update_ratio", ratios)):
            in_order = values.sort().values
            for reducer, q in (("p50", 0.5), ("p99", 0.99)):
                truth = float(in_order[math.floor(q * 2499 + 0.5)])
                assert result[quantity][name][reducer].value == pytest.approx(truth, rel=0.01)


# ---- Lipschitz


def test_sliding_windows_of_lipschitz_hold_the_samples_of_their_steps() -> None:
    model = seeded(mlp)
    found: dict[str, list[float]] = {"normalized_gradient_norm": [], "local_lipschitz": []}
    generator = torch.Generator().manual_seed(0)
    with Monitor(model, metrics=[Lipschitz()], window_steps=24, window_blocks=3) as monitor:
        for _ in range(60):
            x = torch.randn(1, 6, generator=generator)
            with Monitor(model, metrics=[Lipschitz()]) as alone:  # sees this one sample
                model(x).square().sum().backward()
                alone.step()
                single = alone.close_window()["lipschitz"]
            for quantity, values in found.items():
                (place,) = single[quantity]
                values.append(single[quantity][place].mean.value)
            model.zero_grad()
            monitor.step()
    assert [(w.first_step, w.last_step) for w in monitor.history][:4] == [(1, 8), (1, 16), (1, 24), (9, 32)]
    for window in monitor.history:
        for quantity, values in found.items():
            (place,) = window["lipschitz"][quantity]
            reducers = window["lipschitz"][quantity][place]
            truth = Distribution()
            truth.observe(torch.tensor(values[window.first_step - 1 : window.last_step], dtype=torch.float64))
            assert reducers.mean.count == window.steps
            assert reducers.mean.value == pytest.approx(truth.mean, rel=1e-12)
            for reducer, number in (("min", truth.min), ("max", truth.max)):
                assert reducers[reducer].value == number
            for reducer, q in (("p50", 0.5), ("p99", 0.99)):
                assert reducers[reducer].value == truth.quantile(q)
