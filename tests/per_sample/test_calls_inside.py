"""What a model's forward pass may do beside: call the model itself, or call backward()."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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


def in_a_pool(model: Calling, x: Tensor, deep: int) -> Tensor:
    if not deep:
        return leaf(model, x)
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(lambda part: model(part, 0), [x * 0.5, x * 2]), torch.zeros(()))


def in_one_thread(model: Calling, x: Tensor, deep: int) -> Tensor:
    if not deep:
        return leaf(model, x)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(model, x, 0).result() + leaf(model, x * 2)


@pytest.mark.parametrize("call", few([in_one_thread, in_a_pool], 1))
def test_calls_in_another_thread_have_no_numbers_and_a_reason(call: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model, plain = Calling(call), Calling(leaf_of_two)
    plain.load_state_dict(model.state_dict())
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        for _ in range(2):
            F.cross_entropy(model(torch.randn(B, 6)), torch.randint(C, (B,))).backward()
            assert norms.per_sample.isnan().all()
            assert "make these calls in the thread of the forward pass" in norms.broken
        assert not norms.compute().norm["total"].mean.valid
    with PerSampleGradNorms(plain, loss_reduction="mean") as norms:  # as the reason says
        x, labels = torch.randn(B, 6), torch.randint(C, (B,))
        F.cross_entropy(plain(x), labels).backward()
        torch.testing.assert_close(norms.per_sample, norms_one_by_one(plain, x, labels), rtol=1e-5, atol=1e-7)


def leaf_of_two(model: Calling, x: Tensor, deep: int) -> Tensor:
    return leaf(model, x) if not deep else model(x, 0) + leaf(model, x * 2)


def test_lipschitz_constants_of_calls_in_another_thread_are_not_recorded() -> None:
    torch.manual_seed(0)
    model = Calling(in_one_thread, 1)
    with Lipschitz(model, input="") as metric:
        model(torch.randn(B, 6)).square().mean().backward()
        found = metric.compute()
        assert found.local_lipschitz["model"].mean.count == 0
        assert any("in another thread" in why for why in found.details["unrecorded_because"])


def test_threads_that_train_one_model_at_once_are_apart() -> None:
    """One begins and ends within the other's forward pass, which it is no part of."""
    torch.manual_seed(0)
    others: list[Tensor] = []

    def beside(model: Calling, x: Tensor, deep: int) -> Tensor:
        if deep == 1:
            with ThreadPoolExecutor(1) as pool:
                others.append(pool.submit(model, x * 3, 0).result())
        return leaf(model, x)

    model, x, labels = Calling(beside), torch.randn(B, 6), torch.randint(C, (B,))
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        output = model(x, 1)
        quiet = copy.deepcopy(model)
        quiet.call = lambda model, x, deep: leaf(model, x)
        expected = [norms_one_by_one(quiet, given, labels) for given in (x, x * 3)]
        for found, right in ((output, expected[0]), (others[0], expected[1])):
            F.cross_entropy(found, labels).backward()
            torch.testing.assert_close(norms.per_sample, right, rtol=1e-5, atol=1e-7)
            assert not norms.broken


class Given(nn.Module):
    """Gives a parameter its gradient in the forward pass."""

    def __init__(self, *, inside: bool, used: bool) -> None:
        super().__init__()
        self.inside, self.used = inside, used
        self.body, self.head, self.shift = nn.Linear(6, 6), nn.Linear(6, C), nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        if self.inside:
            self.shift.grad = torch.ones(C)
        y: Tensor = self.head(self.body(x).tanh())
        return y + self.shift if self.used else y


@pytest.mark.parametrize(("inside", "used"), [(True, False), (True, True), (False, False)])
def test_a_gradient_that_is_given_inside_is_named_where_nothing_else_brings_one(inside: bool, used: bool) -> None:
    torch.manual_seed(0)
    model, x, labels = Given(inside=inside, used=used), torch.randn(B, 6), torch.randint(C, (B,))
    norms = PerSampleGradNorms(model, loss_reduction="mean")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        F.cross_entropy(model(x), labels).backward()
    if inside and not used:
        with pytest.raises(ValueError, match=r"'shift': forward\(\) itself gives it a gradient.*after the loss's"):
            _ = norms.per_sample
    else:
        model.shift.grad = torch.ones(C)  # as the reason says
        assert norms.per_sample.isfinite().all()
        assert not norms.broken
        assert not norms.unproved
    norms.close()


class Inner(nn.Module):
    """Makes steps along the gradient of its own activations, by a backward pass into these alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.weight = nn.Linear(6, 6), nn.Linear(6, C), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).tanh() @ self.weight
        with torch.enable_grad():
            z = h.detach().requires_grad_()
            z.square().sum().backward(inputs=[z])
        assert z.grad is not None
        y: Tensor = self.head(h - 0.1 * z.grad)
        return y


def test_a_backward_pass_into_activations_alone_is_no_matter() -> None:
    torch.manual_seed(0)
    model, x, labels = Inner(), torch.randn(B, 6), torch.randint(C, (B,))
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        F.cross_entropy(model(x), labels).backward()
        torch.testing.assert_close(norms.per_sample, norms_one_by_one(model, x, labels), rtol=1e-5, atol=1e-7)
        assert not norms.unproved


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
