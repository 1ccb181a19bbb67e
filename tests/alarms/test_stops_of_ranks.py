"""Ranks that merge no windows stop together for an alarm, or none does: two ranks, in loops of several kinds."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ranks import run_ways
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lipcore
from lipcore.alarms import AlarmEvent, Alarms, AlarmStop
from lipcore.distributed import appointment

EVERY = 4  # steps from look to look, and at least as many from the asking to the meeting
STEPS = 24
EVERY_STEP = tuple(range(STEPS))
#: Alarms, as (rank, number of steps made in this process); the numbers of steps made at which each rank calls
#: log_batch(); where it merges windows; and (to, from), the steps between which a checkpoint is loaded.
WAYS: dict[str, dict[str, Any]] = {
    "both": {"alarms": [(1, 1), (0, 7)]},
    "last": {"alarms": [(1, STEPS - 1)]},
    "taken back": {"alarms": [(1, 19)], "back": (2, 20)},
    "after going back": {"alarms": [(1, 17), (1, 24)], "back": (2, 20), "steps": 60},
    "missed": {
        "alarms": [(1, 1), (1, 13)],
        "calls": [(9, *EVERY_STEP[12:]), (0, 2, *EVERY_STEP[10:])],
    },
    "elsewhere": {"alarms": [(1, 1)], "calls": [EVERY_STEP, (*EVERY_STEP[:8], *EVERY_STEP[9:])], "merges": [(1, 8)]},
    "merged": {"alarms": [(0, 1), (1, 8)], "merges": [(0, 8), (1, 8)], "calls": [EVERY_STEP[:5]] * 2},
}


def train(
    rank: int,
    folder: str,
    name: str,
    *,
    alarms: Sequence[Sequence[int]],
    calls: Sequence[Sequence[int]] | None = None,
    merges: Sequence[Sequence[int]] = (),
    back: Sequence[int] = (-1, -1),
    steps: int = STEPS,
) -> dict[str, Any]:
    """Train under DDP, with alarms behind log_batch() of these steps."""
    appointment._EVERY = appointment.AHEAD = EVERY
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = Alarms(stop=True)
    monitor = lipcore.Monitor(
        model, optimizer, [lipcore.Trajectory()], window_steps=4 if merges else 1000, alarms=seen, timeout=0.5
    )
    found: dict[str, Any] = {"stopped": None, "refused": ""}
    made = step = 0
    state: Any = None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            with monitor:
                while step < steps:
                    loss = model(torch.randn(6, 4)).square().mean()
                    if calls is None or step in calls[rank]:
                        monitor.log_batch(torch.arange(6))
                    if (rank, step) in [tuple(each) for each in merges]:
                        try:
                            monitor.global_window()
                        except ValueError as error:
                            found["refused"] = str(error)
                    if (rank, made) in [tuple(each) for each in alarms]:
                        seen._tell(AlarmEvent(step, "loss", f"of {made}", 4.0, f"alarm in step {step}: words"))
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    made, step = made + 1, step + 1
                    if step == back[0]:
                        state = state or monitor.state_dict()
                    if made == back[1]:
                        monitor.load_state_dict(state)
                        step = back[0]
        except AlarmStop as error:
            found["stopped"] = [error.event.place, error.event.rank]
    found["told"] = [str(one.message) for one in told if "could not stop" in str(one.message)]
    return found | {"made": made}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run_ways(tmp_path_factory.mktemp("ranks"), train, WAYS)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "stopped", "made"),
    [
        ("both", ["of 1", 1], 8),  # the other rank's own alarm came just before
        ("merged", ["of 1", 0], 8),
        ("after going back", ["of 24", 1], 30),  # not where the steps that were taken back had appointed it
    ],
)
def test_all_ranks_raise_the_same_stop_in_the_same_call(
    found: dict[str, list[dict[str, Any]]], name: str, stopped: list[Any], made: int
) -> None:
    for one in found[name]:
        assert one == {"stopped": stopped, "refused": "", "told": [], "made": made}


@pytest.mark.ci
@pytest.mark.parametrize("name", ["last", "taken back"])
def test_no_rank_stops_alone(found: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Neither behind the last call in which all of them could, nor for a step that a checkpoint has taken back."""
    one, other = found[name]
    assert one == other
    assert one["stopped"] is None
    assert not one["told"]


@pytest.mark.ci
def test_a_rank_whose_appointment_was_called_off_says_so_and_asks_again_for_the_next_alarm(
    found: dict[str, list[dict[str, Any]]],
) -> None:
    one, other = found["missed"]
    assert "rank 0 has waited 0.5 s for rank 1" in one["told"][0]
    assert "Another rank has looked for this one in vain" in other["told"][0]
    assert [len(each["told"]) for each in (one, other)] == [1, 1]
    assert one["stopped"] == other["stopped"] == ["of 1", 1]  # the first that the other has not heard of
    assert one["made"] == other["made"] == 20


@pytest.mark.ci
def test_a_rank_that_merges_windows_where_the_other_stops_is_refused_by_name(
    found: dict[str, list[dict[str, Any]]],
) -> None:
    one, other = found["elsewhere"]
    assert one["stopped"] is other["stopped"] is None
    assert "Rank 1 is at monitor.global_window() at step 8" in one["told"][0]
    assert (
        "ranks are at an alarm that is to stop all ranks (rank 0) and monitor.global_window() (rank 1)"
        in (other["refused"])
    )
