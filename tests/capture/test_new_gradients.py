"""A gradient that no layer's call has brought is noticed at the first pass, also where there was one of an earlier pass
(zero_grad(set_to_none=False), accumulation, zero_grad() behind the forward pass); an old one is not taken for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lipcore import PerSampleGradNorms

BEFORE = ("none", "zeros", "accumulated", "zeroed late")


class Hidden(nn.Module):
    """A reentrant checkpoint's graph is made in the backward pass, in which a weight is used past its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.hidden = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 8)

    def body(self, h: Tensor) -> Tensor:
        found: Tensor = self.b(torch.tanh(F.linear(h, self.hidden.weight, self.hidden.bias)))
        return found

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.body, torch.tanh(self.a(x)), use_reentrant=True)
        return found


class Heads(nn.Module):
    """Two heads, of which a pass uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.head = "c"

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = getattr(self, self.head)(torch.tanh(self.a(x)))
        return found


def passes(model: Any, before: str, x: Tensor) -> Tensor:
    """The norms of the first pass that is recorded, with gradients of one before."""
    if before != "none":
        model(x).square().mean().backward()
    if before == "zeros":
        model.zero_grad(set_to_none=False)
    if isinstance(model, Heads):
        model.head = "b"
    with PerSampleGradNorms(model, loss_reduction="mean", prove=False) as norms:
        loss = model(x).square().mean()
        if before == "zeroed late":
            model.zero_grad(set_to_none=False)
        loss.backward()
        return norms.per_sample


@pytest.mark.parametrize("before", BEFORE)
def test_a_gradient_from_elsewhere(before: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="'hidden.weight': has a gradient, but none came from its layer's hooks"):
        with pytest.warns(RuntimeWarning, match="stopped recording"):
            passes(Hidden(), before, torch.randn(4, 6))


@pytest.mark.parametrize("before", BEFORE)
def test_an_old_gradient(before: str) -> None:
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(4, 6)
    found = passes(model, before, x)
    for i, norm in enumerate(found.tolist()):
        model.zero_grad()
        model(x[i : i + 1]).square().mean().backward()
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        assert norm == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-5)


@pytest.mark.parametrize("before", ["none", "zeros"])
def test_a_gradient_that_forward_gives(before: str) -> None:
    class Giving(Heads):
        def forward(self, x: Tensor) -> Tensor:
            grad = torch.ones_like(self.c.weight)
            self.c.weight.grad = grad if self.c.weight.grad is None else self.c.weight.grad.add_(grad)
            return super().forward(x)

    with pytest.raises(ValueError, match=r"'c.weight': forward\(\) itself gives it a gradient"):
        with pytest.warns(RuntimeWarning, match="stopped recording"):
            passes(Giving(), before, torch.randn(4, 6))
