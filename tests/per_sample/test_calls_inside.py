"""What a model's forward pass may do beside: call the model itself, or call backward()."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from few import few
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore import Lipschitz, Monitor, PerSampleGradNorms

B, C = 4, 3


class Calling(nn.Module):
    """Calls itself by a function."""

    def __init__(self, call: Callable[[Calling, Tensor, int], Tensor], outputs: int = C) -> None:
        super().__init__()
        self.call = call
        self.body, self.head, self.weight = nn.Linear(6, 6), nn.Linear(6, outputs), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor, deep: int = 2) -> Tensor:
        return self.call(self, x, deep)


def leaf(model: Calling, x: Tensor) -> Tensor:
    y: Tensor = model.head(((model.body(x)).tanh() @ model.weight).tanh())
    return y


def tree(model: Calling, x: Tensor, deep: int) -> Tensor:
    return leaf(model, x) if not deep else model(x * 0.5, deep - 1) + model(x * 2, deep - 1)


def chain(model: Calling, x: Tensor, deep: int) -> Tensor:
    return leaf(model, x) if not deep else model(model.body(x).tanh(), deep - 1)


def views(model: Calling, x: Tensor, deep: int) -> Tensor:
    return leaf(model, x) if not deep else 0.5 * model(x, 0) + 0.5 * model(x.flip(1), 0)


def conditioned(model: Calling, x: Tensor, deep: int) -> Tensor:
    return leaf(model, x) if not deep else leaf(model, x + model(x, 0).detach().sum(1, keepdim=True))


def caught(model: Calling, x: Tensor, deep: int) -> Tensor:
    """The inner call raises, which the outer one knows."""
    if not deep:
        raise KeyError
    try:
        return model(x, 0)
    except KeyError:
        return leaf(model, x)


CALLS = {"tree": tree, "chain": chain, "views": views, "conditioned": conditioned, "caught": caught}


def norms_one_by_one(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    double, found = copy.deepcopy(model).double(), []
    for i in range(B):
        gradients = torch.autograd.grad(
            F.cross_entropy(double(x[i : i + 1].double()), labels[i : i + 1]), list(double.parameters())
        )
        found.append(sum(float(g.square().sum()) for g in gradients) ** 0.5)
    return torch.tensor(found).double()


@pytest.mark.parametrize("name", few(CALLS, 3))
def test_a_model_that_calls_itself(name: str) -> None:
    torch.manual_seed(0)
    model = Calling(CALLS[name])
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        for _ in range(2):
            x, labels = torch.randn(B, 6), torch.randint(C, (B,))
            F.cross_entropy(model(x), labels).backward()
            torch.testing.assert_close(norms.per_sample, norms_one_by_one(model, x, labels), rtol=1e-5, atol=1e-7)
            assert not norms.unproved
        with pytest.raises(ZeroDivisionError):
            model(x, 1 / 0)  # type: ignore[arg-type]
        F.cross_entropy(model(x), labels).backward()
        torch.testing.assert_close(norms.per_sample, norms_one_by_one(model, x, labels), rtol=1e-5, atol=1e-7)


def test_lipschitz_constants_of_a_model_that_calls_itself() -> None:
    def sum_of(model: Calling, x: Tensor, deep: int) -> Tensor:
        return model.head(model.body(x).tanh()) if not deep else model(x * 0.5, 0) + model(x * 2, 0)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Calling(sum_of, 1), torch.randn(B, 6, requires_grad=True)
    model.weight.requires_grad_(False)
    with Lipschitz(model, input="") as metric:
        model(x).square().mean().backward()
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
        torch.testing.assert_close(metric.per_sample.local_lipschitz.float(), gradient.norm(dim=1))  # type: ignore[union-attr]


class Local(nn.Module):
    """Has a loss of its own, whose backward pass its forward pass calls."""

    def __init__(self, *, raw: bool, clears: bool = False) -> None:
        super().__init__()
        self.clears = clears
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, C)
        self.weight = nn.Parameter(torch.randn(6, 6)) if raw else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).tanh()
        if self.clears:
            self.zero_grad()
        with torch.enable_grad():
            h.square().mean().backward()
        h = h.detach() if self.weight is None else h.detach() @ self.weight
        y: Tensor = self.head(h)
        return y


@pytest.mark.filterwarnings("ignore:lipcore stopped recording")
@pytest.mark.parametrize("clears", [False, True])
@pytest.mark.parametrize("raw", [False, True])
def test_a_backward_pass_inside_adds_to_the_gradients_once(raw: bool, clears: bool) -> None:
    torch.manual_seed(0)
    model, x, labels = Local(raw=raw, clears=clears), torch.randn(B, 6), torch.randint(C, (B,))
    plain = copy.deepcopy(model)
    F.cross_entropy(plain(x), labels).backward()
    norms = PerSampleGradNorms(model, loss_reduction="mean")
    F.cross_entropy(model(x), labels).backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    if raw:
        with pytest.raises(ValueError, match=r"'weight'.*its forward pass calls backward\(\) itself"):
            _ = norms.per_sample
    norms.close()


def test_lazy_modules_are_refused_before_their_first_call() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"parameter '0\.weight' is uninitialised.*on one batch first"):
        PerSampleGradNorms(model, loss_reduction="mean")
    with pytest.raises(ValueError, match=r"parameter '0\.weight' is uninitialised.*on one batch first"):
        Monitor(model, torch.optim.SGD(model.parameters(), 0.1))
    model(torch.randn(2, 3))
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        model(torch.randn(2, 3)).mean().backward()
        assert norms.per_sample.shape == (2,)
