"""Ranks that meet in a store: all go on or none does, and whoever is missing is named. Threads stand for ranks here."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from lipcore.distributed import partners
from lipcore.distributed.group import Group
from lipcore.distributed.meeting import Meeting

NAME = "lipcore/test"


class Timed(Meeting):
    """With one timeout for all meetings."""

    def __init__(self, store: Any, name: str, place: int, ranks: list[int], timeout: float) -> None:
        super().__init__(store, name, place, ranks)
        self.timeout = timeout

    def at(self, step: int, **header: Any) -> Any:
        return self.meet(f"the call at {step}", step, header, self.timeout)


def together(*ranks: Callable[[Timed], Any], timeout: float = 5.0, store: Any = None) -> list[Any]:
    """What each rank returned, or the error that it raised."""
    store = dist.HashStore() if store is None else store
    found: list[Any] = [None] * len(ranks)

    def run(i: int) -> None:
        try:
            found[i] = ranks[i](Timed(store, NAME, i, [10 + j for j in range(len(ranks))], timeout))
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return found


def call(when: int, **header: Any) -> Callable[[Timed], Any]:
    return lambda meeting: meeting.at(when, **header)


def test_all_ranks_get_all_headers() -> None:
    assert together(*[call(1, a=3)] * 4) == [[{"a": 3}] * 4] * 4
    found = together(*(call(1, a=i) for i in range(3)))
    assert found == [[{"a": 0}, {"a": 1}, {"a": 2}]] * 3


def test_many_meetings_leave_few_keys() -> None:
    store = dist.HashStore()

    def rank(meeting: Timed) -> int:
        for i in range(20):
            meeting.at(i, i=i)
        return i

    assert together(rank, rank, rank, store=store) == [19] * 3
    assert store.num_keys() <= 3 * 3 + 6


def test_a_rank_that_looks_around_while_the_others_go_on_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has seen that one was missing, which comes and goes on before it reads where that one is."""
    look = Meeting._missing

    def slow(meeting: Meeting, key: str) -> list[int]:
        missing = look(meeting, key)
        if missing and meeting._place == 1:
            time.sleep(0.05)
        return missing

    monkeypatch.setattr(Meeting, "_missing", slow)

    def rank(meeting: Timed) -> int:
        for i in range(12):
            if meeting._place == 0:
                time.sleep(0.02)
            meeting.at(i, i=i)
        return i

    assert together(rank, rank) == [11] * 2


def test_who_does_not_come_is_named() -> None:
    found = together(call(7), lambda meeting: None, call(7), timeout=1.0)
    assert found[1] is None
    for number, error in ((10, found[0]), (12, found[2])):
        assert isinstance(error, RuntimeError)
        other = 22 - number
        assert re.match(
            rf"lipcore: the call at 7: rank {number} has waited [\d.]+ s for rank 11 \(rank 11 never called it\)"
            rf"( and|, and rank {other}) gave up( after 1 s)?. No collective",
            str(error),
        ), error


@pytest.mark.parametrize("again", [1, 2])
def test_a_rank_that_comes_late_is_told_and_the_next_meeting_is_held(again: int) -> None:
    """For the same step, at the second attempt, or for a later one."""
    both = threading.Barrier(2)

    def rank(meeting: Timed, pause: float) -> Any:
        time.sleep(pause)
        late = "rank 11 has come too late: rank 10 had waited 0.2 s for rank 11, and given up. No"
        early = r"rank 10 has waited 0.2 s for rank 11 \(rank 11 never called it\) and gave up. No"
        with pytest.raises(RuntimeError, match=f"lipcore: the call at 1: {late if pause else early}"):
            meeting.at(1)
        both.wait()
        meeting.timeout = 10.0
        return meeting.at(again)

    assert together(lambda m: rank(m, 0), lambda m: rank(m, 0.6), timeout=0.2) == [[{}, {}]] * 2


def test_ranks_at_different_places_are_told_at_once() -> None:
    start = time.monotonic()
    found = together(call(200), call(190), call(200), timeout=60)
    assert time.monotonic() - start < 10
    for error in found:
        assert isinstance(error, RuntimeError)
        assert "ranks are at different places" in str(error)
        assert "the call at 200" in str(error)
        assert "the call at 190" in str(error)


