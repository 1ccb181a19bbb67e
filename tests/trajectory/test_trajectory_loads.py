"""Weights that are loaded or swapped while a model is watched: not a step, but a distance."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Wrapper, batches, mlp, seeded, train
from points import Points
from torch import Tensor, nn

from lipcore import Monitor, Trajectory

DATA = batches(5, 4)


def model_of() -> nn.Module:
    return seeded(lambda: mlp(5, 7, 6, 1))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def watched(model: nn.Module) -> tuple[torch.optim.Optimizer, Monitor, Points]:
    """The Points look after every step of the optimizer."""
    optimizer, points = sgd(model), Points((n, p) for n, p in model.named_parameters() if p.requires_grad)
    monitor = Monitor(model, optimizer, [Trajectory()])
    optimizer.register_step_post_hook(lambda *_: points.look())
    return optimizer, monitor, points


# ---- loading weights is not a step


def shifted(model: nn.Module) -> dict[str, Tensor]:
    return {name: value + 0.5 for name, value in model.state_dict().items()}


def average(model: nn.Module) -> nn.Module:
    ema = copy.deepcopy(model)
    for parameter in ema.parameters():
        parameter.data += 0.5
    return ema


LOADS: dict[str, Callable[[nn.Module], Any]] = {
    "whole": lambda m: m.load_state_dict(shifted(m)),
    "not_strict": lambda m: m.load_state_dict({"0.weight": m[0].weight + 1, "x": torch.ones(2)}, strict=False),
    "submodule": lambda m: m[2].load_state_dict(shifted(m[2])),
    "wrapped": lambda m: Wrapper(m).load_state_dict(shifted(Wrapper(m))),
    "ema_in_and_out": lambda m: [m.load_state_dict(s) for s in (average(m).state_dict(), shifted(m))],
    "twice": lambda m: [m.load_state_dict(shifted(m)) for _ in range(2)],
}


@pytest.mark.parametrize("load", LOADS)
def test_a_load_is_not_a_step_but_distance_sees_it(load: str) -> None:
    model = model_of()
    optimizer, monitor, points = watched(model)
    with monitor:
        train(model, DATA, optimizer)
        LOADS[load](model)
        points.jump()
        before = monitor.compute()["trajectory"]
        assert before.path_length["total"].sum.value == pytest.approx(float(points.norms().sum()), rel=1e-5)
        train(model, DATA, optimizer)
        window = monitor.compute()
    points.check(window)
    loads = 2 if load in ("ema_in_and_out", "twice") else 1
    assert window["trajectory"].details["rebased"] == loads
    assert window.steps == 10


@pytest.mark.parametrize("wrap", ["ddp_like", "compiled"])
@pytest.mark.parametrize("through", ["outer", "inner"])
def test_loads_of_a_wrapped_model(through: str, wrap: str) -> None:
    torch._dynamo.reset()
    inner = model_of()
    model: Any = Wrapper(inner) if wrap == "ddp_like" else torch.compile(inner, backend="eager")
    optimizer, points = sgd(inner), Points(inner.named_parameters())
    with Monitor(model, optimizer, [Trajectory()]) as monitor:
        for _ in range(2):
            train(model, DATA[:1], optimizer)
            points.look()
            (model if through == "outer" else inner).load_state_dict(shifted(model if through == "outer" else inner))
            points.jump()
        train(model, DATA[:1], optimizer)
        points.look()
        points.check(monitor.compute())
        assert monitor.compute()["trajectory"].details["rebased"] == 2


def test_a_load_with_new_parameter_objects() -> None:
    model = model_of()
    optimizer, monitor, _ = watched(model)
    with monitor:
        train(model, DATA, optimizer)
        length = monitor.compute()["trajectory"].path_length["total"].sum.value
        model.load_state_dict(shifted(model), assign=True)
        points = Points(model.named_parameters())
        monitor.step()  # nothing has moved since
        assert monitor.compute()["trajectory"].path_length["total"].sum.value == length
        model[0].weight.data += 1
        points.look()
        monitor.step()
        after = monitor.compute()["trajectory"]
    assert after.path_length["total"].sum.value == pytest.approx(length + 35**0.5, rel=1e-6)
    assert after.details["rebased"] == 1


def test_a_failed_load_does_not_stop_the_next_from_being_seen() -> None:
    model = model_of()
    optimizer, monitor, points = watched(model)
    with monitor:
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict(shifted(model) | {"2.bias": torch.zeros(3)})
        points.jump()  # the others were loaded
        train(model, DATA, optimizer)
        model[0].load_state_dict(shifted(model[0]))
        points.jump()
        train(model, DATA, optimizer)
        points.check(monitor.compute())


def test_loaded_nan_do_not_become_the_start_of_the_next_step() -> None:
    model = model_of()
    optimizer, monitor, points = watched(model)
    with monitor:
        train(model, DATA, optimizer)
        good = copy.deepcopy(model.state_dict())
        model.load_state_dict({k: torch.full_like(v, torch.nan) for k, v in good.items()})
        monitor.step()
        model.load_state_dict(good)
        train(model, DATA, optimizer)
        result = monitor.compute()["trajectory"]
    assert result.nonfinite_steps["0.weight"].sum.value == 1
    points.check(result)


def swapped(model: nn.Module, values: dict[str, Tensor], way: str) -> None:
    for name, parameter in list(model.named_parameters()):
        if way == "data":
            parameter.data = values[name].clone()
        elif way == "copy":
            parameter.data.copy_(values[name])
        else:
            torch.utils.swap_tensors(parameter, nn.Parameter(values[name].clone()))


@pytest.mark.parametrize("way", ["data", "copy", "swap"])
@pytest.mark.parametrize("declared", [False, True])
def test_an_average_swapped_in_and_out_between_steps(declared: bool, way: str) -> None:
    """In for an evaluation and out again: the next step starts where the last one ended, declared or not."""
    model = model_of()
    optimizer, monitor, points = watched(model)
    trajectory = monitor.metrics["trajectory"]
    with monitor:
        for x, y in DATA:
            train(model, [(x, y)], optimizer)
            live = {n: p.detach().clone() for n, p in model.named_parameters()}
            swapped(model, {n: value + 1 for n, value in live.items()}, way)
            model(x)
            swapped(model, live, way)
            if declared:
                trajectory.rebase()
        result = monitor.compute()["trajectory"]
    points.check(result)
    assert result.details.get("rebased", 0) == (len(DATA) if declared else 0)


@pytest.mark.parametrize("way", ["data", "copy"])
def test_rebase_declares_what_no_hook_sees(way: str) -> None:
    """Weights written past load_state_dict() count as movement unless that is said."""
    for declared in (False, True):
        model = model_of()
        optimizer, monitor, points = watched(model)
        with monitor:
            train(model, DATA, optimizer)
            swapped(model, {n: p.detach() + 1 for n, p in model.named_parameters()}, way)
            if declared:
                monitor.metrics["trajectory"].rebase()
                points.jump()
            said = (
                contextlib.nullcontext() if declared else pytest.warns(RuntimeWarning, match="parameters moved after")
            )
            with said:
                train(model, DATA, optimizer)
            points.check(monitor.compute())
