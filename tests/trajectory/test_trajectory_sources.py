"""Trajectory without copies: updates from the optimizer, from a snapshot, or given; equal to the exact difference."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batches, mlp, mse, seeded, train
from points import Points
from torch import Tensor, nn

from lipcore import Monitor, Trajectory

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}
DATA = batches(9, 4)


def model_and(optimizer: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = seeded(lambda: mlp(5, 7, 1))
    return model, OPTIMIZERS[optimizer](model.parameters())


def updates_only(monitor: Monitor) -> Any:
    result = monitor.compute()["trajectory"]
    assert not {"distance", "directness", "variance"} & set(result)
    return result


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("source", ["auto", "optimizer", "snapshot"])
def test_a_monitors_updates_are_the_difference(source: str, optimizer: str) -> None:
    model, step = model_and(optimizer)
    if (optimizer, source) == ("rmsprop", "optimizer"):
        with pytest.raises(ValueError, match="RMSprop has no closed form.*use snapshots or pass the updates"):
            Monitor(model, step, [Trajectory(mode="updates", source=source)])
        return
    chosen = source if source != "auto" else "snapshot" if optimizer == "rmsprop" else "optimizer"
    points = Points(model.named_parameters())
    with Monitor(model, step, [Trajectory(mode="updates", source=source)]) as monitor:
        step.register_step_post_hook(lambda *_: points.look())
        train(model, DATA, step)
        result = updates_only(monitor)
        assert result.details["source"] == chosen
        assert f"no state per parameter, updates{' from the' if chosen == 'optimizer' else ':'} {chosen}" in str(
            monitor.plan()
        )
    points.check(result, distance=False)


@pytest.mark.parametrize("source", ["optimizer", "snapshot", "explicit"])
def test_it_can_stand_alone(source: str) -> None:
    model, step = model_and("adam")
    points = Points(model.named_parameters())
    trajectory = Trajectory(model, source=source, optimizer=step if source == "optimizer" else None)
    for x, y in DATA:
        step.zero_grad()
        mse(model(x), y).backward()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        trajectory.before_step()
        step.step()
        points.look()
        moved = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        trajectory.update(moved) if source == "explicit" else trajectory.update()
    result = trajectory.compute()
    assert result.details["source"] == source
    points.check(result, distance=False)


def test_a_parameter_that_did_not_move_may_be_given_as_none() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    trajectory = Trajectory(model, source="explicit")
    moved: dict[str, Tensor | None] = dict.fromkeys(n for n, _ in model.named_parameters())
    trajectory.update(moved | {"0.weight": torch.full((7, 5), 2.0)})  # type: ignore[arg-type]
    result = trajectory.compute()
    assert result.path_length["total"].sum.value == pytest.approx(2 * 35**0.5)
    assert result.unmoved_steps["2.bias"].sum.value == 1


# ---- refusals


REFUSED: dict[str, tuple[Callable[[nn.Module, Any], Any], str]] = {
    "no_optimizer": (
        lambda model, _: Trajectory(model, mode="updates", source="optimizer"),
        "optimizer: source 'optimizer' needs the torch.optim.SGD",
    ),
    "stranger": (
        lambda model, _: Trajectory(
            model, source="optimizer", optimizer=torch.optim.SGD(model[0].parameters(), lr=0.1)
        ),
        "2 of 4 parameters are in none of them .'2.weight', '2.bias'",
    ),
    "explicit_without": (lambda model, _: Trajectory(model, source="explicit").update(), "updates: expected a dict"),
    "given_without_explicit": (lambda model, _: Trajectory(model).update({}), "updates: only for source=explicit"),
    "missing_name": (lambda model, _: Trajectory(model, source="explicit").update({}), "updates: lacks '0.bias'"),
    "exact_with_optimizer": (
        lambda model, step: Trajectory(model, mode="exact", source="optimizer", optimizer=step),
        "source: mode 'exact' keeps the copies",
    ),
    "updates_with_difference": (
        lambda model, _: Trajectory(model, mode="updates", source="difference"),
        "source: mode 'updates' keeps no copies",
    ),
    "unknown": (lambda model, _: Trajectory(model, source="magic"), "source: expected 'auto', .*got 'magic'"),
    "element_variance": (
        lambda model, _: Trajectory(model, mode="updates", stats=["element_variance"]),
        "stats: 'element_variance' is not known in mode 'updates'",
    ),
    "distance": (
        lambda model, _: Trajectory(model, mode="updates", stats=["distance"]),
        "stats: 'distance' is not known in mode 'updates'",
    ),
    "reference": (
        lambda model, _: Trajectory(model, mode="updates").set_reference(),
        "reference: mode 'updates' keeps no reference",
    ),
    "normalized_of_snapshots": (
        lambda model, _: Trajectory(model, mode="updates", stats=["normalized_update_rms"]),
        "stats: 'normalized_update_rms' is not known in mode 'updates' with source 'snapshot'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    call, words = REFUSED[case]
    model, step = model_and("adam")
    with pytest.raises(ValueError, match=words):
        call(model, step)


def test_an_explicit_trajectory_cannot_be_driven_by_a_monitor() -> None:
    """Nobody gives the updates there: it says so rather than counting nothing."""
    model, step = model_and("adam")
    monitor = Monitor(model, step, [Trajectory(source="explicit")])
    with pytest.warns(RuntimeWarning, match="updates: "):
        train(model, DATA[:1], step)
    with pytest.raises((TypeError, ValueError), match="updates: "):
        monitor.compute()
    monitor.close()


def test_a_parameter_replaced_under_the_optimizer_is_named() -> None:
    model, step = model_and("adam")
    monitor = Monitor(model, step, [Trajectory(mode="updates", source="optimizer")])
    train(model, DATA[:2], step)
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    with pytest.warns(RuntimeWarning, match=r"'2\.weight' of the model is not the optimizer's any more"):
        train(model, DATA[:1], step)
    with pytest.raises(ValueError, match=r"2\.weight"):
        monitor.compute()
    monitor.close()


# ---- what it costs


def reachable_elements(root: object) -> int:
    """Elements of float tensors that can be reached without passing through the model or an optimizer."""
    seen: set[int] = set()
    stack, count = [root], 0
    while stack:
        one = stack.pop()
        if id(one) in seen or isinstance(one, nn.Module | torch.optim.Optimizer | nn.Parameter | type):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            count += one.numel()
        elif isinstance(one, dict | list | tuple) or type(one).__module__.startswith(("lipcore", "collections")):
            stack += gc.get_referents(one)
    return count


@pytest.mark.parametrize("source", ["optimizer", "snapshot"])
def test_nothing_is_kept_per_element(source: str) -> None:
    elements = []
    for width in (3, 300):
        model = seeded(lambda: nn.Sequential(nn.Linear(5, width), nn.Linear(width, 1)))
        step = OPTIMIZERS["adam"](model.parameters())
        trajectory = Trajectory(mode="updates", source=source)
        with Monitor(model, step, [trajectory]):
            train(model, DATA, step)
            elements.append(reachable_elements(trajectory))
            assert (
                reachable_elements(trajectory._built.trackers)
                >= trajectory._built.trackers["updates"].table.rows.numel()
            )
            sizes = {line.what: line.bytes for line in trajectory.plan()}
        assert sizes["nothing per parameter"] == 0
    assert elements[0] == elements[1]


# ---- the numbers that only an optimizer has


def test_numbers_of_the_optimizer() -> None:
    model, step = model_and("adamw")
    truth: dict[str, list[float]] = {
        name: [] for name in ("normalized_update_rms", "rms_t", "momentum_norm", "second_moment_norm")
    }

    def look(*_: Any) -> None:
        weight, state = model[0].weight, step.state[model[0].weight]
        count, (beta1, beta2) = int(state["step"]), step.param_groups[0]["betas"]
        first = state["exp_avg"].double() / (1 - beta1**count)
        second = state["exp_avg_sq"].double() / (1 - beta2**count)
        truth["normalized_update_rms"].append(float((first / (second.sqrt() + 1e-8)).square().mean().sqrt()))
        assert weight.grad is not None
        truth["rms_t"].append(float((weight.grad.double().square() / second.clamp(min=1e-16)).mean().sqrt()))
        truth["momentum_norm"].append(float(state["exp_avg"].norm()))
        truth["second_moment_norm"].append(float(state["exp_avg_sq"].norm()))

    with Monitor(model, step, [Trajectory(source="optimizer", stats=list(truth))], window_steps=6) as monitor:
        step.register_step_post_hook(look)
        train(model, DATA, step)
        windows = [*monitor.history, monitor.compute()]
    for name, steps in truth.items():
        for window, part in zip(windows, (steps[:6], steps[6:]), strict=True):
            found = window["trajectory"][name]["0.weight"]
            assert found.last.value == pytest.approx(part[-1], rel=2e-5)
            assert found.mean.value == pytest.approx(sum(part) / len(part), rel=2e-5)
            assert found.max.value == pytest.approx(max(part), rel=2e-5)


def test_gradients_are_read_for_rms_t_alone() -> None:
    """By default it is not there; SGD has none; momentum has a norm."""
    model, step = model_and("adamw")
    found = Trajectory(model, source="optimizer", optimizer=step).compute()
    assert "rms_t" not in found
    assert "momentum_norm" in found
    model, step = model_and("sgd")
    trajectory = Trajectory(model, source="optimizer", optimizer=step, stats=["rms_t", "momentum_norm"])
    mse(model(DATA[0][0]), DATA[0][1]).backward()
    step.step()
    trajectory.update()
    last = trajectory.compute().rms_t["0.weight"].last
    assert (last.valid, last.note) == (False, "SGD has no second moment")
    with pytest.raises(ValueError, match="stats: 'rms_t' is not known in mode 'exact'"):
        Trajectory(model, stats=["rms_t"])


def test_a_number_that_an_optimizer_does_not_have_says_why() -> None:
    """The other optimizer's parameters have it, without a note."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(1, 1))
    optimizers = [torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.AdamW(model[1:].parameters(), 0.1)]
    names: Any = ["normalized_update_rms", "rms_t", "momentum_norm", "second_moment_norm"]
    with Monitor(model, optimizers, [Trajectory(source="optimizer", stats=names)]) as monitor:
        model[:2](torch.ones(3, 2)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        found = monitor.compute()["trajectory"]
    for name in names:
        why = "SGD without momentum keeps no past gradients" if name == "momentum_norm" else "SGD has no second moment"
        assert (found[name]["0.weight"].mean.note, found[name]["0.weight"].mean.valid) == (why, False)
        assert (found[name]["1.weight"].mean.note, found[name]["1.weight"].mean.valid) == ("", True)
        assert found[name]["2.weight"].max.note == "no step of its optimizer in this window"


@pytest.mark.parametrize("source", ["optimizer", "snapshot"])
def test_single_steps_out_of_many_make_no_path(source: str) -> None:
    model, step = model_and("adam")
    points = Points(model.named_parameters())
    with Monitor(model, step, [Trajectory(mode="updates", source=source, every_steps=3)]) as monitor:
        step.register_step_post_hook(lambda *_: points.look())
        train(model, DATA, step)
        result = monitor.compute()["trajectory"]
    assert "path_length" not in result
    assert "chord_length" not in result
    points.steps = points.steps[2::3]
    points.check(result, distance=False)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("source", ["optimizer", "snapshot"])
def test_several_optimizers_that_clear_their_gradients_at_once(source: str, order: tuple[int, int]) -> None:
    """SGD without momentum knows its step from the gradient alone, which is gone when the other has stepped."""
    model = seeded(lambda: mlp(5, 7, 1))
    pair = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.AdamW(model[2].parameters(), lr=0.01)]
    points = Points(model.named_parameters())
    with Monitor(model, pair, [Trajectory(mode="updates", source=source)]) as monitor:
        for x, y in DATA:
            mse(model(x), y).backward()
            for i in order:
                pair[i].step()
                pair[i].zero_grad()
            points.look()
        points.check(monitor.compute(), distance=False)


def test_loading_weights_is_no_update() -> None:
    model, step = model_and("adam")
    points = Points(model.named_parameters())
    with Monitor(model, step, [Trajectory(source="optimizer")]) as monitor:
        step.register_step_post_hook(lambda *_: points.look())
        for _ in range(2):
            train(model, DATA[:3], step)
            model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
            points.jump()
        result = monitor.compute()["trajectory"]
    points.check(result, distance=False)
    assert result.details["rebased"] == 2
