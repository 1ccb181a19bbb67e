"""Alarms of a Monitor: faults are told with their step and layer, and training stays as it is."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lipcore
from lipcore.alarms import AlarmEvent, Alarms, AlarmStop

Fault = Callable[[int, nn.Module, torch.optim.Optimizer], None]
AT = 140  # the step of a fault


def train(
    steps: int = 150,
    *,
    alarms: Any = None,
    fault: Fault | None = None,
    flip: int | None = None,
    metrics: list[lipcore.Metric] | None = None,
    schedule: bool = False,
    **watch: Any,
) -> tuple[lipcore.Monitor, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1))
    optimizer = torch.optim.SGD([{"params": layer.parameters()} for layer in model[::2]], lr=0.1)
    data = torch.Generator().manual_seed(1)
    with lipcore.watch(model, optimizer, metrics=metrics, alarms=alarms, **watch) as monitor:
        for step in range(1, steps + 1):
            x = torch.randn(64, 6, generator=data)
            y = (2 * x[:, :1].sin() + 0.5) * (-1 if step == flip else 1)
            loss = nn.functional.mse_loss(model(x), y)
            monitor.log(loss=loss)
            loss.backward()
            if schedule and step == AT:
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3
            if fault is not None:
                fault(step, model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
    return monitor, model


def metrics() -> list[lipcore.Metric]:
    return [lipcore.Trajectory()]


def large_rate(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[1]["lr"] = 3.0 if step == AT else 0.1


def large_gradient(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if step == AT:
        model[4].weight.grad *= 1e-3
        model[4].bias.grad *= 1e-3


def nan_gradient(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if step == AT:
        model[2].bias.grad[3] = float("nan")


def test_the_layer_whose_learning_rate_jumps_is_named() -> None:
    monitor, _ = train(alarms="default", fault=large_rate, metrics=metrics())
    event = monitor.alarms.events[0]
    assert (event.step, event.signal, event.place) == (AT, "update_norm", "2")
    assert event.score > 6
    assert "alarm in step 140 at 2: update norm" in event.message


def test_a_small_update_alarms_too() -> None:
    event = train(alarms="default", fault=large_gradient, metrics=metrics())[0].alarms.events[0]
    assert (event.step, event.signal, event.place) == (AT, "update_norm", "4")
    assert event.score < -6


def test_a_batch_of_wrong_labels_is_told_in_its_step() -> None:
    monitor, _ = train(alarms="default", flip=AT, metrics=metrics())
    event = monitor.alarms.events[0]
    assert event.step == AT
    assert event.score > 3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_that_outgrow_their_second_moment(device: str) -> None:
    """RMS_t of a group, of those whose elements are known, is that of all its elements."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999))
    stats: Any = ["update_norm", "rms_t", "grad_norm"]
    steps: dict[str, list[float]] = {"0": [], "2": []}
    heard: list[Any] = []
    trajectory = lipcore.Trajectory(source="optimizer", stats=stats, on_step=lambda first, arrays: heard.append(arrays))
    alarms = Alarms(signals=["rms_t"])
    with lipcore.Monitor(model, optimizer, metrics=[trajectory], alarms=alarms):
        for step in range(1, 151):
            x, y = torch.randn(64, 6).to(device), torch.randn(64, 1).to(device)
            nn.functional.mse_loss(model(x), y).backward()
            if step == AT:
                for parameter in model[2].parameters():
                    parameter.grad *= 100
            optimizer.step()
            for name, found in steps.items():
                terms = []
                for p in model[int(name)].parameters():
                    v = optimizer.state[p]["exp_avg_sq"].double() / (1 - 0.999**step)
                    terms.append((p.grad.double().square() / v.clamp(min=1e-16)).flatten())
                found.append(float(torch.cat(terms).mean().sqrt()))
            optimizer.zero_grad()
    for name, expected in steps.items():
        column = heard[0].places.index(name)
        got = [row for arrays in heard for row in arrays["rms_t"][:, column].tolist()]
        assert got == pytest.approx(expected, rel=1e-5)
    assert (alarms.events[0].step, alarms.events[0].signal, alarms.events[0].place) == (AT, "rms_t", "2")
    with pytest.raises(ValueError, match=r"alarms: rms_t comes from a Trajectory .* stats=\["):
        lipcore.Monitor(model, optimizer, metrics=[lipcore.Trajectory()], alarms=Alarms(signals=["rms_t"]))


def test_a_ratio_that_no_parameter_has_is_told_at_once() -> None:
    model = nn.Linear(2, 1)
    stats: Any = ["update_norm", "grad_norm", "rms_t"]
    with pytest.warns(RuntimeWarning, match=r"rms_t never alarms: .* keeps a second moment \(SGD has none\)"):
        lipcore.Monitor(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            metrics=[lipcore.Trajectory(source="optimizer", stats=stats)],
            alarms=Alarms(signals=["rms_t"]),
        )


def test_a_nan_is_told_with_its_parameter() -> None:
    monitor, _ = train(alarms="default", fault=nan_gradient, metrics=metrics())
    event = monitor.alarms.events[0]
    assert (event.step, event.signal, event.place) == (AT, "nonfinite", "2.bias")
    assert monitor.alarms.events[1].step == AT + 1  # the loss, which spoils the others
    assert monitor.alarms.events[1].place == "total"
    assert len(monitor.alarms.events) == 2


