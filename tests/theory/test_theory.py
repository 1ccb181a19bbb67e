"""lipcore.theory against formulas evaluated by hand on recorded runs."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from theory_runs import EPOCHS, SIZE, Run
from torch import nn

from lipcore import Lipschitz, Monitor, local_lipschitz, theory


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


def test_sandwich_over_any_interval(run: Run) -> None:
    found = theory.sandwich(run.history, first_step=SIZE + 1, last_step=3 * SIZE)
    r, lam = (np.array(values[1:3]).ravel() for values in (run.r, run.lam))
    sigma = run.sigma[0]
    assert (found.first_step, found.last_step) == (SIZE + 1, 3 * SIZE)
    assert found.middle.value == pytest.approx(r.mean(), rel=1e-6)
    assert found.lower.value == pytest.approx(lam.mean() / float(sigma[0]), rel=1e-6)
    assert found.upper.value == pytest.approx(lam.mean() / float(sigma[-1]), rel=1e-6)
    assert found.length.value == pytest.approx(r.sum(), rel=1e-6)
    assert found.upper_valid
    assert found.lower.value <= found.middle.value <= found.upper.value
    assert {found.lower.label, found.upper.label} == {"exact"}


def test_sandwich_of_a_first_layer_that_moves_or_widens() -> None:
    moving = theory.sandwich(Run(frozen=False, epochs=2).history)
    assert moving.lower.label == moving.upper.label == "heuristic"
    wide = theory.sandwich(Run(inputs=3, width=5, epochs=2).history)
    assert not wide.upper_valid
    assert "more outputs than inputs" in wide.upper.note
    assert wide.lower.valid


def test_steadiness(run: Run) -> None:
    curve = theory.steadiness(run.history)
    expected = [max(max(r) for r in run.r[i:]) for i in range(EPOCHS)]
    assert curve.phi == pytest.approx(expected, rel=1e-6)
    assert curve.steps == tuple(1 + SIZE * i for i in range(EPOCHS))
    assert curve.median == pytest.approx([np.quantile(r, 0.5, method="inverted_cdf") for r in run.r], rel=0.1)
    assert curve.at(2) == curve.phi[0]
    assert math.isnan(curve.at(10**6))
    assert curve.earliest(curve.phi[0]) == 1
    assert curve.earliest(0.0) is None


def test_corollary_1(run: Run) -> None:
    found = theory.lipschitz_bound(run.history, run.model, run.x)
    assert found.beta.value == pytest.approx(float(run.sigma[0][0]))
    assert found.bound.value == pytest.approx(float(run.sigma[0][0]) * max(max(r) for r in run.r), rel=1e-6)
    assert found.bound.value >= max(max(lam) for lam in run.lam)
    assert found.largest.value == pytest.approx(float(local_lipschitz(run.model, run.x).max()))
    product = math.prod(float(torch.linalg.matrix_norm(run.model[i].weight.detach(), ord=2)) for i in (0, 2, 4))
    assert found.spectral_product.value == pytest.approx(product)
    assert not theory.lipschitz_bound(run.history).largest.valid
    assert "of the model as it is now" in found.largest.note
    assert "above the bound" not in found.largest.note


def test_assumption_1() -> None:
    passes = [torch.tensor(values) for values in ([9.0, 9.0, 9.0], [1.0, 2.0, 0.0], [1.5, 1.0, 0.0])]
    found = theory.slack(passes, steps=[0, 10, 20], tau=10)
    assert found.gamma.value == pytest.approx(1.0)
    assert found.median.value in (pytest.approx(0.5), pytest.approx(0.75))
    assert (found.tau, found.constant, found.gamma.label, found.gamma.valid) == (10, 1, "heuristic", True)


def test_assumption_1_of_passes_in_any_order_and_container() -> None:
    values = [torch.tensor([3.0, 3.0]), torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0])]
    found = theory.slack(iter(values), steps=iter([30, 10, 20]))
    assert (found.tau, found.gamma.value) == (10, 2.0)
    later = theory.slack(values, steps=[30, 10, 20], tau=15)
    assert (later.tau, later.gamma.value) == (20, 0.5)


@pytest.mark.parametrize(
    ("first", "second", "gamma", "median", "reason"),
    [
        ([0.0, 1.0, 2.0], [5.0, 1.5, 2.0], math.inf, 0.5, "1 points with lambda = 0 in some passes only"),
        ([0.0, 0.0], [0.0, 5.0], math.inf, math.inf, "1 points with lambda = 0 left out"),
        ([0.0, 0.0], [0.0, 0.0], math.nan, math.nan, "lambda is 0 at all points"),
    ],
)
def test_no_factor_takes_a_constant_from_zero(
    first: list[float], second: list[float], gamma: float, median: float, reason: str
) -> None:
    found = theory.slack([torch.tensor(first), torch.tensor(second)])
    assert found.gamma.value == pytest.approx(gamma, nan_ok=True)
    assert found.median.value == pytest.approx(median, nan_ok=True)
    assert (found.gamma.valid, found.median.valid) == (False, math.isfinite(median))
    assert reason in found.gamma.note


def test_sigmoid_head() -> None:
    found = theory.sigmoid_head(torch.tensor([[0.5], [0.9], [0.2]]))
    assert found.mu.value == pytest.approx(0.1)
    assert found.xi.value == pytest.approx(0.25 / 0.09)
    assert not theory.sigmoid_head(torch.tensor([0.0, 0.3])).xi.valid
    near = theory.sigmoid_head(torch.tensor([5e-324, 0.3], dtype=torch.float64))
    assert (near.mu.value, near.mu.valid) == (5e-324, True)
    assert (near.xi.value, near.xi.valid, near.xi.note) == (math.inf, False, "beyond the largest float")


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_intrinsic_dimension(dimension: int) -> None:
    torch.manual_seed(0)
    flat = torch.randn(1500, dimension) @ torch.randn(dimension, 20)
    found = theory.intrinsic_dimension(torch.cat([flat, flat[:50]]))
    assert found.value == pytest.approx(dimension, rel=0.15)
    assert found.label == "heuristic"


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e-165, 1e-30, 1e160, 1e200, 1.7e308])
@pytest.mark.parametrize("center", [-0.5, 0.0])
def test_intrinsic_dimension_has_no_scale(scale: float, center: float) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(300, 3, dtype=torch.float64, generator=generator) + center
    found, at_one = theory.intrinsic_dimension(points * scale), theory.intrinsic_dimension(points)
    assert found.valid
    assert found.value == pytest.approx(at_one.value, rel=1e-2 if scale < 1e-300 else 1e-9)


def test_intrinsic_dimension_beyond_the_range_of_floats() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(300, 3, dtype=torch.float64, generator=generator)
    found = theory.intrinsic_dimension(torch.cat([points * 1e-250, points]))
    assert not found.valid
    assert "nearer to each other than to others" in found.note


def test_covering_number() -> None:
    assert theory.log_covering_number(1.0, extent=math.inf, dimension=0) == 0
    assert theory.log_covering_number(1.0, extent=math.inf, dimension=1) == math.inf
    assert theory.log_covering_number(0.0, extent=math.inf, dimension=0) == math.inf
    assert theory.log_covering_number(2.0, extent=1.0, dimension=3) == 0
    assert theory.log_covering_number(0.0, extent=1.0, dimension=3) == math.inf
    # An interval of length 2 needs 2 balls of radius 1/2: the bound is above.
    assert theory.log_covering_number(0.5, extent=1.0, dimension=1) >= math.log(2)


def test_findings_print_and_become_json(run: Run) -> None:
    for found in (theory.sandwich(run.history), theory.steadiness(run.history), theory.lipschitz_bound(run.history)):
        text = repr(found)
        assert text.startswith(type(found).__name__ + "\n  ")
        json.dumps(found.to_dict(), allow_nan=False)
    assert "not valid: pass model and x" in repr(theory.lipschitz_bound(run.history))


def vectors() -> list[Any]:
    """A run whose outputs have several values: no sandwich."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with Monitor(model, metrics=[Lipschitz(quantity="residual")]) as monitor:
        model(torch.randn(5, 3)).square().mean().backward()
        monitor.step()
        monitor.close_window()
    return list(monitor.history)


