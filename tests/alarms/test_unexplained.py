"""Movement that the optimizer did not make is told with the parameter and the step, and nothing else is."""

from __future__ import annotations

import copy
import json
import re
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from few import few
from movement_runs import AT, OPTIMIZERS, STEPS, Run, Tied, groups, scale, several
from torch import nn

import lipcore
from lipcore.alarms import Alarms
from lipcore.trajectory.unexplained import LIMITS


def flip(bit: int) -> Callable[[Run], None]:
    def fault(run: Run) -> None:
        row = run.weight.view(-1)
        (bits,) = struct.unpack("<I", struct.pack("<f", float(row[5])))
        row[5] = struct.unpack("<f", struct.pack("<I", bits ^ (1 << bit)))[0]

    return fault


def noise(run: Run) -> None:
    run.weight.mul_(1 + 1e-3 * torch.randn(run.weight.shape))


def stale(run: Run) -> None:
    """A step of one parameter is lost."""
    run.weight.copy_(run.kept)  # type: ignore[attr-defined]


def keep(run: Run, step: int) -> None:
    if step == AT - 1:
        run.kept = run.weight.detach().clone()  # type: ignore[attr-defined]


FAULTS = {
    **{f"bit {bit}": flip(bit) for bit in (22, 21, 20, 23, 24, 26, 31)},
    "noise": noise,
    "scaled": scale,
    "stale": stale,
}


@pytest.mark.parametrize("optimizer", few(list(OPTIMIZERS), 1))
@pytest.mark.parametrize("fault", FAULTS)
def test_it_is_told_with_its_parameter_and_step(fault: str, optimizer: str) -> None:
    events = Run(optimizer).go(between=FAULTS[fault], before_step=keep)
    assert [(event.step, event.signal, event.place) for event in events] == [
        (AT, "unexplained_movement", "blocks.0.weight")
    ]
    assert events[0].score > 1
    assert "blocks.0.weight moved by what its optimizer's step does not explain" in events[0].message


def test_bfloat16_above_its_ulp() -> None:
    assert not Run("adamw", torch.bfloat16).go()
    events = Run("adamw", torch.bfloat16).go(between=lambda run: run.weight.mul_(1.1))
    assert [(event.step, event.place) for event in events] == [(AT, "blocks.0.weight")]


def test_master_copies() -> None:
    """Those that the optimizer steps, not the half-precision parameters that follow them."""
    model = Tied().to(torch.bfloat16)
    masters = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(masters.values(), lr=1e-3)
    alarms = Alarms(signals=["unexplained_movement"])
    with lipcore.Monitor(model, optimizer, [lipcore.Trajectory(masters=masters)], alarms=alarms):
        for step in range(1, STEPS + 1):
            if step == AT:
                masters["blocks.2.bias"].data[3] *= 1.01
            ids = torch.randint(0, 20, (8,))
            nn.functional.cross_entropy(model(ids).float(), ids).backward()
            for name, p in model.named_parameters():
                masters[name].grad, p.grad = None if p.grad is None else p.grad.float(), None
            optimizer.step()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(masters[name])
    assert [(event.step, event.place) for event in alarms.events] == [(AT, "blocks.2.bias")]


@pytest.mark.gpu
def test_on_a_device_no_step_waits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
    alarms = Alarms(signals=["unexplained_movement"])
    x = torch.randn(8, 6).cuda()
    with lipcore.Monitor(model, optimizer, [lipcore.Trajectory()], alarms=alarms):
        for step in range(1, STEPS + 1):
            if step == AT:
                model[2].weight.data.mul_(1.001)
            torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
            try:
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert [(event.step, event.place) for event in alarms.events] == [(AT, "2.weight")]


# ---- what is no such movement


def load(run: Run) -> None:
    state = {name: tensor + 0.1 for name, tensor in run.model.state_dict().items()}
    run.model.load_state_dict(state)


def load_all(run: Run) -> None:
    run.model.load_state_dict(copy.deepcopy(run.model.state_dict()))
    run.optimizers[0].load_state_dict(copy.deepcopy(run.optimizers[0].state_dict()))