def test_a_schedule_alone_alarms_nobody() -> None:
    monitor, _ = train(alarms=Alarms(signals=["update_norm"]), schedule=True, metrics=metrics())
    assert not monitor.alarms.events
    assert monitor.alarms.rate == 0


def test_training_stays_bit_for_bit_the_same() -> None:
    heard: list[AlarmEvent] = []
    (_, plain), (_, watched) = (
        train(alarms=alarms, fault=large_rate, metrics=metrics()) for alarms in (None, Alarms(on_event=heard.append))
    )
    assert heard
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_on_event_raises_comes_with_the_next_call() -> None:
    steps = []

    def raises(event: AlarmEvent) -> None:
        raise ValueError(f"no, at {event.step}")

    def count(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        steps.append(step)
        large_rate(step, model, optimizer)

    with pytest.raises(ValueError, match=f"no, at {AT}"):  # of log(), or of the end of the block
        train(alarms=Alarms(on_event=raises), fault=count, metrics=metrics())
    assert steps[-1] >= AT


def test_what_is_done_about_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[AlarmEvent] = []
    with caplog.at_level(logging.WARNING, "lipcore"):
        alarms = Alarms(on_event=heard.append)
        monitor, _ = train(alarms=alarms, fault=large_rate, metrics=metrics(), run=tmp_path / "a")
    assert heard == monitor.alarms.events
    assert [record.message for record in caplog.records] == [event.message for event in heard]
    kept = lipcore.open_run(tmp_path / "a").events
    assert [(event.step, event.kind, event.text) for event in kept] == [(e.step, "alarm", e.message) for e in heard]
    assert kept[0].data == {"signal": "update_norm", "place": "2", "score": heard[0].score}
    assert " in 50 steps" in repr(alarms)
    assert f"step {AT}" in repr(alarms)
    assert "alarms" in repr(monitor)
    for twin in (copy.deepcopy(alarms), pickle.loads(pickle.dumps(alarms))):
        assert twin.events == heard


def test_a_training_stops_at_the_next_call() -> None:
    steps = []

    def count(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        steps.append(step)
        nan_gradient(step, model, optimizer)

    with pytest.raises(AlarmStop, match="not finite: gradient|not finite: parameter") as caught:
        train(400, alarms=Alarms(stop=True), fault=count, metrics=metrics())
    assert caught.value.event.step == AT
    assert AT <= steps[-1] <= AT + 64 + 1 + 64  # steps of less than 10 ms come in blocks
    assert pickle.loads(pickle.dumps(caught.value)).event == caught.value.event


def test_the_loss_alone_needs_no_trajectory() -> None:
    monitor, _ = train(alarms=Alarms(signals={"loss": 4.0}), flip=AT, metrics=[])
    assert [(event.step, event.signal, event.place) for event in monitor.alarms.events] == [(AT, "loss", "total")]


def test_a_loop_that_logs_nothing_has_the_other_signals() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    alarms = Alarms()
    with lipcore.Monitor(model, metrics=metrics(), alarms=alarms) as monitor:
        for step in range(1, 150):
            with torch.no_grad():
                model.weight += 0.01 * torch.randn(1, 4) * (30 if step == 140 else 1)
            monitor.step()
    assert alarms.events[0].step == 140


def test_a_rewind_takes_later_events_back() -> None:
    alarms = Alarms()
    model = nn.Linear(2, 1)
    with lipcore.Monitor(model, metrics=metrics(), alarms=alarms) as monitor:
        monitor.step()
        state = monitor.state_dict()
        with torch.no_grad():
            model.weight.fill_(float("nan"))
        monitor.step()
        monitor.state_dict()  # hands on what waits
        assert [event.step for event in alarms.events] == [2]
        with torch.no_grad():
            model.weight.fill_(0.0)
        monitor.load_state_dict(state)
        assert alarms.events == []


@pytest.mark.parametrize("arguments", [
    {"budget": 0}, {"budget": True}, {"budget": float("nan")}, {"budget": "1"}, {"signals": "loss"}, {"signals": 3},
    {"signals": []}, {"signals": ["los"]}, {"signals": {"loss": 0}}, {"signals": {"loss": True}}, {"on_event": 3},
    {"stop": 1}, {"least_multiplier": 0.0}, {"least_multiplier": 1.5}, {"least_multiplier": True},
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected "):
        Alarms(**arguments)


def test_alarms_that_a_monitor_cannot_have_are_refused() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"^alarms: expected 'default' or None, got 'all'; or an Alarms$"):
        lipcore.Monitor(model, alarms="all")
    with pytest.raises(ValueError, match=r"^alarms: update_norm and grad_norm come from a Trajectory"):
        lipcore.Monitor(model, metrics=[], alarms="default")
    with pytest.raises(ValueError, match=r"^alarms: they look at every step"):
        lipcore.Monitor(model, metrics=[lipcore.Trajectory(every_steps=2)], alarms="default")
    alarms = Alarms()
    lipcore.Monitor(model, metrics=metrics(), alarms=alarms).close()
    with pytest.raises(ValueError, match=r"^alarms: these Alarms belong to another Monitor"):
        lipcore.Monitor(model, metrics=metrics(), alarms=alarms)
