"""Which trainings have the movement of their parameters checked in the trajectory's own step, and which in a pass of
its own: either finds the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from few import few
from movement_runs import AT, OPTIMIZERS, STEPS, Run, groups, scale, several
from torch import nn

import lipcore
from lipcore.alarms import Alarms
from lipcore.alarms.signals import SIGNALS
from lipcore.trajectory.tracker_base import TrackerBase
from lipcore.trajectory.unexplained import Unexplained

FOUND = [(AT, "unexplained_movement", "blocks.0.weight")]


class Ways:
    """Counts the steps that were checked in the trajectory's own step, and the passes that were made for the check."""

    def __init__(self) -> None:
        self.fused = self.apart = 0


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ways]:
    found, step_with, sums = Ways(), TrackerBase.step_with, Unexplained._sums

    def counted_step(tracker: Any, check: Any) -> Any:
        found.fused += 1
        return step_with(tracker, check)

    def counted_sums(check: Any, only: Any) -> Any:
        found.apart += 1
        return sums(check, only)

    monkeypatch.setattr(TrackerBase, "step_with", counted_step)
    monkeypatch.setattr(Unexplained, "_sums", counted_sums)
    yield found
    assert found.fused or found.apart


def of_scaler(**settings: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"scaler": torch.amp.GradScaler("cpu", init_scale=16.0, **settings)}


def plain(**how: Any) -> Callable[[], dict[str, Any]]:
    return lambda: how


FUSED: dict[str, Callable[[], dict[str, Any]]] = {
    **{name: plain(optimizer=name) for name in OPTIMIZERS},
    "groups": plain(optimizer=groups),
    "float64": plain(dtype=torch.float64),
    "bfloat16": plain(dtype=torch.bfloat16),
    "a scaler that is off": of_scaler(enabled=False),
    "other statistics": plain(stats=["update_norm", "distance", "element_variance"]),
}
APART: dict[str, Callable[[], dict[str, Any]]] = {
    "several optimizers": plain(optimizer=several),
    "a scaler": of_scaler(),
    "a scaler that a fused optimizer asks": lambda: {"optimizer": "fused", **of_scaler()()},
    "copies in turns": plain(mode="updates"),
    "copies in turns beside snapshots": plain(mode="updates", source="snapshot"),
    "copies in turns beside sketches": plain(mode="sketch", source="optimizer", buckets=256),
}


def strong(run: Run) -> None:
    """Above the ulps of bfloat16."""
    run.weight.mul_(0.9)


@pytest.mark.parametrize("name", few(FUSED, 4))
def test_with_copies_on_the_cpu_and_one_optimizer_it_is_one_pass(name: str, ways: Ways) -> None:
    assert not Run(**FUSED[name]()).go()
    assert (ways.fused, ways.apart) == (STEPS, 0)
    events = Run(**FUSED[name]()).go(between=strong if name == "bfloat16" else scale)
    assert [(event.step, event.signal, event.place) for event in events] == FOUND
    assert (ways.fused, ways.apart) == (2 * STEPS, 0)


@pytest.mark.parametrize("name", few(APART, 3))
def test_others_have_a_pass_of_its_own(name: str, ways: Ways) -> None:
    assert not Run(**APART[name]()).go()
    events = Run(**APART[name]()).go(between=scale)
    assert [(event.step, event.signal, event.place) for event in events] == FOUND
    assert not ways.fused
    assert ways.apart >= 2 * STEPS


@pytest.mark.parametrize("front_door", ["Monitor", "watch"])
def test_with_the_default_metrics_and_signals_it_is_one_pass(front_door: str, ways: Ways) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    default = [name for name, signal in SIGNALS.items() if signal.by_default]
    alarms = Alarms(signals=[*default, "unexplained_movement"])
    with getattr(lipcore, front_door)(model, optimizer, alarms=alarms) as monitor:
        for step in range(1, STEPS + 1):
            if step == AT:
                model[2].bias.data += 0.01
            loss = model(torch.randn(8, 6)).square().mean()
            monitor.log(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [(event.step, event.place) for event in alarms.events] == [(AT, "2.bias")]
    assert (ways.fused, ways.apart) == (STEPS, 0)


def load(run: Run) -> None:
    run.model.load_state_dict({name: tensor + 0.1 for name, tensor in run.model.state_dict().items()})


def rebind(run: Run) -> None:
    run.monitor.rebind()


def replaced(run: Run) -> None:
    """A module by one with the same parameters, which the optimizer has."""
    old = run.model.blocks[0]
    run.model.blocks[0] = new = nn.Linear(16, 32)
    new.weight, new.bias = old.weight, old.bias


@pytest.mark.parametrize("change", few([rebind, load, replaced], 1))
def test_it_stays_one_pass_where_the_model_changes(change: Callable[[Run], None], ways: Ways) -> None:
    assert not Run().go(between=change)
    assert (ways.fused, ways.apart) == (STEPS, 0)


def test_a_step_with_state_in_another_layout_has_a_pass_of_its_own_and_the_next_has_not(ways: Ways) -> None:
    run = Run()

    def transposed(run: Run, step: int) -> None:
        state = run.optimizers[0].state.get(run.weight)
        if state and step in (AT, AT + 1):
            state["exp_avg"] = state["exp_avg"].t().contiguous().t() if step == AT else state["exp_avg"].contiguous()

    def faults(run: Run, step: int) -> None:
        transposed(run, step)
        if step == AT:
            run.weight.data.mul_(0.999)

    assert not run.go(before_step=transposed)
    assert (ways.fused, ways.apart) == (STEPS - 1, 1)
    assert [(event.step, event.signal, event.place) for event in Run().go(before_step=faults)] == FOUND
    assert (ways.fused, ways.apart) == (2 * STEPS - 2, 2)