def swap_announced(run: Run) -> None:
    for parameter in run.model.parameters():
        parameter.mul_(0.9)
    run.monitor.metrics["trajectory"].rebase()


def rebound(run: Run) -> None:
    for parameter in run.model.parameters():
        parameter.mul_(0.9)
    run.monitor.metrics["trajectory"].rebind()


def swap_and_back(run: Run) -> None:
    """Averaged weights for an evaluation, and the training's again."""
    kept = [p.detach().clone() for p in run.model.parameters()]
    for p in run.model.parameters():
        p.mul_(0.9)
    run.model(torch.arange(3))
    for p, own in zip(run.model.parameters(), kept, strict=True):
        p.copy_(own)


def clip(run: Run, step: int) -> None:
    nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)


def change(run: Run, step: int) -> None:
    for group in run.optimizers[0].param_groups:
        group["lr"] *= 1.5 if step % 2 else 0.4
        group["weight_decay"] = 0.01 * step
        if "betas" in group:
            group["betas"] = (0.9 - 0.01 * step, 0.95)


def forget_some(run: Run, step: int) -> None:
    if step % 3 == 0:
        run.model.blocks[2].weight.grad = None


def huge(run: Run, step: int) -> None:
    if step == AT:
        for p in run.model.parameters():
            if p.grad is not None:
                p.grad *= 1e6


def not_finite(run: Run, step: int) -> None:
    if step == AT:
        run.weight.grad[0, 0] = torch.nan


HARMLESS: dict[str, dict[str, Any]] = {
    "nothing": {"steps": 40},
    "load_state_dict": {"between": load},
    "a checkpoint": {"between": load_all},
    "an average announced": {"between": swap_announced},
    "a rebind": {"between": rebound},
    "an average and back": {"between": swap_and_back},
    "clipping": {"before_step": clip},
    "other hyperparameters": {"before_step": change},
    "no gradient": {"before_step": forget_some},
    "a huge gradient": {"before_step": huge},
    "a gradient that is not finite": {"before_step": not_finite},
}


@pytest.mark.parametrize("optimizer", few(list(OPTIMIZERS), 1))
@pytest.mark.parametrize("what", HARMLESS)
def test_nothing_else_is_told(what: str, optimizer: str) -> None:
    run = Run(optimizer)
    events = run.go(**HARMLESS[what])
    assert [event for event in events if event.signal == "unexplained_movement"] == []
    lines = {line.what: line.rule for line in run.monitor.metrics["trajectory"].plan()}
    assert lines["unexplained movement"] == "8 parameters checked in every step"


