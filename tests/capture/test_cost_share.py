"""How often a pass may be made dearer: by its measured share of the time, or by its number where there are ranks."""

from __future__ import annotations

import itertools

import pytest

from lipcore.capture.taps import cost_share
from lipcore.capture.taps.cost_share import CostShare


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cost_share, "time", clock)
    return clock


def done_in(clock: Clock, passes: int, dear: float, share: float = 0.01) -> list[int]:
    """The numbers of the passes in which it is done, where a plain one takes a second."""
    schedule, done = CostShare(share), []
    for number in range(passes):
        schedule.begin(number)
        if schedule.is_due:
            schedule.done()
            done.append(number)
        clock.now += dear if done and done[-1] == number else 1.0
    return done


@pytest.mark.parametrize(("dear", "interval"), [(1.0, 1), (1.009, 1), (1.2, 32), (2.26, 128), (3.5, 256)])
def test_its_share_of_the_time_is_kept(clock: Clock, dear: float, interval: int) -> None:
    done = done_in(clock, 4000, dear)
    later = [number for number in done if number >= 8]
    assert {b - a for a, b in itertools.pairwise(later)} == {interval}
    assert len(done) * (dear - 1) <= 0.011 * 4000


def test_passes_that_are_left_out_say_nothing(clock: Clock) -> None:
    schedule = CostShare(0.01)
    for number in (0, 1, 50, 51, 52):
        schedule.begin(number)
        clock.now += 1.0
    assert sum(len(times) for times in schedule._times.values()) == 2


def test_ranks_go_by_the_number_of_the_pass(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_share, "world_size", lambda: 2)
    assert done_in(clock, 600, 5.0) == [0, 256, 512]
