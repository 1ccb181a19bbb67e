"""The time of a step: what is counted, what is left out, and how it adds up over resumes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import lipcore
from lipcore.recording import RunRecord, open_run
from lipcore.recording.stopwatch import Stopwatch
from lipcore.report.source import StepTime


class Clock:
    """A clock that stands still until it is moved on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def made_steps(watch: Stopwatch, clock: Clock, steps: int, inside: float = 0.25, outside: float = 0.75) -> None:
    for _ in range(steps):
        clock.now += outside
        watch.begin()
        clock.now += inside
        watch.end()


def test_a_step_is_from_call_to_call_and_the_first_ten_are_left_out() -> None:
    clock, found = Clock(), list[StepTime]()
    watch = Stopwatch(found.append, clock)
    made_steps(watch, clock, 10, inside=100.0)
    made_steps(watch, clock, 65)
    assert found == [StepTime(64, 16.0, 64.0)]
    made_steps(watch, clock, 3)
    watch.closed()
    assert found[1] == StepTime(3, 0.75, 3.0)
    watch.closed()
    assert len(found) == 2


def test_a_pause_between_two_steps_is_no_step() -> None:
    clock, found = Clock(), list[StepTime]()
    watch = Stopwatch(found.append, clock)
    made_steps(watch, clock, 30)
    clock.now += 1000.0  # validation
    made_steps(watch, clock, 30)
    watch.state_taken()
    clock.now += 1000.0  # writes the checkpoint
    made_steps(watch, clock, 10)
    watch.closed()
    assert found == [StepTime(49, 49 * 0.25, 49.0), StepTime(9, 9 * 0.25, 9.0)]


def test_steps_that_close_a_window_are_in_neither_of_the_two() -> None:
    """The call is part of the step: more than all of it cannot be inside."""
    clock, found = Clock(), list[StepTime]()
    watch = Stopwatch(found.append, clock)
    made_steps(watch, clock, 11)
    for _ in range(4):
        made_steps(watch, clock, 15)
        made_steps(watch, clock, 1, inside=100.0)
    made_steps(watch, clock, 1)
    watch.closed()
    assert (found[0].steps, found[0].usual) == (64, 64.0)
    assert found[0].inside == 16.0


def test_a_checkpoint_that_is_loaded_begins_anew() -> None:
    clock, found = Clock(), list[StepTime]()
    watch = Stopwatch(found.append, clock)
    made_steps(watch, clock, 30)
    watch.state_loaded(10)
    made_steps(watch, clock, 11)
    watch.closed()
    assert found == []


def test_a_record_adds_times_up_and_an_older_run_keeps_its_own(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a")
    record.begin(0)
    record.add_step_time(StepTime(64, 1.0, 8.0))
    record.add_step_time(StepTime(36, 2.0, 4.0))
    record.add_steps(1, {"logged/loss": torch.ones(3, 1).numpy()}, ["total"], ["total"])
    record.close()
    with open_run(tmp_path / "a") as run:
        assert run.step_time == StepTime(100, 3.0, 12.0)
    record = RunRecord(tmp_path / "a")
    record.begin(0)  # anew, from step 0
    record.flush()
    with open_run(tmp_path / "a") as run:
        assert run.step_time == StepTime()
    record.close()
    with open_run(tmp_path / "a" / "rank0-before-1.older") as run:
        assert run.step_time.steps == 100


def test_a_run_says_what_its_steps_took(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lipcore.watch(model, optimizer, run=tmp_path / "a", window_steps=10) as monitor:
        for _ in range(30):
            loss = model(torch.ones(5, 3)).square().mean()
            monitor.log(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with open_run(tmp_path / "a") as run:
        time = run.step_time
    assert time.steps == 19
    assert time.inside > 0
    assert time.usual > 0
