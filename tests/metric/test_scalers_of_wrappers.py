"""Trainers' wrappers that step by a GradScaler of their own: it is found, and so is what it skips."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from wrappers import AcceleratedScaled, LightningStep, mlp

from lipcore import Monitor, PerSampleGradDots, PerSampleGradNorms, Trajectory

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
Y = X.sin().sum(1, keepdim=True)
BAD = (2, 5)
Make = Callable[[nn.Module], torch.optim.Optimizer]


class Mine(torch.optim.SGD):
    """A subclass whose step() calls the one that it has from torch."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


MADE: dict[str, Make] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "fused AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "nested": lambda m: Mine(m.parameters(), lr=0.1),
}


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


def accelerated(optimizer: torch.optim.Optimizer, by: torch.amp.GradScaler) -> Any:
    return AcceleratedScaled(optimizer, by)


def lightning(optimizer: torch.optim.Optimizer, by: torch.amp.GradScaler) -> Any:
    return LightningStep(optimizer, SimpleNamespace(precision_plugin=SimpleNamespace(scaler=by)))


WRAPPED = {"accelerate": accelerated, "Lightning": lightning}


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().double()


def train(model: nn.Module, optimizer: Any, by: torch.amp.GradScaler) -> tuple[list[Tensor], list[float]]:
    """The points between the steps, and the norms of the unscaled gradients of those that were made."""
    points, norms = [vector(model)], []
    for i in range(8):
        loss = nn.functional.mse_loss(model(X), Y) * (math.inf if i in BAD else 1.0)
        by.scale(loss).backward()
        if i not in BAD:
            norms.append(float(torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()))
            norms[-1] /= by.get_scale()
        optimizer.step()
        model.zero_grad()
        points.append(vector(model))
    return points, norms


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("source", ["difference", "optimizer", "snapshot"])
@pytest.mark.parametrize("made", MADE)
def test_the_wrappers_scaler_is_found(made: str, source: str, wrap: Callable[..., Any]) -> None:
    if made == "nested" and source == "optimizer":
        pytest.skip("no closed form of a subclass")
    control, by = mlp(), scaler()
    points, norms = train(control, wrap(MADE[made](control), by), by)
    model, by = mlp(), scaler()
    wrapper = wrap(MADE[made](model), by)
    metrics = [Trajectory(source=source), PerSampleGradNorms(loss_reduction="mean")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Monitor(model, wrapper, metrics, window_steps=None) as monitor:
            train(model, wrapper, by)
            window = monitor.compute()
    assert window is not None
    assert window.steps == 6
    found = window["trajectory"]
    assert found.details["skipped_steps"] == len(BAD)
    length = sum(float((b - a).norm()) for a, b in itertools.pairwise(points))
    assert found.path_length["total"].sum.value == pytest.approx(length, rel=1e-5)
    assert found.unmoved_steps["total"].sum.value == 0
    assert found.grad_norm["total"].mean.value == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    norm = window["per_sample_grad_norm"].norm["total"]
    assert norm.mean.count == 6 * len(X)
    assert torch.equal(vector(model), points[-1])


def test_a_scaler_that_is_given_goes_first() -> None:
    model, other, given = mlp(), torch.amp.GradScaler("cpu", init_scale=8.0), scaler()
    given.scale(torch.ones(1))
    wrapper = accelerated(MADE["SGD"](model), other)
    with Monitor(model, wrapper, [Trajectory()], window_steps=None, scaler=given) as monitor:
        other.scale(nn.functional.mse_loss(model(X), Y)).backward()
        norm = float(torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm())
        wrapper.step()
        window = monitor.compute()
    assert window is not None
    assert window["trajectory"].grad_norm["total"].last.value == pytest.approx(norm / 1024, rel=1e-6)


def test_nested_hooks_of_a_step_that_raises_are_forgotten() -> None:
    model, by = mlp(), scaler()
    optimizer = Mine(model.parameters(), lr=0.1)
    wrapper = accelerated(optimizer, by)
    with Monitor(model, wrapper, [Trajectory()], window_steps=None) as monitor:
        for i in range(4):
            by.scale(nn.functional.mse_loss(model(X), Y)).backward()
            if i == 1:
                wrapper.own_step, own = lambda: 1 / 0, wrapper.own_step
                with pytest.raises(ZeroDivisionError):
                    wrapper.step()
                wrapper.own_step, by._per_optimizer_states = own, scaler()._per_optimizer_states
                continue
            wrapper.step()
            model.zero_grad()
        window = monitor.compute()
    assert window is not None
    assert window.steps == 3


def by_hand(model: nn.Module, given: bool, metric: Any) -> Any:
    optimizer, by = MADE["fused AdamW"](model), scaler()
    settings = {"scaler": by} if given else {}
    with Monitor(model, optimizer, [metric], window_steps=None, **settings) as monitor:
        for _ in range(3):
            by.scale(nn.functional.mse_loss(model(X), Y)).backward()
            by.step(optimizer)
            by.update()
            model.zero_grad()
        return monitor.compute()


@pytest.mark.parametrize("metric", [Trajectory, lambda: PerSampleGradNorms(loss_reduction="mean")])
def test_a_scaler_that_nobody_passed_is_told_once(metric: Callable[[], Any]) -> None:
    with pytest.warns(RuntimeWarning, match=r"a GradScaler makes AdamW\.step\(\).*pass it as scaler=") as told:
        by_hand(mlp(), False, metric())
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_hand(mlp(), True, metric())
        by_hand(mlp(), False, Trajectory(stats=["path_length"]))  # needs no gradient


def dots(model: nn.Module) -> PerSampleGradDots:
    reference = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    return PerSampleGradDots(reference=reference, loss_reduction="mean")


@pytest.mark.parametrize("make", [lambda _: PerSampleGradNorms(loss_reduction="mean"), dots], ids=["norms", "dots"])
def test_numbers_that_hold_the_scale_of_an_unknown_scaler_are_not_labelled_exact(
    make: Callable[[nn.Module], Any],
) -> None:
    model = mlp()
    metric = make(model)
    with pytest.warns(RuntimeWarning, match="a GradScaler makes"):
        (result,) = by_hand(model, False, metric).values()
    value = result["dot" if "dot" in metric.name else "norm"]["total"]["mean"]
    assert value.label == "heuristic"
    assert "a GradScaler makes the step, and lipcore was given none: these numbers hold its scale" in value.note
    assert sum(result.details["not_proved"].values()) == 3  # of every step: the first one too
    assert "hold its scale" in metric.unproved

    model = mlp()
    (result,) = by_hand(model, True, make(model)).values()
    assert result["dot" if "dot" in metric.name else "norm"]["total"]["mean"].label == "exact"


def test_a_scale_that_is_read_from_the_loss_is_known_without_the_scaler() -> None:
    model, by, metric = mlp(), scaler(), PerSampleGradNorms(loss_reduction="auto")
    optimizer = MADE["SGD"](model)
    with warnings.catch_warnings(), Monitor(model, optimizer, [metric], window_steps=None) as monitor:
        warnings.simplefilter("ignore")
        for _ in range(2):
            loss = nn.functional.mse_loss(model(X), Y)
            monitor.log(loss=loss)
            by.scale(loss).backward()
            by.step(optimizer)
            by.update()
            model.zero_grad()
        assert monitor.compute()[metric.name].norm["total"].mean.label == "exact"
