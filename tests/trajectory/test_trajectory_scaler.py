"""Steps under a GradScaler: the skipped ones are dropped and counted, its scale is no part of a gradient's norm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import batches, mlp, mse, seeded
from points import Points, check_gradients, counted_hooks, gradient_norms
from torch import nn

from lipcore import Monitor, Trajectory
from lipcore.alarms import Alarms

STATS = ["grad_norm", "clipped_grad_norm"]
DATA = batches(8, 4)


def model_of() -> nn.Module:
    return seeded(lambda: mlp(5, 7, 1))


def sgd(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **settings)


# ---- GradScaler


@pytest.mark.parametrize("bad", [{0}, {2}, {2, 3, 4}, {7}, {0, 3, 7}])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_steps_that_a_gradscaler_skips(every: int, fused: bool, bad: set[int]) -> None:
    model = model_of()
    # torch's fused SGD, skipped in its very first step, goes on from a momentum buffer that nobody has initialised.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    points = Points(model.named_parameters())
    made = 0
    with Monitor(model, optimizer, [Trajectory(every_steps=every)], scaler=scaler) as monitor:
        for i, (x, y) in enumerate(DATA):
            optimizer.zero_grad()
            loss = mse(model(x), y) * (math.inf if i in bad else 1.0)
            for _ in range(2):  # accumulated
                (scaler.scale(loss) / 2).backward(retain_graph=True)
            scaler.step(optimizer)
            scaler.update()
            made += i not in bad
            if i not in bad and made % every == 0:
                points.look()
            if i == 4:
                monitor.compute()  # looking changes nothing
        window = monitor.compute()
    assert window.steps == made
    assert window["trajectory"].details["skipped_steps"] == len(bad)
    assert window["trajectory"].nonfinite_steps["total"].sum.value == 0
    points.check(window)


@pytest.mark.parametrize("blocks", [1, 2])
def test_skipped_steps_are_those_of_the_window(blocks: int) -> None:
    model = model_of()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    found = []
    with Monitor(model, optimizer, [Trajectory()], scaler=scaler, window_steps=2, window_blocks=blocks) as monitor:
        for i, (x, y) in enumerate(DATA[:7]):
            optimizer.zero_grad()
            scaler.scale(mse(model(x), y) * (math.inf if i in (1, 3) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        while (window := monitor.pop_window()) is not None:
            found.append((window.last_step, window["trajectory"].details.get("skipped_steps", 0)))
    # Made are steps 0, 2, 4, 5, 6; a skipped one is known when the next backward pass begins.
    assert found == ([(2, 1), (4, 1)] if blocks == 1 else [(1, 0), (2, 1), (3, 2), (4, 1), (5, 0)])


def test_no_step_skipped_is_not_mentioned() -> None:
    model = model_of()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu")
    with Monitor(model, optimizer, [Trajectory()], scaler=scaler) as monitor:
        for x, y in DATA:
            optimizer.zero_grad()
            scaler.scale(mse(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert "skipped_steps" not in monitor.compute()["trajectory"].details
    assert counted_hooks(model) == 0


def spoiled_backward(model: Any, pair: list[Any], scaler: Any, batch: Any, spoiled: tuple[int, ...]) -> None:
    """Make a backward pass in which the gradients of these layers overflow."""
    for optimizer in pair:
        optimizer.zero_grad()
    x, y = batch
    scaler.scale(mse(model(x), y)).backward()
    for layer in spoiled:
        model[layer].weight.grad[0, 0] = math.inf


def step_both(pair: list[Any], scaler: Any, order: tuple[int, int]) -> None:
    for j in order:
        scaler.step(pair[j])
    scaler.update()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_skips_one_of_two_optimizers(fused: bool, order: tuple[int, int]) -> None:
    """What the other one did is a step."""
    model = model_of()
    pair = [torch.optim.SGD(m.parameters(), lr=0.1, fused=fused) for m in (model[0], model[2])]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    points = Points(model.named_parameters())
    with Monitor(model, pair, [Trajectory()], scaler=scaler) as monitor:
        for i, batch in enumerate(DATA):
            spoiled_backward(model, pair, scaler, batch, {2: (0,), 5: (0, 2)}.get(i, ()))
            step_both(pair, scaler, order)
            if i != 5:
                points.look()
        window = monitor.compute()
    assert window.steps == 7
    assert window["trajectory"].details["skipped_steps"] == 1
    points.check(window)
    assert window["trajectory"].unmoved_steps["0.weight"].sum.value == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("stats", [None, ["update_norm", *STATS]])
@pytest.mark.parametrize("fused", [False, True])
def test_what_a_skipped_optimizer_of_two_did_before_is_not_counted_again(
    fused: bool, stats: list[Any] | None, order: tuple[int, int]
) -> None:
    """Its own parameters stood still, and it got no gradient."""
    model = model_of()
    pair = [torch.optim.AdamW(model[0].parameters(), fused=fused), torch.optim.SGD(model[2].parameters(), lr=0.1)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    moved, gradients = [], []
    trajectory = Trajectory(stats=stats, source="optimizer")
    with Monitor(model, pair, [trajectory], scaler=scaler) as monitor:
        for i, batch in enumerate(DATA):
            before = [parameter.detach().clone() for parameter in model.parameters()]
            spoiled_backward(model, pair, scaler, batch, (2,) if i in (0, 2, 3) else ())
            gradients.append(gradient_norms(model, scaler.get_scale()))
            step_both(pair, scaler, order)
            moved.append([float((p.detach() - old).norm()) for p, old in zip(model.parameters(), before, strict=True)])
        monitor.compute()  # takes the last step in
        found = trajectory.drain()
    names = [name for name, _ in model.named_parameters()]
    columns = [found.places.index(name) for name in names]
    torch.testing.assert_close(
        found.update_norm[:, columns], torch.tensor(moved, dtype=torch.float64), rtol=1e-4, atol=0
    )
    if stats is not None:
        for i, row in enumerate(found.clipped_grad_norm[:, columns].tolist()):
            for name, norm in zip(names, row, strict=True):
                gone = name.startswith("2.") and i in (0, 2, 3)
                assert norm == pytest.approx(0.0 if gone else gradients[i][name], rel=1e-5)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_movement_of_a_skipped_optimizers_parameters_is_found(order: tuple[int, int]) -> None:
    model = model_of()
    pair = [torch.optim.Adam(module.parameters()) for module in (model[0], model[2])]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    alarms = Alarms(signals=["unexplained_movement"])
    with Monitor(model, pair, [Trajectory()], scaler=scaler, alarms=alarms):
        for i, batch in enumerate(DATA):
            spoiled_backward(model, pair, scaler, batch, (2,) if i in (2, 4) else ())
            if i == 4:
                model[2].weight.data.mul_(1.1)
            step_both(pair, scaler, order)
    assert [(event.step, event.place) for event in alarms.events] == [(5, "2.weight")]


# ---- norms of gradients


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_of_a_gradscaler_is_taken_out(fused: bool, unscale: bool) -> None:
    model = model_of()
    optimizer = sgd(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    before, after = [], []
    with Monitor(model, optimizer, [Trajectory(stats=STATS)], scaler=scaler) as monitor:
        for x, y in DATA:
            optimizer.zero_grad()
            scaler.scale(mse(model(x), y)).backward()
            before.append(gradient_norms(model, scaler.get_scale()))
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            after.append(gradient_norms(model) if unscale else before[-1])
            scaler.step(optimizer)
            scaler.update()
        result = monitor.compute()["trajectory"]
    assert scaler.get_scale() > 1024
    check_gradients(result, "grad_norm", before)
    check_gradients(result, "clipped_grad_norm", after)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("fused", [False, True])
def test_two_optimizers_under_one_scaler(fused: bool, order: tuple[int, int]) -> None:
    """The scaler takes its scale out of one optimizer's gradients after the other's step."""
    model = model_of()
    pair = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.AdamW(model[2].parameters(), fused=fused)]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    truth = []
    with Monitor(model, pair, [Trajectory(stats=STATS)], scaler=scaler) as monitor:
        for x, y in DATA:
            for optimizer in pair:
                optimizer.zero_grad()
            scaler.scale(mse(model(x), y)).backward()
            truth.append(gradient_norms(model, scaler.get_scale()))
            for i in order:
                scaler.step(pair[i])
            scaler.update()
        result = monitor.compute()["trajectory"]
    for stage in STATS:
        check_gradients(result, stage, truth)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_a_skipped_step_are_left_out(fused: bool) -> None:
    model = model_of()
    optimizer = sgd(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    truth = []
    with Monitor(model, optimizer, [Trajectory(stats=STATS)], scaler=scaler) as monitor:
        for i, (x, y) in enumerate(DATA):
            optimizer.zero_grad()
            scaler.scale(mse(model(x), y) * (math.inf if i == 2 else 1)).backward()
            if i != 2:
                truth.append(gradient_norms(model, scaler.get_scale()))
            scaler.step(optimizer)
            scaler.update()
        result = monitor.compute()["trajectory"]
    assert result.details["skipped_steps"] == 1
    for stage in STATS:
        check_gradients(result, stage, truth)
