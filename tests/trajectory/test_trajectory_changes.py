"""A model that changes while it is watched: right, or refused by name; what rebind() keeps and what starts anew."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batches, mlp, mse, seeded, train
from points import Points, counted_hooks
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


def shifted(model: nn.Module) -> dict[str, Tensor]:
    return {name: value + 0.5 for name, value in model.state_dict().items()}


# ---- parameters that come, go and change


def late_layer(model: nn.Module) -> None:
    model.add_module("5", nn.Linear(1, 1))


def untie(model: nn.Module) -> None:
    model[2].bias = nn.Parameter(model[2].bias.detach().clone())


def tie(model: nn.Module) -> None:
    model[2].weight = model[0].weight


GONE: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "removed": (lambda m: m[0].register_parameter("weight", None), r"0\.weight.*removed"),
    "deleted": (lambda m: delattr(m[0], "bias"), r"0\.bias.*removed"),
    "resized": (lambda m: setattr(m[2], "weight", nn.Parameter(torch.zeros(6, 9))), r"2\.weight.*shape"),
    "half": (lambda m: m.half(), r"0\.weight.*dtype"),
    "to_double": (lambda m: m[4].to(torch.float64), r"4\.weight.*dtype"),
    "data_resized": (lambda m: setattr(m[0].weight, "data", torch.zeros(2)), r"0\.weight.*shape"),
}


@pytest.mark.parametrize("case", GONE)
def test_a_change_that_does_not_fit_stops_the_recording_by_name(case: str) -> None:
    change, words = GONE[case]
    model = model_of()
    optimizer, monitor, _ = watched(model)
    train(model, DATA, optimizer)
    change(model)
    with pytest.warns(RuntimeWarning, match=words), pytest.raises(ValueError, match=words):
        monitor.step()
    monitor.rebind()  # the way out
    points = Points(model.named_parameters())
    for parameter in model.parameters():
        parameter.data += 0.25
    monitor.step()
    points.look()
    points.check(monitor.compute(), distance=False)
    monitor.close()
    assert counted_hooks(model) == 0


NEW: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any], list[str]]] = {
    "unfrozen": (lambda m: m[0].requires_grad_(False), lambda m: m[0].requires_grad_(True), ["0.weight", "0.bias"]),
    "added": (lambda m: None, late_layer, ["5.weight", "5.bias"]),
    "untied": (lambda m: setattr(m[2], "weight", m[0].weight), lambda m: setattr(m[2], "weight", nn.Parameter(
        torch.ones(7, 7))), ["2.weight"]),
    "in the place of a frozen one": (lambda m: m[0].weight.requires_grad_(False), lambda m: setattr(m[0], "weight",
        nn.Parameter(torch.ones(7, 7))), ["0.weight"]),
    "of an activation": (lambda m: None, lambda m: m[1].register_parameter("slope", nn.Parameter(torch.ones(3))),
        ["1.slope"]),
}  # fmt: skip


def square_model() -> nn.Module:
    return seeded(lambda: mlp(5, 5, 5, 1))


@pytest.mark.parametrize("by", ["monitor", "hand"])
@pytest.mark.parametrize("case", NEW)
def test_parameters_that_are_new_are_warned_of_once_and_rebound(case: str, by: str) -> None:
    prepare, change, names = NEW[case]
    model = seeded(lambda: nn.Sequential(*mlp(7, 7, 7, 1)))
    prepare(model)
    trajectory = Trajectory()
    monitor = Monitor(model, metrics=[trajectory]) if by == "monitor" else None
    if monitor is None:
        trajectory.bind(model)
    tick = monitor.step if monitor else trajectory.update

    def move() -> None:
        for parameter in model.parameters():
            parameter.data += 0.5
        tick()

    move()
    old = trajectory.compute().path_length["4.weight"].cumulative.value
    change(model)
    move()
    with pytest.warns(UserWarning, match="rebind") as caught:
        trajectory.compute()
        trajectory.compute()
    assert sorted(str(w.message).split("'")[1] for w in caught) == sorted(names)
    assert not set(names) & set(trajectory.compute().path_length)
    (monitor or trajectory).rebind()
    points = Points(model.named_parameters())
    move()
    points.look()
    result = trajectory.compute()
    points.check(result, distance=False)
    for name in names:
        assert result.path_length[name].cumulative.value == pytest.approx(points.norms(name)[0].item())
        assert result.distance[name].last.value == pytest.approx(points.distance(name))
    assert result.path_length["4.weight"].cumulative.value == pytest.approx(3 * old)
    assert result.distance["4.weight"].last.value == pytest.approx(3 * old, rel=1e-5)
    if monitor:
        assert [w.steps for w in monitor.history] == [2]
        monitor.close()


@pytest.mark.parametrize("case", ["frozen", "removed", "tied", "resized", "double"])
def test_what_rebind_keeps(case: str) -> None:
    changes: dict[str, Callable[[nn.Module], Any]] = {
        "frozen": lambda m: m[2].weight.requires_grad_(False),
        "removed": lambda m: m[2].register_parameter("weight", None),
        "tied": tie,
        "resized": lambda m: setattr(m[2], "weight", nn.Parameter(torch.zeros(3, 3))),
        "double": lambda m: m.double(),
    }
    model = square_model()
    model[0].weight = nn.Parameter(torch.ones(5, 5))
    trajectory = Trajectory(model)

    def move() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.25
        trajectory.update()

    move()
    move()
    changes[case](model)
    trajectory.rebind()
    move()
    result = trajectory.compute()
    places = result.path_length
    assert ("2.weight" in places) == (case in ("resized", "double"))
    for name in ("0.weight", "2.bias", "4.weight", *(["2.weight"] if case == "double" else [])):
        step = 0.25 * dict(model.named_parameters())[name].numel() ** 0.5
        assert places[name].sum.value == pytest.approx(step, rel=1e-6)
        assert places[name].cumulative.value == pytest.approx(3 * step, rel=1e-6)
        assert result.distance[name].last.value == pytest.approx(3 * step, rel=1e-6)
        assert result.directness[name].last.value == pytest.approx(1, rel=1e-6)
    if case == "resized":
        assert places["2.weight"].cumulative.value == pytest.approx(0.75, rel=1e-6)
        assert result.directness["2.weight"].last.value == pytest.approx(1, rel=1e-6)


def test_a_monitor_hooks_what_is_new() -> None:
    """Gradient norms, loads and updates of a layer that was added, and of a source that has to become another one."""
    model = model_of()
    optimizer = sgd(model)
    metric = Trajectory(mode="updates", stats=["update_norm", "grad_norm"])
    with Monitor(model, optimizer, [metric]) as monitor:
        train(model, DATA, optimizer)
        assert monitor.compute()["trajectory"].details["source"] == "optimizer"
        late_layer(model)
        monitor.rebind()  # no optimizer owns the new layer
        points = Points(model.named_parameters())
        hooks = counted_hooks(model)
        for _ in range(3):
            monitor.rebind()
        assert counted_hooks(model) == hooks
        optimizer.zero_grad()
        mse(model(DATA[0][0]), DATA[0][1]).backward()
        norm = model[5].weight.grad.norm().item()
        optimizer.step()
        points.look()
        result = monitor.compute()["trajectory"]
        assert result.details["source"] == "snapshot"
        points.check(result, distance=False)
        assert result.grad_norm["5.weight"].last.value == pytest.approx(norm, rel=1e-6)
    assert counted_hooks(model) == 0


# ---- copies


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_not_watched_and_carries_nothing(clone: Callable[[Any], Any]) -> None:
    model = model_of()
    plain = len(pickle.dumps(model))
    keys = list(model.state_dict())
    optimizer = sgd(model)
    settings = Trajectory(stats=["grad_norm", "path_length"])
    with Monitor(model, optimizer, [settings]) as monitor:
        train(model, DATA, optimizer)
        optimizer.zero_grad()
        before = monitor.compute().to_dict()
        twin = clone(model)
        twin.load_state_dict(shifted(twin))
        train(twin, DATA, sgd(twin))
        assert monitor.compute().to_dict() == before
        assert list(twin.state_dict()) == list(model.state_dict()) == keys
        assert len(pickle.dumps(model)) < plain + 4000  # inert hooks, no copies of weights
        assert len(pickle.dumps(model)) - plain < 4 * sum(p.numel() for p in model.parameters()) + 4000
    assert counted_hooks(model) == 0
