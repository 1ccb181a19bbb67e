"""Theorem 3: against the formula by hand, and where its radius is not defined."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor, theory
from lipcore.metric.results import History
from lipcore.regions import activation_patterns


def classifier(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid())


def trained(model: nn.Module, x: Tensor, steps: int = 50, **settings: Any) -> History:
    y = (x[:, :1] > 0).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, [Lipschitz(**settings)]) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            output = model(x)
            last = model[-1] if isinstance(model, nn.Sequential) else model
            loss = nn.functional.binary_cross_entropy(output if isinstance(last, nn.Sigmoid) else output.sigmoid(), y)
            loss.backward()
            optimizer.step()
        monitor.close_window()
    return monitor.history


def inputs(count: int = 200) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(0))


def test_theorem_3() -> None:
    model, x = classifier(), inputs()
    history = trained(model, x)
    found = theory.generalization(history, model, x, gamma=0.5, dimension=3.0, delta=0.1)
    f = model(x).detach().double()
    mu = float(torch.minimum(f, 1 - f).min())
    shares = np.concatenate(list(activation_patterns(model, x).activity().values()))
    assert (found.units, found.dead_units) == (11, int((shares == 0).sum()))
    p_min = shares[shares > 0].min()
    c = 1.5 * found.beta.value / (mu * (1 - mu) * p_min)
    radius = float((1 - 2 * f).abs().min()) / (c * math.log(11) * found.phi.value)
    assert found.c.value == pytest.approx(c)
    assert found.radius.value == pytest.approx(radius)
    assert found.lambda_steady.value == pytest.approx(found.phi.value * c / 4 * math.log(11))
    assert math.prod(found.factors.values()) == pytest.approx(1 / radius)
    assert found.killed_by == max(found.factors, key=found.factors.__getitem__)
    extent = float((x - x.mean(0)).double().norm(dim=1).max())
    cover = (1 + 2 * extent / radius) ** 3
    expected = math.sqrt((4 * math.log(2) * cover + 2 * math.log(10)) / 200)
    assert found.bound.value == pytest.approx(expected, rel=1e-3)
    assert found.bound.valid
    assert found.vacuous
    assert found.dimension.note == "given"
    assert theory.generalization(history, model, x, gamma=0.5).dimension.label == "heuristic"


def test_the_model_is_run_in_batches_and_left_as_it_was() -> None:
    model, x = classifier(), inputs(1100)
    model[2] = nn.utils.parametrizations.spectral_norm(model[2])
    history = trained(model, x, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sizes = []
    with model[4].register_forward_hook(lambda module, given, output: sizes.append(len(output))):
        found = theory.generalization(history, model, x, gamma=0.5, dimension=3.0)
    assert max(sizes) == 1024
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.margin.value == pytest.approx(float((1 - 2 * model.eval()(x).detach()).abs().min()), abs=1e-3)


@torch.no_grad()
def on_the_boundary(model: nn.Sequential) -> None:
    model[4].weight.zero_()
    model[4].bias.zero_()


@torch.no_grad()
def saturated(model: nn.Sequential) -> None:
    model[4].bias.fill_(1e4)


UNDEFINED = {
    "margin 0": (on_the_boundary, "1 / margin"),
    "mu 0": (saturated, "1 / (mu (1 - mu))"),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_an_infinite_factor_makes_the_radius_0(name: str) -> None:
    change, factor = UNDEFINED[name]
    model, x = classifier(), inputs()
    history = trained(model, x, 3)
    change(model)
    found = theory.generalization(history, model, x, gamma=0.0, dimension=3.0)
    assert (found.radius.value, found.bound.value, found.vacuous) == (0.0, math.inf, True)
    assert found.killed_by == factor
    assert not found.bound.valid
    assert f"{factor} is infinite" in found.bound.note
    assert found.lambda_steady.valid == (name == "margin 0")


def test_a_history_that_diverged_makes_the_radius_0() -> None:
    model, x = classifier(), inputs()
    with Monitor(model, metrics=[Lipschitz()]) as monitor:
        model(x).sum().backward()
        monitor.step()
        before = model[0].weight.detach().clone()
        model[0].weight.data.fill_(math.nan)
        monitor.close_window()
    model[0].weight.data.copy_(before)
    found = theory.generalization(monitor.history, model, x, gamma=0.0, dimension=3.0)
    assert (found.radius.value, found.bound.value, found.vacuous, found.killed_by) == (0.0, math.inf, True, "beta")
    for value in (found.radius, found.bound, found.c, found.lambda_steady):
        assert not value.valid
        assert value.note


def test_an_unknown_dimension_is_vacuous() -> None:
    """The corners of a simplex: all distances are equal."""
    x = torch.eye(20)
    model = nn.Sequential(nn.Linear(20, 4), nn.ReLU(), nn.Linear(4, 1), nn.Sigmoid())
    found = theory.generalization(trained(model, x, 2), model, x, gamma=0.0)
    assert not found.dimension.valid
    assert "distances are equal" in found.dimension.note
    assert (found.bound.value, found.bound.valid, found.vacuous) == (math.inf, False, True)


def two_heads(model: nn.Sequential) -> History:
    """Windows of the logit, inside the model whose output is the probability."""
    return trained(model, inputs(), 2, output="4")


CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "gamma": (trained, {"gamma": -1.0}, "gamma: expected a finite number >= 0"),
    "gamma that is text": (trained, {"gamma": "x"}, "gamma: expected a number, got 'x'"),
    "delta": (trained, {"delta": 1.0}, "delta: expected a number between 0 and 1"),
    "dimension": (trained, {"dimension": math.inf}, "dimension: expected a positive number"),
    "logits": (trained, {"model": "logit"}, r"values in \[0, 1\].*logit|the model ends in a Linear"),
    "inputs": (trained, {"x": torch.full((4, 3), math.nan)}, "x: expected finite inputs"),
    "a logit's windows": (
        lambda model, x, steps: trained(model[:-1], x, steps),
        {},
        "place: the windows' numbers are of 'model:Linear', but the model ends in a Sigmoid",
    ),
    "a logit's windows, by name": (
        lambda model, x, steps: two_heads(model),
        {},
        "place: the windows' numbers are of '4:Linear', but the model ends in a Sigmoid",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_theorem_is_not_about_is_refused(name: str) -> None:
    make, settings, message = CASES[name]
    model, x = classifier(), inputs()
    history = make(model, x, 2)
    arguments = {"model": model, "x": x, "gamma": 0.0} | settings
    if arguments["model"] == "logit":
        arguments["model"] = model[:-1]
    with pytest.raises(ValueError, match=message):
        theory.generalization(history, **arguments)


def test_one_unit_has_no_logarithm() -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 1), nn.Sigmoid())
    model[0].bias.data.fill_(10.0)
    with pytest.raises(ValueError, match=r"model: it has one unit.*log\(sum n_l\) = 0"):
        theory.generalization(trained(model, inputs(), 2), model, inputs(), gamma=0.0)