@pytest.mark.parametrize("optimizer", ["nesterov", pytest.param("sgd", marks=pytest.mark.ci), "adamw"])
def test_single_elements_that_go_through_zero(optimizer: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    made = OPTIMIZERS[optimizer](model.parameters())
    for group in made.param_groups:
        group["weight_decay"] = 0.1
    alarms = Alarms(signals=["unexplained_movement"])
    with lipcore.Monitor(model, made, [lipcore.Trajectory()], alarms=alarms):
        for _ in range(200):
            made.zero_grad()
            (model(torch.randn(2, 1)) - torch.randn(2, 1)).square().mean().backward()
            made.step()
    assert not alarms.events


def test_groups_and_several_optimizers() -> None:
    for make in (groups, several):
        assert not Run(make).go()
        assert [event.place for event in Run(make).go(between=scale)] == ["blocks.0.weight"]


@pytest.mark.parametrize("optimizer", ["sgd", "fused"])
def test_steps_that_a_scaler_skips(optimizer: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=3)

    def overflow(run: Run, step: int) -> None:
        if step in (4, AT):
            run.weight.grad[0, 0] = torch.inf

    assert not Run(optimizer, scaler=scaler).go(before_step=overflow)


def test_others_are_not_checked_by_name() -> None:
    def some(parameters: Any) -> Any:
        all_of_them = list(parameters)
        return [torch.optim.RMSprop(all_of_them[:3], lr=1e-3), torch.optim.Adam(all_of_them[3:], lr=1e-3)]

    run = Run(some)
    assert not run.go(between=lambda run: run.model.embedding.weight.mul_(2))
    lines = {line.what: line.rule for line in run.monitor.metrics["trajectory"].plan()}
    assert "RMSprop has no closed form" in lines["embedding.weight"]
    with pytest.warns(
        RuntimeWarning, match="unexplained_movement checks no parameter: torch.optim.rmsprop.RMSprop has no"
    ):
        Run(torch.optim.RMSprop)
    model = nn.Linear(2, 1)
    adam = torch.optim.Adam(model.parameters())
    said = (
        "unexplained_movement checks no parameter: mode 'sketch' with source 'difference' has numbers of groups, not "
        'of parameters; pass metrics=[lipcore.Trajectory()], whose mode is "exact", or Trajectory(mode="updates")'
    )
    with pytest.warns(RuntimeWarning, match=re.escape(said)):
        lipcore.Monitor(
            model, adam, [lipcore.Trajectory(mode="sketch")], alarms=Alarms(signals=["unexplained_movement"])
        )


def test_a_step_that_cannot_be_read_ends_the_check_with_a_warning() -> None:
    def replace(run: Run) -> None:
        run.model.blocks[0].weight = nn.Parameter(run.weight.detach().clone())

    run = Run("adam")
    with pytest.warns(
        RuntimeWarning, match="checks nothing from now on: .*'blocks.0.weight' of the model is not the opt"
    ):
        assert not run.go(between=replace)
    assert run.monitor.metrics["trajectory"].why_unchecked.startswith("the optimizer's step could not be read")


def test_a_lasting_cause_is_told_once() -> None:
    events = Run("adam").go(before_step=lambda run, _: run.weight.data.mul_(0.99), steps=50)
    assert [(event.step, event.place) for event in events] == [(1, "blocks.0.weight")]


# ---- in turns, where no copies of all parameters are kept

IN_TURNS: dict[str, dict[str, Any]] = {
    "updates": {"mode": "updates"},
    "snapshot": {"mode": "updates", "source": "snapshot"},
    "sketch": {"mode": "sketch", "source": "optimizer", "buckets": 256},
}
WEIGHT = 2  # the place of blocks.0.weight among the 8 parameters that are checked


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of one parameter each."""
    monkeypatch.setattr("lipcore.trajectory.unexplained._SHARE", 1)
    monkeypatch.setattr("lipcore.trajectory.unexplained._TURNS", 10**9)


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("way", few(list(IN_TURNS), 1))
def test_in_turns_what_lasts_is_found_once_and_what_does_not_where_its_turn_is(way: str) -> None:
    def lasts(run: Run, step: int) -> None:
        if step >= AT:
            run.weight.data.mul_(0.99)

    run = Run("adam", **IN_TURNS[way])
    ((step, place, message),) = [(e.step, e.place, e.message) for e in run.go(before_step=lasts, steps=60)]
    assert (step, place) == (AT + (WEIGHT - (AT - 1)) % 8, "blocks.0.weight")
    assert message.endswith("; it is checked in one step of 8, and may have done so before")

    for at in range(AT, AT + 8):
        run = Run("adam", **IN_TURNS[way])
        events = run.go(before_step=lambda run, step, at=at: step == at and run.weight.data.mul_(0.999), steps=AT + 12)  # type: ignore[misc]
        assert [(e.step, e.place) for e in events] == [(at, "blocks.0.weight")] * ((at - 1) % 8 == WEIGHT)


@pytest.mark.usefixtures("one_at_a_time")
def test_in_turns_nothing_is_known_of_those_whose_turn_it_is_not() -> None:
    known: list[list[str]] = []

    def take(first: int, arrays: Any) -> None:
        of_tensors = [i for i, level in enumerate(arrays.levels) if level == "tensor"]
        rows = arrays["unexplained_movement"]
        known.extend([arrays.places[i] for i in of_tensors if row[i] == row[i]] for row in rows)

    assert not Run("adam", on_step=take, **IN_TURNS["updates"]).go(steps=16)
    assert [len(names) for names in known] == [1] * 16
    assert known[:8] == known[8:]
    assert len({name for (name,) in known}) == 8


@pytest.mark.usefixtures("one_at_a_time")
def test_turns_are_those_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rebind() parameters may be checked more often, or more seldom, than before."""
    run = Run("adam", **IN_TURNS["updates"])

    def lasts(run: Run, step: int) -> None:
        if step == 1:  # while nothing is found
            monkeypatch.undo()
            run.monitor.rebind()
        if step >= AT:
            run.weight.data.mul_(0.99)

    ((step, message),) = [(event.step, event.message) for event in run.go(before_step=lasts, steps=20)]
    assert step == AT
    assert "it is checked in one step of" not in message
    plain = copy.deepcopy(run.monitor)
    assert [event.step for event in plain.alarms.events] == [AT]


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("optimizer", few(list(OPTIMIZERS), 1))
@pytest.mark.parametrize("what", few(list(HARMLESS), 3))
def test_in_turns_nothing_else_is_told(what: str, optimizer: str) -> None:
    run = Run(optimizer, **IN_TURNS["updates"])
    events = run.go(**HARMLESS[what] | {"steps": 20})
    assert [event for event in events if event.signal == "unexplained_movement"] == []
    (line,) = [line for line in run.monitor.metrics["trajectory"].plan() if line.what == "unexplained movement"]
    said = "8 parameters checked in turns, each in one step of 8, against copies that live for that step"
    assert line.rule.startswith(said)
    assert line.bytes == 4 * 32 * 16  # the largest of them


@pytest.mark.usefixtures("one_at_a_time")
def test_in_turns_with_several_optimizers_and_a_scaler_that_skips() -> None:
    def overflow(run: Run, step: int) -> None:
        if step in (4, AT):
            run.weight.grad[0, 0] = torch.inf

    assert not Run(several, mode="updates", source="snapshot").go()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=3)
    assert not Run("fused", scaler=scaler, **IN_TURNS["updates"]).go(before_step=overflow, steps=20)
    events = Run(several, mode="updates").go(before_step=lambda run, _: run.weight.data.mul_(0.99), steps=20)
    assert [event.place for event in events] == ["blocks.0.weight"]


