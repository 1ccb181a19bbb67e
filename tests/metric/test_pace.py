"""When single steps are handed on."""

from __future__ import annotations

import pytest

from lipcore.metric import pace
from lipcore.metric.pace import Pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def test_in_blocks() -> None:
    rule = Pace(3)
    assert [rule.is_due(waiting) for waiting in (0, 1, 2, 3, 1, 4)] == [False, False, False, True, False, True]


def test_what_takes_its_time_is_handed_on_at_once_and_short_steps_in_blocks(clock: list[float]) -> None:
    rule = Pace(4, 0.01)
    found = []
    for milliseconds, waiting in ((20, 1), (11, 1), (4, 1), (4, 2), (4, 3), (1, 1), (1, 2), (1, 3), (1, 4), (9, 1)):
        clock[0] += milliseconds / 1000
        found.append(rule.is_due(waiting))
    assert found == [True, True, False, False, True, False, False, False, True, False]


def test_nothing_waits(clock: list[float]) -> None:
    rule = Pace(4, 0.01)
    clock[0] += 1
    assert not rule.is_due(0)
    assert rule.is_due(1)
