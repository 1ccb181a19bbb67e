"""Windows of all ranks that are longer than the ring, beside one float64 process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import rank_situations
from rank_situations import STATS, data_of, errors, fsdp, made, monitored, train, truth

from lipcore import Monitor, Trajectory
from lipcore.trajectory import kept_steps

STEPS = 520  # more than the ring has, which is settled after 512


def long_window(rank: int, world: int) -> dict[str, Any]:
    rank_situations.STEPS = rank_situations.WINDOW = STEPS
    expected = truth(made(), data_of(range(world)))
    model = fsdp(made())
    optimizer, monitor = monitored(model, window_steps=STEPS, metrics=[Trajectory(stats=STATS, ring=512)])
    with monitor:
        train(model, optimizer, data_of(range(world))[rank], steps=range(STEPS))
        found = monitor.global_window()
    return errors([found], expected)


def steps_that_are_gone(rank: int, world: int) -> dict[str, Any]:
    """There is less room than the window takes; both ranks train on the same data."""
    rank_situations.STEPS = rank_situations.WINDOW = STEPS
    kept_steps.MOST_BYTES = 1000
    model = made()
    optimizer, monitor = monitored(model, window_steps=STEPS, metrics=[Trajectory(ring=512)])
    with monitor:
        train(model, optimizer, data_of([0])[0], steps=range(STEPS))
        found = monitor.global_window()
    assert found is not None
    return {"said": found.off["trajectory"]}


def loaded_in_the_middle(rank: int, world: int) -> dict[str, Any]:
    """A Monitor goes on from the state of another one, when steps of the window are in the ring no more."""
    rank_situations.STEPS = rank_situations.WINDOW = STEPS
    expected = truth(made(), data_of(range(world)))
    model, data = fsdp(made()), data_of(range(world))[rank]
    optimizer, monitor = monitored(model, window_steps=STEPS, metrics=[Trajectory(stats=STATS, ring=512)])
    with monitor:
        train(model, optimizer, data, steps=range(STEPS - 2))
        state = monitor.state_dict()
    resumed = Monitor(model, optimizer, [Trajectory(stats=STATS, ring=512)], window_steps=STEPS, timeout=20)
    with resumed:
        resumed.load_state_dict(state)
        train(model, optimizer, data, steps=range(STEPS - 2, STEPS))
        found = resumed.global_window()
    return errors([found], expected)


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each."""
    for work in (long_window, loaded_in_the_middle, steps_that_are_gone):  # the last leaves less room
        yield work.__name__, ranks, work
