"""Optimizers that step in hooks of parameters, so that no gradient outlives the backward pass: numbers are those of a
loop that steps behind it, but for those of the gradients themselves, which are left out by name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, TensorStats, Trajectory
from lipcore.metric import Metric, MetricResult, PlanLine
from lipcore.metric.protocol import TAKEN

STEPS, WINDOW = 9, 3
STATS = ("update_norm", "path_length", "weight_norm", "grad_norm", "clipped_grad_norm")


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


def behind(model: nn.Module) -> tuple[list[Any], Callable[[], None]]:
    optimizer = adam(model.parameters())

    def after() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return [optimizer], after


def each_parameter(model: nn.Module) -> tuple[list[Any], Callable[[], None]]:
    optimizers = {parameter: adam([parameter]) for parameter in model.parameters()}

    def hook(parameter: Any) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(hook)
    return list(optimizers.values()), lambda: None


def one_layer(model: Any) -> tuple[list[Any], Callable[[], None]]:
    """Gradients of the others are there when the pass is over: they alone are not the gradient."""
    first, others = each_parameter(model[0])[0], adam(model[2].parameters())

    def after() -> None:
        others.step()
        others.zero_grad()

    return [*first, others], after


def at_the_last_gradient(model: nn.Module) -> tuple[list[Any], Callable[[], None]]:
    optimizer, came = adam(model.parameters()), []

    def hook(parameter: Any) -> None:
        came.append(parameter)
        if len(came) == len(list(model.parameters())):
            came.clear()
            optimizer.step()
            optimizer.zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    return [optimizer], lambda: None


WAYS = [each_parameter, one_layer, at_the_last_gradient]


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def train(way: Any, steps: int = STEPS, between: Callable[[int], None] = lambda step: None, **settings: Any) -> Monitor:
    model, generator = made(), torch.Generator().manual_seed(3)
    optimizers, after = way(model)
    metrics = [
        Trajectory(stats=STATS),
        PerSampleGradNorms(loss_reduction="mean"),
        Lipschitz(),
        TensorStats(every_steps=1),
    ]
    monitor = Monitor(model, optimizers, **{"metrics": metrics, "window_steps": WINDOW} | settings)
    with monitor:
        for step in range(1, steps + 1):
            (model(torch.randn(4, 6, generator=generator)) - 1).square().mean().backward()
            after()
            between(step)
    return monitor


@pytest.mark.filterwarnings("ignore:trajectory. grad_norm lacks steps")
@pytest.mark.parametrize("way", WAYS)
def test_all_but_gradients_is_as_behind_the_pass(way: Any) -> None:
    found, right = list(train(way).history), list(train(behind).history)
    assert [(window.first_step, window.last_step) for window in found] == [(1, 3), (4, 6), (7, 9)]
    for window, expected in zip(found, right, strict=True):
        numbers, truth = window.flat("tensor") | window.flat(), expected.flat("tensor") | expected.flat()
        gone = {key for key in truth if key.startswith(("trajectory/grad_norm", "tensor_stats/gradient."))}
        assert gone == set(truth) - set(numbers)
        noise = ("noise_scale", "gradient_noise", "gradient_sq", "skipped_steps")
        for key in numbers.keys() - {key for key in numbers if key.split("/")[1].startswith(noise)}:
            assert numbers[key] == pytest.approx(truth[key], rel=1e-6, abs=1e-12, nan_ok=True), key


def test_what_is_left_out_has_its_reason() -> None:
    with pytest.warns(UserWarning, match=f"grad_norm lacks steps: {TAKEN[:40]}.*'clipped_grad_norm'"):
        window = train(each_parameter).history[-1]
    assert window["trajectory"].details["grad_norm_off"].startswith(TAKEN)
    assert window["tensor_stats"].details["not_read"]["gradient 0.weight"] == TAKEN
    assert window["per_sample_grad_norm"].details["noise_scale_skipped"] == {f"{TAKEN}; pass noise_scale=False": WINDOW}
    assert math.isnan(window["per_sample_grad_norm"].noise_scale["total"].mean.value)


def test_gradients_of_earlier_passes_are_not_taken_for_the_step() -> None:
    """Micro-batches whose gradients add up, until the last pass of a step takes them away."""
    model = made()
    optimizers, step_now = {parameter: adam([parameter]) for parameter in model.parameters()}, False

    def hook(parameter: Any) -> None:
        if step_now:
            squares.append(float(parameter.grad.double().square().sum()))
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(hook)
    norms = PerSampleGradNorms(loss_reduction="mean", scale=0.5)
    metrics, right = [Trajectory(stats=STATS), norms, TensorStats(every_steps=1)], []
    with warnings.catch_warnings(), Monitor(model, list(optimizers.values()), metrics, window_steps=2) as monitor:
        warnings.simplefilter("ignore")
        for micro in range(8):
            squares: list[float] = []
            step_now = micro % 2 == 1
            (model(torch.randn(4, 6)).square().mean() / 2).backward()
            right += [math.sqrt(sum(squares))] if step_now else []
    for window, expected in zip(monitor.history, (right[:2], right[2:]), strict=True):
        assert window["trajectory"].clipped_grad_norm["total"].mean.value == pytest.approx(sum(expected) / 2)
        assert not [key for key in window.flat() if "/grad_norm" in key or "/gradient." in key]
        assert math.isnan(window["per_sample_grad_norm"].noise_scale["total"].mean.value)
        assert window["per_sample_grad_norm"].norm["total"].missing.value == 0


def test_an_error_in_such_a_step_is_raised_by_the_users_next_call() -> None:
    class Fails(Metric):
        name = "fails"

        def bind(self, model: nn.Module) -> None:
            pass

        def plan(self) -> list[PlanLine]:
            return []

        def observe_step(self) -> None:
            raise ArithmeticError("as expected")

        def finalize(self) -> MetricResult:
            return MetricResult(self.name)

        def reset(self) -> None:
            pass

    made_steps: list[int] = []
    with pytest.raises(ArithmeticError, match="as expected"):
        train(each_parameter, between=made_steps.append, metrics=[Fails()])
    assert len(made_steps) == STEPS
