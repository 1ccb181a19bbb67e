"""The noise scale beside parameters that are found in a pass to be not measurable: it is that of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lipcore import Monitor, PerSampleGradNorms


class Times(torch.autograd.Function):
    """Product whose backward pass cannot be run once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum(0)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Times.apply(x, self.weight)
        return found


def window(*, frozen: bool) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Odd(), nn.Tanh(), nn.Linear(8, 1)).double()
    model[1].requires_grad_(not frozen)
    metric = PerSampleGradNorms(loss_reduction="mean", on_unsupported="skip")
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[3].parameters()], lr=0.05)
    with Monitor(model, optimizer, metrics=[metric]) as monitor:
        for _ in range(4):
            model.zero_grad()
            nn.functional.mse_loss(model(torch.randn(5, 6).double()), torch.randn(5, 1).double()).backward()
            optimizer.step()
        return monitor.compute()["per_sample_grad_norm"]


def test_a_parameter_that_turns_out_not_to_be_measurable_is_in_no_sum() -> None:
    found, expected = window(frozen=False), window(frozen=True)
    assert "1.weight" in found.details["not_covered"]
    assert found.details["noise_scale_skipped"] == {}
    for quantity in ("gradient_sq", "gradient_noise", "noise_scale"):
        values, others = getattr(found, quantity)["total_of_measured"], getattr(expected, quantity)["total"]
        assert abs(values.mean.value - others.mean.value) <= 1e-12 * abs(others.mean.value)
