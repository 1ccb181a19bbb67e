"""Corollaries 2 and 3 of a first layer without a bias: the same as of one whose bias is kept at 0 in the forward
pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor, Trajectory, theory
from lipcore.metric.results import History

RATE, SIZE = 0.02, 8

pytestmark = pytest.mark.filterwarnings("ignore:the parameters moved after SGD.step")  # the twin's bias is taken back


def trained(*, bias: bool, optimizer: Any = None, batch: int = 1, **settings: Any) -> tuple[Any, list[float], Tensor]:
    """A Monitor, |dl/dyhat| of each step, and the points of a bias whose updates are taken out again."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 1)).double()
    model = plain
    if bias:
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        model.load_state_dict(plain.state_dict() | {"0.bias": torch.zeros(4)})
    torch.manual_seed(1)
    x, y = torch.randn(SIZE, 5).double(), torch.randn(SIZE, 1).double()
    optimizer = (optimizer or (lambda p: torch.optim.SGD(p, lr=RATE)))(model.parameters())
    metrics = [Trajectory(), Lipschitz(lambda_every=1, **settings)]
    eps, points = [], [torch.zeros(4).double()]
    with Monitor(model, optimizer, metrics=metrics) as monitor:
        for xs, ys in zip(x.split(batch), y.split(batch), strict=True):
            optimizer.zero_grad()
            out = model(xs)
            out.retain_grad()
            ((out - ys).square().sum() / 2).backward()
            optimizer.step()
            eps.append(float(out.grad.abs().max()))
            if bias:
                points.append(points[-1] + model[0].bias.detach())
                with torch.no_grad():
                    model[0].bias.zero_()
        monitor.close_window()
    return monitor, eps, torch.stack(points)


def test_the_corollaries_hold_of_the_virtual_bias() -> None:
    monitor, eps, _ = trained(bias=False, virtual_bias=True)
    _, _, points = trained(bias=True)
    found = theory.bias_variance(monitor.history, "0.bias", eps=eps)
    moves = points.diff(dim=0).norm(dim=1)
    variance = float((points - points.mean(0)).square().sum() / (SIZE + 1))
    assert found.variance.value == pytest.approx(variance, rel=1e-6)
    assert found.variance_over_lr_sq.value == pytest.approx(variance / RATE**2, rel=1e-6)
    assert found.lower.value == pytest.approx(SIZE / (4 * (SIZE + 1)) * float(moves.mean()) ** 2, rel=1e-6)
    assert found.lower.valid
    assert found.lower_lipschitz.valid
    assert 0 < found.lower_lipschitz.value <= found.lower.value <= found.variance.value
    assert "virtual: '0' has no bias" in found.variance.note
    far = theory.bias_distance(monitor.history, "0.bias", eps_max=max(eps))
    assert far.distance.value == pytest.approx(float(points[-1].norm()), rel=1e-6)
    assert far.length.value == pytest.approx(float(moves.sum()), rel=1e-6)
    assert far.bound.valid
    assert far.bound.value >= far.length.value >= far.distance.value


def test_they_are_there_after_a_record_was_read_again() -> None:
    monitor, eps, _ = trained(bias=False, virtual_bias=True)
    again = History.from_dict(monitor.history.to_dict())
    one, other = (theory.bias_variance(history, "0.bias", eps=eps) for history in (monitor.history, again))
    assert one == other
    window = copy.deepcopy(monitor.history[-1])
    assert theory.bias_variance(window, "0.bias", eps=eps) == one


def test_larger_batches_leave_the_bound_by_the_steps_alone() -> None:
    monitor, _, _ = trained(bias=False, virtual_bias=True, batch=4)
    found = theory.bias_variance(monitor.history, "0.bias", eps=[1.0, 1.0])
    assert found.lower.valid
    assert not found.lower_lipschitz.valid
    assert "batch 1" in found.lower_lipschitz.note


def test_a_virtual_bias_that_was_not_followed_is_refused_by_name() -> None:
    with pytest.warns(UserWarning, match="does not follow the virtual bias"):
        monitor, _, _ = trained(bias=False, virtual_bias=True, optimizer=torch.optim.Adam)
    with pytest.raises(ValueError, match=r"parameter: '0.bias' was not followed: .* stepped by Adam"):
        theory.bias_variance(monitor.history, "0.bias")
    with pytest.raises(ValueError, match="parameter: update_norm has no '0.bias'"):
        theory.bias_variance(trained(bias=False)[0].history, "0.bias")


def test_a_bias_of_its_own_is_the_trajectorys() -> None:
    with pytest.warns(UserWarning, match=r"Trajectory\(\) follows '0.bias'"):
        monitor, _, _ = trained(bias=True, virtual_bias=True)
    found = theory.bias_variance(monitor.history, "0.bias")
    assert found.variance.value == monitor.history[-1]["trajectory"].variance["0.bias"].last.value
