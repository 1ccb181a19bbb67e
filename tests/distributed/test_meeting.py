"""Ranks that meet in a store: all go on or none does, and whoever is missing is named. Threads stand for ranks here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from lipcore.distributed.meeting import Meeting, numbered

NAME = "lipcore/test"


def together(*ranks: Callable[[Meeting], Any], timeout: float = 5.0, store: Any = None) -> list[Any]:
    """What each rank returned, or the error that it raised."""
    store = dist.HashStore() if store is None else store
    found: list[Any] = [None] * len(ranks)

    def run(i: int) -> None:
        try:
            found[i] = ranks[i](Meeting(store, NAME, i, [10 + j for j in range(len(ranks))], timeout))
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return found


def call(when: str, **header: Any) -> Callable[[Meeting], Any]:
    return lambda meeting: meeting.meet(f"the call at {when}", when, header)


def test_all_ranks_get_all_headers() -> None:
    assert together(*[call("1", step=3)] * 4) == [[{"step": 3}] * 4] * 4
    found = together(*(call("1", step=i) for i in range(3)))
    assert found == [[{"step": 0}, {"step": 1}, {"step": 2}]] * 3


def test_many_meetings_leave_few_keys() -> None:
    store = dist.HashStore()

    def rank(meeting: Meeting) -> int:
        for i in range(20):
            meeting.meet("it", str(i), {"i": i})
        return i

    assert together(rank, rank, rank, store=store) == [19] * 3
    assert store.num_keys() <= 3 * 3 + 6


def test_who_does_not_come_is_named() -> None:
    found = together(call("7"), lambda meeting: None, call("7"), timeout=0.3)
    assert found[1] is None
    for error in (found[0], found[2]):
        assert isinstance(error, RuntimeError)
        assert str(error).startswith("lipcore: the call at 7: rank 1")
        assert "has waited 0.3 s for rank 11 (rank 11 never called it) and gave up. No collective" in str(error)


def test_a_rank_that_comes_late_is_told_and_the_next_meeting_is_held() -> None:
    def late(meeting: Meeting) -> Any:
        time.sleep(0.6)
        with pytest.raises(RuntimeError, match="the call at 1: rank 10 has waited 0.2 s for rank 11"):
            meeting.meet("the call at 1", "1", {})
        return meeting.meet("the call at 2", "2", {})

    def early(meeting: Meeting) -> Any:
        with pytest.raises(RuntimeError, match="gave up"):
            meeting.meet("the call at 1", "1", {})
        time.sleep(0.6)
        return meeting.meet("the call at 2", "2", {})

    assert together(early, late, timeout=0.2) == [[{}, {}]] * 2


def test_the_same_meeting_is_held_at_the_second_attempt() -> None:
    def rank(meeting: Meeting, pause: float) -> Any:
        time.sleep(pause)
        with pytest.raises(RuntimeError, match="gave up"):
            meeting.meet("it", "1", {})
        time.sleep(0.5 - pause)
        return meeting.meet("it", "1", {})

    assert together(lambda m: rank(m, 0), lambda m: rank(m, 0.4), timeout=0.3) == [[{}, {}]] * 2


def test_ranks_at_different_places_are_told_at_once() -> None:
    start = time.monotonic()
    found = together(call("step 200"), call("step 190"), call("step 200"), timeout=60)
    assert time.monotonic() - start < 10
    for error in found:
        assert isinstance(error, RuntimeError)
        assert "ranks are at different places" in str(error)
        assert "the call at step 200" in str(error)
        assert "the call at step 190" in str(error)


def test_a_decision_is_made_once() -> None:
    """The last rank comes just when the first one gives up: both go on, or neither does."""
    outcomes = set()
    for i in range(60):

        def late(meeting: Meeting, pause: float = 0.02 + 0.0005 * (i % 20)) -> Any:
            time.sleep(pause)
            return meeting.meet("it", "1", {})

        found = together(call("1"), late, timeout=0.025)
        kinds = {type(each) for each in found}
        assert len(kinds) == 1, found
        outcomes |= kinds
    assert RuntimeError in outcomes


def test_names_count_what_a_rank_has_made() -> None:
    first, second, other = numbered("lipcore/t"), numbered("lipcore/t"), numbered("lipcore/u")
    assert (first, second, other) == ("lipcore/t/1", "lipcore/t/2", "lipcore/u/1")
