"""Layers that do not move in some steps: an expert without samples, updates below the resolution of a dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import lipcore
from lipcore.alarms import Alarms


def moved(steps: int, moves: Callable[[int], float]) -> Alarms:
    """Move two layers at random in each step, the second one so many times as far as the first one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 1, bias=False), nn.Linear(1, 30, bias=False))
    alarms = Alarms(signals=["update_norm"])
    with lipcore.Monitor(model, metrics=[lipcore.Trajectory()], alarms=alarms) as monitor, torch.no_grad():
        for step in range(1, steps + 1):
            model[0].weight += 0.01 * torch.randn(1, 30)
            if times := moves(step):
                model[1].weight += 0.01 * times * torch.randn(30, 1)
            monitor.step()
    return alarms


@pytest.mark.parametrize("seldom", [3, 40])
def test_one_that_often_does_not_move_alarms_nobody_and_leaves_the_limits_as_they_are(seldom: int) -> None:
    alarms = moved(500, lambda step: bool(step % seldom))
    assert not alarms.events
    assert alarms.multiplier < 1.5


def test_beside_it_a_fault_of_its_own_is_told() -> None:
    alarms = moved(450, lambda step: 30 if step == 440 else bool(step % 3))
    assert [(event.step, event.place) for event in alarms.events] == [(440, "1")]


def test_one_that_has_always_moved_is_told_once() -> None:
    alarms = moved(400, lambda step: not 300 <= step < 340)
    assert [(event.step, event.place) for event in alarms.events] == [(300, "1")]
    assert alarms.events[0].score < -6
    assert "at 1: update norm over learning rate is 0 (score" in alarms.events[0].message


def test_one_that_begins_to_move_is_compared_with_its_own_steps() -> None:
    alarms = moved(450, lambda step: 30 if step == 440 else step > 300)
    assert [(event.step, event.place) for event in alarms.events] == [(440, "1")]


def test_a_thousand_steps_later_it_is_news_again() -> None:
    alarms = moved(1350, lambda step: step not in (1, 200, 300, 1305))
    assert [event.step for event in alarms.events] == [200, 1305]
