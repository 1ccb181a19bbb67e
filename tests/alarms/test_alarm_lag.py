"""An alarm comes at most two steps after its step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lipcore
from lipcore.alarms import Alarms, AlarmStop

pytestmark = pytest.mark.usefixtures("slow_steps")
AT = 110


def train(device: str, alarms: Alarms, *, log: bool | int, steps: int = AT + 5) -> list[int]:
    """Return after which step each alarm was there; `log`: of how many steps the loss is logged in one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(64, 6).to(device)
    seen: list[int] = []
    with lipcore.Monitor(model, optimizer, [lipcore.Trajectory()], alarms=alarms) as monitor:
        for step in range(1, steps + 1):
            loss = nn.functional.mse_loss(model(x), x[:, :1].sin())
            if log and step % log == 1 % log:
                monitor.log(loss=loss)
            loss.backward()
            if step == AT:
                model[2].weight.grad.mul_(1e3)
            optimizer.step()
            optimizer.zero_grad()
            seen += [step] * (len(alarms.events) - len(seen))
    return seen


@pytest.mark.parametrize("log", [True, False, 50])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_lag(device: str, log: bool | int) -> None:
    alarms = Alarms()
    seen = train(device, alarms, log=log)
    assert (alarms.events[0].step, alarms.events[0].place) == (AT, "2")
    assert seen[0] <= AT + 2


def test_a_loss_that_is_seldom_logged_is_looked_at_when_it_comes() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alarms, seen = Alarms(), []
    with lipcore.Monitor(model, optimizer, [lipcore.Trajectory()], alarms=alarms) as monitor:
        for step in range(1, 100):
            if step % 30 == 1:
                monitor.log(loss=float("nan") if step == 61 else 1.0)
            model(torch.ones(3, 2)).sum().backward()
            optimizer.step()
            seen += [step] * (len(alarms.events) - len(seen))
    assert [event.step for event in alarms.events] == [61]
    assert seen[0] <= 63


def test_the_loop_stops_in_the_step_after() -> None:
    alarms = Alarms(stop=True)
    with pytest.raises(AlarmStop) as stop:
        train("cpu", alarms, log=True)
    assert stop.value.event.step == AT