def test_a_rank_that_is_late_with_something_else_is_told_what_was_waited_for() -> None:
    def late(meeting: Timed) -> Any:
        time.sleep(0.5)
        return meeting.meet("another call at 1", 1, {}, 5)

    found = together(call(1), late, timeout=0.2)
    assert "another call at 1: rank 11 has come too late: rank 10 had waited 0.2 s at the call at 1 for" in str(
        found[1]
    )


def test_a_decision_is_made_once() -> None:
    """The last rank comes just when the first one gives up: both go on, or neither does."""
    outcomes = set()
    for i in range(60):

        def late(meeting: Timed, pause: float = 0.02 + 0.0005 * (i % 20)) -> Any:
            time.sleep(pause)
            return meeting.at(1)

        found = together(call(1), late, timeout=0.025)
        kinds = {type(each) for each in found}
        assert len(kinds) == 1, found
        outcomes |= kinds
    assert RuntimeError in outcomes


def test_a_rank_that_has_nothing_to_meet_for_is_told_at_once() -> None:
    def passing(meeting: Timed) -> None:
        meeting.pass_by("a call without windows", 6)
        meeting.pass_by("a call without windows", 7)

    start = time.monotonic()
    found = together(call(7), passing, timeout=60)
    assert time.monotonic() - start < 10
    assert "rank 10 is at step 7, the call at 7; rank 11 is at step 7, a call without windows" in str(found[0])
    assert "for rank 11 and gave up" in str(together(call(8), passing, timeout=0.4)[0])  # it may come yet


def test_what_another_monitor_had_last_to_say() -> None:
    """Its training is over on a rank that comes later to that of the next one."""
    both = threading.Barrier(2)

    def rank(meeting: Timed, pause: float) -> Any:
        first, second = threading.Event(), threading.Event()
        meeting.pass_by("a call without windows", 6, meeting.number_of(first))
        both.wait()
        time.sleep(pause)
        return meeting.meet("the call at 4", 4, {}, 10, meeting.number_of(second))

    assert together(lambda m: rank(m, 0), lambda m: rank(m, 0.4)) == [[{}, {}]] * 2


def test_a_store_that_was_used_before() -> None:
    store = dist.HashStore()
    assert together(call(1, a=1), call(1, a=1), store=store) == [[{"a": 1}] * 2] * 2
    assert together(call(1, a=2), call(1, a=2), store=store) == [[{"a": 2}] * 2] * 2
    assert "rank 11 never called it" in str(together(call(1), lambda meeting: None, store=store, timeout=0.3)[0])


def test_a_rank_that_passed_by_in_an_earlier_call_of_this_step_is_waited_for() -> None:
    def quick(meeting: Timed) -> Any:
        meeting.pass_by("a call", 3)
        return meeting.at(3)

    def slow(meeting: Timed) -> Any:
        meeting.pass_by("a call", 3)
        time.sleep(0.8)  # the other one looks around meanwhile
        return meeting.at(3)

    assert together(quick, slow) == [[{}] * 2] * 2


def test_a_rank_that_passed_by_once_more_is_named() -> None:
    def slow(meeting: Timed) -> None:
        meeting.pass_by("a call", 3)

    (error, none) = together(call(3), slow)
    assert none is None
    assert "ranks are at different places: rank 10 is at step 3, the call at 3; rank 11 is at step 3, a c" in str(error)


def test_a_rank_that_goes_back_has_not_passed_by_later_steps() -> None:
    def slow(meeting: Timed) -> Any:
        meeting.pass_by("a call", 8)
        meeting.go_back()
        time.sleep(0.8)
        return meeting.at(4)

    assert together(call(4), slow) == [[{}] * 2] * 2


def test_a_store_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        number_of = staticmethod(lambda caller: 0)

        def meet(self, *arguments: Any) -> None:
            raise dist.DistNetworkError("Broken pipe\nand a stack")

        pass_by = meet

    monkeypatch.setattr(partners, "_meeting", lambda group: Gone())
    one, group = partners.Partners("auto", 5.0), Group(None, (0, 1), 0)
    one.pass_by(group, "a call", 3)  # who waits is told of it by the store
    with pytest.raises(
        RuntimeError, match=r"lipcore: a call: the process group's store does not answer .*: Broken pipe"
    ):
        one.meet(group, "a call", 3, {})
