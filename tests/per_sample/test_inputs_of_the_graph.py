"""The graph of a pass is compared with one on one sample more, whose input lies in memory, and begins, as its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from few import few
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lipcore import Lipschitz, Monitor, PerSampleGradNorms

B, T, D, C = 5, 4, 6, 3


class Mixed(nn.Module):
    """A layer with a rule, one without, and a parameter of its own."""

    def __init__(self, first: Callable[[Mixed, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.way, self.head = nn.Linear(D, D), nn.Parameter(torch.randn(D, D) * 0.4), nn.Linear(D, C)
        self.scale, self.first = nn.Parameter(torch.rand(D) + 1.5), first

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head((self.first(self, x).tanh() @ self.way).tanh().mean(1))
        return y


def scaled(model: Mixed, x: Tensor) -> Tensor:
    weight = {"weight": model.layer.weight * model.scale[:, None]}
    y: Tensor = functional_call(model.layer, weight, (x,))
    return y


FIRST: dict[str, Callable[[Mixed, Tensor], Tensor]] = {
    "layer": lambda model, x: model.layer(x),
    "product": lambda model, x: x @ model.way,
    "transposed": lambda model, x: model.layer(x.transpose(1, 2).transpose(1, 2) * 2),
    "norm": lambda _, x: F.layer_norm(x, (D,)),
    "functional_call": scaled,
}
LAID_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "cut": lambda x: torch.cat([x, x], -1)[..., :D],
    "as it is": lambda x: x,
}
CASES = [
    *((first, "as it is", True) for first in FIRST),
    *(("layer", laid, False) for laid in LAID_OUT),
    *((first, laid, lipschitz) for first in FIRST for laid in LAID_OUT for lipschitz in (False, True)),
]


def one_by_one(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    double, found = copy.deepcopy(model).double(), []
    for i in range(B):
        loss = F.cross_entropy(double(x[i : i + 1].double()), labels[i : i + 1])
        gradients = torch.autograd.grad(loss, list(double.parameters()), allow_unused=True)
        found.append(sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5)
    return torch.tensor(found).double()


@pytest.mark.parametrize("case", few(CASES, 8), ids=str)
def test_norms(case: tuple[str, str, bool]) -> None:
    first, laid, lipschitz = case
    torch.manual_seed(0)
    model, norms = Mixed(FIRST[first]), PerSampleGradNorms(loss_reduction="mean")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    metrics: list[Any] = [*([Lipschitz()] if lipschitz else []), norms]
    with Monitor(model, optimizer, metrics, window_steps=None):
        for _ in range(2):
            x, labels = LAID_OUT[laid](torch.randn(B, T, D)), torch.randint(C, (B,))
            expected = one_by_one(model, x, labels)
            F.cross_entropy(model(x), labels).backward()
            torch.testing.assert_close(norms.per_sample, expected, rtol=1e-5, atol=1e-7)
            assert not norms.unproved
            optimizer.step()
            optimizer.zero_grad()


class Timed(nn.Module):
    """Has a second input of real numbers (the time of a diffusion)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.way, self.head = nn.Linear(D, D), nn.Parameter(torch.randn(D, D) * 0.4), nn.Linear(D, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y: Tensor = self.head((self.layer(x) * time[:, None]).tanh() @ self.way)
        return y


def test_lipschitz_beside_and_a_second_input() -> None:
    torch.manual_seed(0)
    model, norms = Timed(), PerSampleGradNorms(loss_reduction="sum")
    with Monitor(model, torch.optim.SGD(model.parameters(), 0.1), [Lipschitz(), norms], window_steps=None):
        x, time = torch.randn(B, D), torch.rand(B)
        model(x, time).square().sum().backward()
        found = norms.per_sample
    for i, norm in enumerate(found):
        loss = model(x[i : i + 1], time[i : i + 1]).square().sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert float(norm) == pytest.approx(sum(float(g.square().sum()) for g in gradients) ** 0.5, rel=1e-5)


def test_weights_computed_for_a_call_in_several_passes_before_one_backward_pass() -> None:
    """Sums of samples' gradients tell nothing there."""
    torch.manual_seed(0)
    model = Mixed(scaled)
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        batches = [(torch.randn(B, T, D), torch.randint(C, (B,))) for _ in range(2)]
        expected = [one_by_one(model, *batch) for batch in batches]
        sum(F.cross_entropy(model(x), labels) for x, labels in batches).backward()  # type: ignore[union-attr]
        assert any(torch.allclose(norms.per_sample, each, rtol=1e-5) for each in expected)


def test_the_first_batch_may_be_empty() -> None:
    model = Mixed(FIRST["layer"])
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        for size in (0, B, 0):
            model(torch.randn(size, T, D)).square().sum().backward()
            assert norms.per_sample.shape == (size,)
            assert not norms.coverage().uncovered


def test_an_input_with_the_negative_bit_is_the_same_to_the_model() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1))
    x = torch.randn(B, D, dtype=torch.cfloat).conj().imag
    assert x.is_neg()
    plain = model(x)
    with Lipschitz(model):
        assert torch.equal(model(x), plain)
