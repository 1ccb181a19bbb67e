"""Alarms on two ranks: all hear of all at logging steps, and stop at the same one."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import pytest
import torch
from ranks import run_ways
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lipcore
from lipcore.alarms import AlarmEvent, Alarms, AlarmStop
from lipcore.alarms.ranks import EventsOfRanks
from lipcore.distributed import appointment
from lipcore.monitor import logged
from lipcore.trajectory import single_steps

STEPS, WINDOW, AT = 16, 4, 6
LATE = STEPS - 2  # in the last window, which closes after the last call of log()
OPEN = STEPS  # where windows have a step more: in one that never closes
#: Whether they stop, the step of the alarm, whether the last window is merged too, and whether the loss is logged.
WAYS = {
    "goes on": {"stop": False, "at": AT, "end": False, "log": True},
    "stops": {"stop": True, "at": AT, "end": False, "log": True},
    "ends": {"stop": True, "at": LATE, "end": False, "log": True},
    "open window": {"stop": True, "at": OPEN, "end": False, "log": True},
    "meets": {"stop": True, "at": LATE, "end": True, "log": True},
    "never logs": {"stop": True, "at": AT, "end": False, "log": False},
    "batches": {"stop": True, "at": AT, "end": False, "log": False},
    "no watch": {"stop": True, "at": AT, "end": False, "log": True},
    "batches of one": {"stop": True, "at": AT, "end": False, "log": False},
    "logs late": {"stop": True, "at": 2 * WINDOW + 2, "end": False, "log": True},
}
FIRST_LOG = 3 * WINDOW + 2  # of that one


def event(step: int, place: str, rank: int | None = None) -> AlarmEvent:
    on = "" if rank is None else f" on rank {rank}"
    return AlarmEvent(step, "loss", place, 4.0, f"alarm in step {step}{on}: words", rank)


def test_ranks_have_the_same_events_each_once() -> None:
    ranks = [EventsOfRanks(), EventsOfRanks()]
    ranks[0].add(event(3, "b"))
    ranks[0].add(event(2, "a"))
    ranks[1].add(event(2, "a"))
    ranks[1].add(event(3, "c"))
    said = json.loads(json.dumps([one.said() for one in ranks]))
    found = [one.heard({4: said[0], 7: said[1]}) for one in ranks]
    everything = [event(2, "a", 4), event(3, "b", 4), event(3, "c", 7)]
    assert [new for new, _ in found] == [everything] * 2
    assert [of_others for _, of_others in found] == [[event(3, "c", 7)], [event(3, "b", 4)]]
    ranks[1].add(event(3, "b"))  # late
    assert ranks[0].heard({4: ranks[0].said(), 7: ranks[1].said()}) == ([], [])
    assert ranks[0].all == everything
    ranks[0].forget(2)
    assert ranks[0].all == everything[:1]


def test_many_events_come_in_several_parts() -> None:
    one = EventsOfRanks()
    for step in range(20):
        one.add(event(step, "a"))
    parts = [[found.step for found in one.heard({0: one.said(), 1: None})[0]] for _ in range(4)]
    assert [len(part) for part in parts] == [8, 8, 4, 0]
    assert [step for part in parts for step in part] == list(range(20))


def test_an_event_that_another_rank_has_told_first_is_acted_on_once() -> None:
    heard: list[AlarmEvent] = []
    kept: list[Exception] = []
    alarms = Alarms(on_event=heard.append, stop=True)
    alarms._begin([], kept.append, lambda: True, has_norms=False, meets=lambda: True)
    alarms._heard({0: [[3, "loss", "a", 4.0, "alarm in step 3: words"]], 1: []})
    alarms._tell(event(3, "a"))  # the numbers of this rank came later
    assert heard == alarms.global_events == [event(3, "a", 0)]
    assert alarms.events == [event(3, "a")]
    assert alarms._said() == []
    assert len(kept) == 1
    assert alarms._waits_to_stop is None


def test_what_is_not_finite_waits_for_no_other_alarm() -> None:
    one = EventsOfRanks()
    for step in range(20):
        one.add(event(step, "a"))
    one.add(AlarmEvent(20, "nonfinite", "a", math.inf, "alarm in step 20: words"))
    new, _ = one.heard({0: one.said()})
    assert [each.step for each in new] == [*range(7), 20]
    new, _ = one.heard({0: one.said()})
    assert [each.step for each in new] == list(range(7, 15))


def test_events_of_all_ranks_are_by_step_whenever_they_were_told() -> None:
    one = EventsOfRanks()
    for step in (9, 4):
        one.add(event(step, "a"))
        one.heard({0: one.said()})
    assert [each.step for each in one.all] == [4, 9]


def test_a_stop_waits_no_longer_where_the_ranks_meet_no_more() -> None:
    kept: list[Exception] = []
    meets = [True, True, False]
    alarms = Alarms(stop=True)
    alarms._begin([], kept.append, lambda: False, has_norms=False, meets=lambda: meets.pop(0))
    alarms._tell(event(3, "a"))
    alarms._begin_step(5)
    assert not kept
    alarms._begin_step(6)
    assert [error.event for error in kept] == [event(3, "a")]


@pytest.mark.parametrize("meets", [True, False])
def test_a_stop_waits_for_the_other_ranks_as_long_as_they_are_met(meets: bool) -> None:
    kept: list[Exception] = []
    alarms = Alarms(stop=True)
    alarms._begin([], kept.append, lambda: False, has_norms=False, meets=lambda: meets)
    alarms._tell(event(3, "a"))
    assert len(kept) == (0 if meets else 1)
    alarms._end()  # where the ranks meet, none stops alone when all is over
    assert len(kept) == (0 if meets else 1)
    alarms._part()
    assert [error.event for error in kept] == [event(3, "a")]
    assert len(alarms.global_events) == (0 if meets else 1)


def test_a_stop_that_was_to_be_of_one_rank_waits_where_the_others_have_not_heard_of_it() -> None:
    alarms = Alarms(stop=True)
    kept: list[Exception] = []
    alarms._begin([], kept.append, lambda: False, has_norms=False, meets=lambda: False)
    alarms._tell(event(3, "a"))
    assert len(kept) == 1
    assert alarms._wait_to_stop(event(3, "a"))
    alarms._heard({0: alarms._said(), 1: []})
    assert [error.event for error in kept[1:]] == [event(3, "a", 0)]
    assert not alarms._wait_to_stop(event(3, "a"))  # all know it: it is raised as it is


def train(rank: int, folder: str, name: str, *, stop: bool, at: int, end: bool, log: bool) -> dict[str, Any]:
    """Train under DDP; on rank 1 the loss that is logged becomes NaN in step `at`; windows meet at the `end` too.

    Without `log` nothing is logged, and the loss itself is NaN on both, or an alarm comes on rank 1 alone."""
    for module in (single_steps, logged):
        module.PROMPT = 0.0  # every step takes longer than numbers wait
    appointment._EVERY = appointment.AHEAD = 2
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    heard: list[AlarmEvent] = []
    alarms = Alarms(on_event=heard.append, stop=stop)
    metrics = [lipcore.Trajectory()]
    made: dict[str, Any] = {"metrics": metrics, "window_steps": WINDOW + (at == OPEN), "alarms": alarms, "timeout": 0.5}
    if name == "no watch":
        opened = lipcore.Monitor(model, optimizer, **made)
    else:
        opened = lipcore.watch(model, optimizer, run=f"{folder}/{name}", **made)
    found: dict[str, Any] = {"steps": 0, "stopped": None, "told": []}
    lipcore_warnings = warnings.catch_warnings(record=True)
    told = lipcore_warnings.__enter__()
    warnings.simplefilter("always")
    try:
        with opened as monitor:
            for step in range(1, STEPS + 1):
                found["steps"] = step
                loss = model(torch.randn(6, 4)).square().mean()
                if name == "logs late":
                    if step == at and rank == 1:
                        alarms._tell(event(step, "total"))
                    if step >= FIRST_LOG:
                        monitor.log(loss=loss)
                elif name.startswith("batches"):
                    if step == at and rank == 1:
                        alarms._tell(event(step, "total"))
                    if rank == 1 or name == "batches":
                        monitor.pop_window()
                        monitor.log_batch(torch.arange(6))
                elif log:
                    monitor.log(loss=loss * (float("nan") if rank == 1 and step == at else 1))
                else:
                    monitor.log_batch(torch.arange(6))
                    loss = loss * (float("nan") if step == at else 1)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if end:
                monitor.close_window()
                monitor.global_window()
    except AlarmStop as error:
        found["stopped"] = [error.event.step, error.event.rank]
    lipcore_warnings.__exit__(None, None, None)
    found["told"] = [str(one.message) for one in told if "could not stop" in str(one.message)]
    if name == "no watch":
        return found
    run = lipcore.open_run(f"{folder}/{name}", rank)
    return found | {
        "own": [one.step for one in alarms.events],
        "all": [[one.step, one.signal, one.place, one.rank, one.message] for one in alarms.global_events],
        "heard": [[one.step, one.rank] for one in heard],
        "recorded": [[one.step, one.data.get("rank")] for one in run.events if one.kind == "alarm"],
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run_ways(tmp_path_factory.mktemp("ranks"), train, WAYS)


@pytest.mark.ci
def test_all_ranks_hear_of_it_where_windows_are_merged(found: dict[str, list[dict[str, Any]]]) -> None:
    one, other = found["goes on"]
    assert one["steps"] == other["steps"] == STEPS
    assert (one["own"], other["own"]) == ([], [AT])
    assert one["all"] == other["all"]
    ((step, signal, place, rank, message),) = one["all"]
    assert (step, signal, place, rank) == (AT, "nonfinite", "total", 1)
    assert message.startswith(f"alarm in step {AT} on rank 1: not finite")
    assert (one["heard"], other["heard"]) == ([[AT, 1]], [[AT, None]])
    assert (one["recorded"], other["recorded"]) == ([[AT, 1]], [[AT, None]])


@pytest.mark.ci
def test_all_ranks_stop_at_the_same_step(found: dict[str, list[dict[str, Any]]]) -> None:
    one, other = found["stops"]
    assert one["stopped"] == other["stopped"] == [AT, 1]
    assert one["steps"] == other["steps"] == 2 * WINDOW + 1  # the call after the window's end
    assert one["all"] == other["all"]


@pytest.mark.ci
def test_no_rank_stops_alone_for_an_alarm_behind_the_last_merged_window(found: dict[str, list[dict[str, Any]]]) -> None:
    one, other = found["open window"]
    assert one["stopped"] is other["stopped"] is None
    assert one["steps"] == other["steps"] == STEPS
    assert (one["own"], other["own"]) == ([], [OPEN])
    for name in ("ends", "meets"):  # by the end of the block, or by a call before it
        one, other = found[name]
        assert one["stopped"] == other["stopped"] == [LATE, 1]
        assert one["steps"] == other["steps"] == STEPS


@pytest.mark.ci
@pytest.mark.parametrize(("name", "rank"), [("never logs", 0), ("batches", 1), ("no watch", 1)])
def test_ranks_that_merge_no_windows_stop_together_too(
    found: dict[str, list[dict[str, Any]]], name: str, rank: int
) -> None:
    """They do so in a call that one of them has appointed, whatever else each calls before."""
    one, other = found[name]
    assert one["stopped"] == other["stopped"] == [AT, rank]
    assert one["steps"] == other["steps"] < STEPS
    assert not one["told"] + other["told"]


@pytest.mark.ci
def test_a_rank_whose_others_do_not_come_goes_on(found: dict[str, list[dict[str, Any]]]) -> None:
    """They would wait for it; it says what to do."""
    one, other = found["batches of one"]
    assert one["stopped"] is other["stopped"] is None
    assert one["steps"] == other["steps"] == STEPS
    assert not one["told"]
    assert len(other["told"]) == 1
    assert "rank 1 has waited 0.5 s for rank 0" in other["told"][0]
    assert "or pass group=None" in other["told"][0]


@pytest.mark.ci
def test_ranks_that_first_log_late_stop_together(found: dict[str, list[dict[str, Any]]]) -> None:
    """The alarm comes when two windows have closed without a call of log(): as if nothing was ever logged."""
    for each in found["logs late"]:
        assert each["stopped"] == [2 * WINDOW + 2, 1]
        assert each["steps"] == FIRST_LOG
