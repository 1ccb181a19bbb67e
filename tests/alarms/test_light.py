"""The warning light: when it is on, and that it is no alarm."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from torch import nn

import lipcore
from lipcore.alarms import Alarms
from lipcore.alarms.light import WarningLight

AT = 130


def test_it_is_that_of_the_specification() -> None:
    rng, light = np.random.default_rng(0), WarningLight()
    numbers = np.exp(0.1 * rng.standard_normal(400))
    numbers[[150, 260, 265]] = 2.0, 1.8, 1.9
    numbers[300] = math.nan
    logs, over, told = np.log(numbers), [], []
    for step, number in enumerate(numbers):
        before = [log for log in logs[:step] if not math.isnan(log)][-100:]
        if len(before) == 100:
            middle = median(before)
            spread = 1.4826 * median(abs(log - middle) for log in before) + 0.01
            over += [step] * bool((logs[step] - middle) / spread > 3)
        was = light.is_on
        words = light.step(step, float(number))
        assert light.is_on == any(step - 10 <= one <= step for one in over)
        assert bool(words) == (light.is_on and not was)
        told += [step] * bool(words)
    assert {150, 260} <= set(told)
    assert 265 not in told  # it was on
    assert light.since == told[-1]


def train(steps: int, alarms: Alarms | None, source: str, run: Path | None = None) -> lipcore.Monitor:
    """Train with Adam; from a step on, gradients are of one sign, so that moments no longer cancel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    trajectory = lipcore.Trajectory(source=source)  # type: ignore[arg-type]
    with lipcore.watch(model, optimizer, metrics=[trajectory], alarms=alarms, run=run) as monitor:
        for step in range(1, steps + 1):
            loss = (model(torch.randn(8, 6)) * torch.randn(8, 1)).mean()
            if step >= AT:
                loss = loss + 10 * model(torch.ones(1, 6)).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return monitor


def test_it_goes_on_and_is_no_alarm(tmp_path: Path) -> None:
    alarms = Alarms(signals=["loss"])
    monitor = train(AT + 3, alarms, "optimizer", tmp_path / "a")
    light = alarms.light
    assert light.is_known
    assert light.is_on
    assert AT <= light.since <= AT + 3
    assert alarms.events == []
    assert f"on since step {light.since}" in repr(alarms)
    assert f"warning light on since step {light.since}" in repr(monitor)
    run = lipcore.open_run(tmp_path / "a")
    events = [event for event in run.events if event.step == light.since]
    assert [event.kind for event in events] == ["warning light"]
    pytest.importorskip("bokeh")
    page = run.report().save(tmp_path / "page.html").read_text()
    assert "Warning light, no alarm: on once" in page
    assert "No alarm in" in page


def test_the_number_is_that_of_all_parameters_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    heard = []
    trajectory = lipcore.Trajectory(source="optimizer", on_step=lambda first, arrays: heard.append(arrays))
    expected = []
    with lipcore.Monitor(model, optimizer, [trajectory], alarms="default"):
        for step in range(1, 6):
            model(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()
            directions = []
            for p in model.parameters():
                state = optimizer.state[p]
                first, second = state["exp_avg"].double(), state["exp_avg_sq"].double()
                root = (second / (1 - 0.999**step)).sqrt() + 1e-8
                directions.append((first / (1 - 0.9**step) / root).flatten())
            expected.append(float(torch.cat(directions).square().mean().sqrt()))
            optimizer.zero_grad()
    column = heard[0].places.index("total")
    assert heard[0]["normalized_update_rms"][:, column].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("source", ["auto", "snapshot"])
def test_without_the_state_it_is_not_known(source: str) -> None:
    alarms = Alarms(signals=["update_norm"])
    train(3, alarms, source)
    assert not alarms.light.is_known
    assert "warning light" not in repr(alarms)


def test_behind_a_checkpoint_it_was_on_in_the_steps_before_it_alone() -> None:
    light = WarningLight()
    numbers = np.exp(0.1 * np.random.default_rng(0).random(300))
    numbers[[150, 250]] = 2.0
    for step, number in enumerate(numbers):
        light.step(step, float(number))
    assert (light.since, light.steps) == (250, 22)
    light.forget(252)
    assert (light.since, light.steps, light.is_on) == (250, 14, False)
    light.forget(200)
    assert (light.since, light.steps) == (150, 11)
    light.forget(20)
    assert (light.since, light.steps) == (None, 0)
