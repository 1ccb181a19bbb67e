"""Appointments of ranks: who asks, who looks when, and what becomes of those that are not kept."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch.distributed as dist

from lipcore.distributed.appointment import _EVERY, AHEAD, Appointment
from lipcore.distributed.group import Group
from lipcore.distributed.meeting import Meeting
from lipcore.distributed.partners import Partners

GROUP = cast(Group, None)


class OfStore:
    """Partners whose words lie in a store in this process."""

    def __init__(self, store: Any, place: int) -> None:
        self._meeting = Meeting(store, "group", place, (0, 1))

    def leave_word(self, group: Group, where: str, word: str, over: str = "") -> str:
        return self._meeting.leave_word(where, word, over)

    def word(self, group: Group, where: str) -> str:
        return self._meeting.word(where)


@pytest.fixture
def ranks() -> list[Appointment]:
    store = dist.HashStore()
    return [Appointment(cast(Partners, OfStore(store, place))) for place in range(2)]


def due(one: Appointment, step: int) -> bool:
    return one.looks(step) and one.is_due(GROUP, step)


def test_all_ranks_find_it_in_the_same_call(ranks: list[Appointment]) -> None:
    ranks[1].ask(GROUP, 3)
    found = [[step for step in range(40) if due(one, step)] for one in ranks]
    assert found[0] == found[1]
    assert 3 + AHEAD <= found[0][0] < 3 + AHEAD + _EVERY


def test_a_rank_looks_once_in_a_stretch_of_steps(ranks: list[Appointment]) -> None:
    looked = []
    for step in range(3 * _EVERY):
        if ranks[0].looks(step):
            looked.append(step)
            ranks[0].is_due(GROUP, step)
    assert looked == [0, _EVERY, 2 * _EVERY]


def test_what_was_asked_in_a_step_that_was_taken_back_does_not_stand(ranks: list[Appointment]) -> None:
    ranks[1].ask(GROUP, 5000)
    for one in ranks:
        one.forget()
    ranks[0].ask(GROUP, 13)
    assert all(due(one, 13 + AHEAD) for one in ranks)


def test_what_another_rank_has_asked_for_stands(ranks: list[Appointment]) -> None:
    ranks[1].ask(GROUP, 3)
    ranks[0].ask(GROUP, 4)
    assert all(due(one, 3 + AHEAD) for one in ranks)


def test_calling_off_leaves_what_was_asked_since(ranks: list[Appointment]) -> None:
    """The ranks that have not met call it off one after the other; one may have asked again meanwhile."""
    ranks[0].ask(GROUP, 0)
    assert all(due(one, AHEAD) for one in ranks)
    ranks[0].call_off(GROUP)
    ranks[0].ask(GROUP, AHEAD + 1)
    ranks[1].call_off(GROUP)
    assert all(due(one, 2 * AHEAD + 1) for one in ranks)


def test_a_rank_finds_that_another_has_called_off_what_it_asked_for(ranks: list[Appointment]) -> None:
    ranks[0].ask(GROUP, 0)
    assert due(ranks[1], AHEAD)
    ranks[1].call_off(GROUP)
    assert ranks[0].asked
    assert not ranks[0].is_called_off
    assert not due(ranks[0], AHEAD + 1)
    assert ranks[0].is_called_off
    assert not ranks[1].is_called_off


def test_one_that_was_kept_is_over(ranks: list[Appointment]) -> None:
    ranks[0].ask(GROUP, 0)
    for one in ranks:
        assert due(one, AHEAD)
        one.keep()
    assert not ranks[0].asked
    assert not any(due(one, 3 * AHEAD) for one in ranks)
