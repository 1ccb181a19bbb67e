"""A path around the first layer that appears while training: what was taken since the last check is not left exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor
from lipcore.metric.results import Value, Window


class Detour(nn.Module):
    """An MLP that comes to use its input past the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1)
        self.on = False

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.tanh(self.a(x)))
        return out + x.sum(1, keepdim=True) if self.on else out


def constants(model: nn.Module, x: Tensor) -> Tensor:
    """Return the norm of the gradient at every sample's input, one at a time, in float64."""
    found = []
    for sample in x.double():
        at = sample[None].requires_grad_()
        copy = Detour().double()
        copy.load_state_dict(model.state_dict())
        copy.on = model.on
        found.append(torch.autograd.grad(copy(at).sum(), at)[0].norm())
    return torch.stack(found)


def test_windows_since_the_last_check_lose_their_lambdas_and_the_user_is_told() -> None:
    torch.manual_seed(0)
    model = Detour()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(6, 3)
    metric = Lipschitz(lambda_every=1)
    monitor = Monitor(model, optimizer, [metric], window_steps=10)
    taken: list[Tensor] = []

    def step() -> None:
        taken.append(constants(model, x))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    def mean(of: Window) -> Value:
        value: Value = of["lipschitz"].local_lipschitz["model"].mean
        return value

    for _ in range(15):
        step()
    assert mean(monitor.history[0]).value == pytest.approx(float(torch.cat(taken[:10]).mean()), rel=1e-6)
    model.on = True
    with pytest.warns(UserWarning, match="come to depend on the input past 'a'"):
        while metric._at_input.by_product:  # how often it is checked depends on the time that this takes
            step()
    noticed = len(taken)
    while len(taken) % 10 or len(taken) < noticed + 10:
        step()
    windows = list(monitor.history)
    assert len(windows) == len(taken) // 10
    for window in windows[1 : (noticed - 1) // 10]:
        assert math.isnan(mean(window).value)
        assert not mean(window).valid
        assert "a later check did not agree" in mean(window).note
        assert math.isfinite(window["lipschitz"].normalized_gradient_norm["model"].mean.value)
    assert mean(windows[-1]).value == pytest.approx(float(torch.cat(taken[-10:]).mean()), rel=1e-6)
    monitor.close()


@pytest.mark.parametrize("fault", [lambda out: out["x"], lambda out: 1 / 0])
def test_a_function_of_the_output_that_raises_does_so_in_the_next_call_of_the_monitor(fault: object) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, [Lipschitz(output=fault)])
    with pytest.warns(RuntimeWarning, match="output: the function raises"):
        model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"output: the function raises \w+Error: .*, given a Tensor"):
        monitor.compute()
    monitor.close()