def test_small_models_are_checked_in_every_step_without_lasting_copies() -> None:
    events = Run("adam", **IN_TURNS["updates"]).go(between=scale)
    assert [(event.step, event.place) for event in events] == [(AT, "blocks.0.weight")]


def test_the_end_lets_the_copies_go() -> None:
    run = Run("adam", **IN_TURNS["updates"])
    check = run.monitor.metrics["trajectory"]._built.unexplained  # type: ignore[attr-defined]
    run.model(torch.arange(4)).square().mean().backward()
    run.optimizers[0].step()
    state = run.monitor.state_dict()
    copies = [weakref.ref(copy) for copy in check._copies]
    assert len(copies) == check.checked
    run.monitor.close()
    assert [copy() for copy in copies] == [None] * len(copies)
    run.monitor.load_state_dict(state)
    run.monitor.rebind()
    assert check._copies is None
    assert run.monitor.metrics["trajectory"]._built.unexplained is None  # type: ignore[attr-defined]


def test_training_stays_bit_for_bit_the_same() -> None:
    watched, plain = Run("nesterov"), Run("nesterov")
    plain.monitor.close()
    plain.monitor = lipcore.Monitor(plain.model, plain.optimizers[0], [lipcore.Trajectory()])
    for run in (watched, plain):
        torch.manual_seed(1)
        run.go()
    for one, other in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_limits_are_far_above_what_was_measured() -> None:
    path = Path(__file__).parents[2] / "bench" / "results" / "movement-floor.json"
    if not path.exists():
        pytest.skip("there is no bench folder")
    rows = json.loads(path.read_text())["rows"]
    for dtype, limit in LIMITS.items():
        found = [row["half_ulps"] for row in rows if row["dtype"] == str(dtype)[6:] and row["half_ulps"] is not None]
        assert len(found) > 20
        assert 4 * max(found) <= limit