BAD = {
    "no windows": (lambda run: theory.sandwich([]), ValueError, "no window was closed yet"),
    "no such steps": (lambda run: theory.sandwich(run.history, first_step=999), ValueError, "steps in it: 1 to 48"),
    "not windows": (lambda run: theory.steadiness([1.0]), TypeError, "got a float in it"),
    "vector outputs": (lambda run: theory.sandwich(vectors()), ValueError, "scalar output"),
    "no singular values": (lambda run: theory.lipschitz_bound(vectors()), ValueError, "no singular values"),
    "no such metric": (lambda run: theory.bias_variance(vectors(), "0.bias"), ValueError, "no metric 'trajectory'"),
    "no such place": (lambda run: theory.sandwich(run.history, place="x"), ValueError, "place: .*'x'.*'model:Linear'"),
    "no such parameter": (lambda run: theory.bias_distance(run.history, "b"), ValueError, "parameter: .*'0.bias'"),
    "eps of 0": (
        lambda run: theory.bias_variance(run.history, "0.bias", learning_rate=1.0, eps=[0.0] * SIZE),
        ValueError,
        "eps: expected positive numbers, got 0.0 at step 0",
    ),
    "too few eps": (
        lambda run: theory.bias_variance(run.history, "0.bias", learning_rate=1.0, eps=[1.0]),
        ValueError,
        "eps: expected one value for each of the window's 12 steps, got 1",
    ),
    "learning rate": (
        lambda run: theory.bias_distance(run.history, "0.bias", learning_rate=-1.0),
        ValueError,
        "positive",
    ),
    "one pass": (lambda run: theory.slack([torch.ones(3)]), ValueError, "at least two"),
    "passes that are text": (lambda run: theory.slack("ab"), ValueError, "passes: expected tensors .*got 'ab'"),
    "passes that are none": (lambda run: theory.slack(None), ValueError, "passes: expected tensors .*got None"),
    "other lengths": (lambda run: theory.slack([torch.ones(3), torch.ones(2)]), ValueError, "same N"),
    "logits": (lambda run: theory.sigmoid_head(torch.tensor([3.0])), ValueError, "was this the logit"),
    "no samples": (lambda run: theory.sigmoid_head(torch.empty(0)), ValueError, "at least one value"),
    "few points": (lambda run: theory.intrinsic_dimension(torch.ones(5, 2)), ValueError, "at least 12 points"),
    "equal points": (
        lambda run: theory.intrinsic_dimension(torch.ones(50, 2)),
        ValueError,
        "only 1 of its points differ",
    ),
    "points that are not finite": (
        lambda run: theory.intrinsic_dimension(torch.full((50, 2), math.nan)),
        ValueError,
        "x: expected finite points",
    ),
    "a number of points": (
        lambda run: theory.intrinsic_dimension(torch.tensor(1.0)),
        ValueError,
        "got a single number",
    ),
    "half of it": (lambda run: theory.lipschitz_bound(run.history, run.model), ValueError, "both or neither"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_words(run: Run, name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call(run)


def test_a_rank_deficient_first_layer_has_no_upper_side() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight[1] = model[0].weight[0]
        model[0].bias.fill_(5.0)
    with Monitor(model, metrics=[Lipschitz()]) as monitor:
        model(torch.randn(5, 3)).square().mean().backward()
        monitor.step()
        monitor.close_window()
    upper = theory.sandwich(monitor.history).upper
    assert not upper.valid
    assert "rank-deficient" in upper.note
    assert math.isinf(upper.value)
