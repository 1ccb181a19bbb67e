"""Runs at equal training loss: closed forms, runs of different speed, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lipcore
from lipcore import theory
from lipcore.metric.results import MetricResult
from lipcore.theory.falling import first_at, smoothed


def descent(rate: float, steps: int, folder: Path | None = None, **options: Any) -> lipcore.Monitor:
    """Gradient descent on (w - 3)^2 from w = 0, whose loss falls at every step."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    options = {"window_steps": 1, "metrics": [lipcore.Trajectory()]} | options
    begin = lipcore.Monitor if folder is None else lipcore.watch
    more = {} if folder is None else {"run": folder}
    with begin(model, optimizer, **options, **more) as monitor:
        for _ in range(steps):
            loss = (model(torch.ones(1, 1).double()) - 3).square().mean()
            monitor.log(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return monitor


def test_the_numbers_are_those_of_the_closed_form() -> None:
    """After t steps the loss is 9 (1 - 2 a)^(2 t); it is logged before the step that a window closes with."""
    found = theory.at_loss(descent(0.01, 60).history, 2.0)
    exact = 1 + math.log(2.0 / 9) / (2 * math.log(1 - 0.02))
    assert found.step.value == pytest.approx(exact, abs=0.01)
    assert found.before is not None
    assert found.window is not None
    assert (found.before.last_step, found.window.last_step) == (math.floor(exact), math.ceil(exact))
    distance = found.number("trajectory/distance.last")
    assert distance.value == pytest.approx(3 - math.sqrt(2) * 0.98, rel=1e-3)
    assert (distance.label, distance.valid) == ("estimate", True)
    assert found.number("logged/loss.mean").value == pytest.approx(2.0, rel=1e-12)
    assert found.number("trajectory/update_norm.last", "weight").valid


def test_runs_of_different_speed_agree_at_equal_loss() -> None:
    fast, slow = (theory.at_loss(descent(rate, steps).history, 1.0) for rate, steps in ((0.01, 60), (0.005, 120)))
    assert slow.step.value == pytest.approx(2 * fast.step.value, rel=0.03)
    ways = [each.number("trajectory/path_length.cumulative").value for each in (fast, slow)]
    assert ways[0] == pytest.approx(ways[1], rel=0.01)
    ends = [each["trajectory"].path_length["total"]["sum"].value for each in (fast.window, slow.window) if each]
    assert ends[0] > 1.5 * ends[1]  # what is of a step is not what is of the way


def test_a_loss_that_is_not_reached_and_one_that_was_there_at_once() -> None:
    history = descent(0.01, 20).history
    found = theory.at_loss(history, 0.5)
    assert not found.step.valid
    assert found.window is None
    number = found.number("trajectory/distance.last")
    assert math.isnan(number.value)
    assert "the loss did not come down to 0.5: its lowest is 4." in number.note
    first = theory.at_loss(history, 100.0)
    assert (first.step.value, first.step.valid, first.before) == (1.0, False, None)
    number = first.number("trajectory/distance.last")
    assert not number.valid
    assert "the loss was below 100 in the window of steps 1 to 1 already" in number.note
    at_once = theory.at_loss(history, 9.0)
    assert (at_once.step.value, at_once.step.valid) == (1.0, True)
    assert "as low in the window of steps 1 to 1 already" in at_once.number("trajectory/distance.last").note
    assert "not valid: the loss did not come down" in repr(found)


def test_a_record_gives_the_same(tmp_path: Path) -> None:
    monitor = descent(0.01, 60, tmp_path / "run", window_steps=5)
    with lipcore.open_run(tmp_path / "run") as run:
        again = theory.at_loss(run.windows, 3.0)
    found = theory.at_loss(monitor.history, 3.0)
    assert again.step == found.step
    name = "trajectory/distance.last"
    assert again.number(name).value == pytest.approx(found.number(name).value, rel=1e-6)


def test_the_reason_of_a_windows_own_number_is_kept() -> None:
    history = descent(0.01, 3).history
    own = replace(history[0]["trajectory"].distance["total"]["last"], valid=False, note="its own reason")
    window = replace(history[0], results={**history[0].results, "trajectory": MetricResult("trajectory")})
    window.results["trajectory"].add("distance", "total", "total", last=own)
    for level, also in ((9.0, "as low"), (20.0, "below 20")):
        found = replace(theory.at_loss(history, level), window=window).number("trajectory/distance.last")
        assert not found.valid
        assert found.note.startswith("its own reason; the loss was")
        assert also in found.note


def test_many_windows_are_smoothed_and_windows_without_a_finite_loss_passed_over() -> None:
    noisy = np.random.default_rng(0).random(1000)
    means = smoothed(noisy)
    assert means[500] == pytest.approx(noisy[491:501].mean())
    assert np.array_equal(smoothed(noisy[:150]), noisy[:150])
    assert first_at(np.array([3.0, 1.0, 2.0]), 2.0) == 1
    assert first_at(np.array([3.0]), 2.0) is None
    model = nn.Linear(1, 1)
    with lipcore.Monitor(model, metrics=[lipcore.Trajectory()], window_steps=1) as monitor:
        for loss in (3.0, float("nan"), 1.0):
            monitor.log(loss=loss)
            monitor.step()
    found = theory.at_loss(monitor.history, 2.0)
    assert (found.step.value, found.share) == (2.0, 0.5)


def test_what_is_refused() -> None:
    history = descent(0.01, 20).history
    model = nn.Linear(1, 1)
    with lipcore.Monitor(model, metrics=[lipcore.Trajectory()], window_steps=1) as monitor:
        monitor.step()
    with pytest.raises(ValueError, match=r"history: no window has a training loss; call monitor\.log"):
        theory.at_loss(monitor.history, 1.0)
    with pytest.raises(TypeError, match="history: expected windows of a Monitor"):
        theory.at_loss(3, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="level: expected a positive number, got 0"):
        theory.at_loss(history, 0)
    found = theory.at_loss(history, 5.0)
    for name, message in (
        ("distance", 'name: expected "metric/quantity.reducer"'),
        ("x/distance.last", "name: there is no metric 'x'"),
        ("trajectory/x.last", "history: trajectory has no x"),
        ("trajectory/distance.x", "name: distance has no 'x'; expected one of last"),
    ):
        with pytest.raises(ValueError, match=message):
            found.number(name)
    with pytest.raises(ValueError, match="place: distance has no place 'x'"):
        found.number("trajectory/distance.last", "x")
