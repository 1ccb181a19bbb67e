"""Compiled models with parameters that are used more than once: the uses are joined in the region's own backward pass,
where there is one region; else the parameter is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from per_sample_models import assert_equal, made, sum_loss, weights
from per_sample_oracle import assert_norms, norms_sq, samples_of
from tied_models import TIED, TOKENS, Case
from torch import Tensor, nn

from lipcore import PerSampleGradNorms, layers
from lipcore.layers import registry

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]
each_model = pytest.mark.parametrize(
    "name", [name if name == "small" else pytest.param(name, marks=pytest.mark.ci) for name in TIED]
)


def compiled(inner: nn.Module, backend: str = "aot_eager", **options: Any) -> Any:
    return torch.compile(inner, fullgraph=True, backend=backend, **options)


def trained(case: Case, backend: str, sizes: tuple[int, ...], watched: bool) -> list[Tensor]:
    """Train a compiled model; each step's norms are those of the oracle."""
    torch._dynamo.reset()
    inner = made(case.build).double()
    model = compiled(inner, backend)
    optimizer = torch.optim.SGD(inner.parameters(), lr=1e-2)
    metric = PerSampleGradNorms(model, loss_reduction="sum", **case.options) if watched else None
    torch.manual_seed(1)
    for size in sizes:
        inputs = case.inputs(size)
        expected = norms_sq(inner, samples_of(inputs, size), sum_loss) if watched else {}
        optimizer.zero_grad()
        sum_loss(model(*inputs)).backward()
        if metric is not None:
            assert_norms(metric, expected)
        optimizer.step()
    if metric is not None:
        metric.close()
    return weights(inner)


def check(name: str, backend: str, sizes: tuple[int, ...]) -> None:
    assert_equal(trained(TIED[name], backend, sizes, True), trained(TIED[name], backend, sizes, False))


@each_model
def test_norms_and_training(name: str, fresh_dynamo: Any) -> None:
    """The third size of the batch is compiled for no more."""
    check(name, "aot_eager", (3, 4, 5))
    assert not fresh_dynamo["graph_break"]


@each_model
def test_without_a_compiler_behind_the_graph(name: str) -> None:
    check(name, "eager", (3, 4))


@pytest.mark.ci
@pytest.mark.parametrize("name", TIED)
def test_inductor(name: str, fresh_dynamo: Any) -> None:
    check(name, "inductor", (3, 3, 4) if name == "small" else (3, 3))
    assert not fresh_dynamo["graph_break"]


def test_the_graph_may_be_walked_twice(fresh_dynamo: Any) -> None:
    """An autograd.grad that reaches some of the uses, and a backward pass after it."""
    for backend in ("eager", "aot_eager"):
        case = TIED["small"]
        inner = made(case.build)
        model, inputs = compiled(inner, backend), case.inputs(3)
        expected = norms_sq(inner, samples_of(inputs, 3), sum_loss)
        with PerSampleGradNorms(model, loss_reduction="sum") as metric:
            loss = sum_loss(model(*inputs))
            torch.autograd.grad(loss, [inner.norm.weight], retain_graph=True)
            for _ in range(2):
                loss.backward(retain_graph=True)
                assert_norms(metric, expected)


def test_uses_that_nearly_cancel_keep_their_digits() -> None:
    """As the eager model's: E + H is a thousandth of either."""

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 5), nn.Linear(5, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            once = self.embedding(ids)
            eye = nn.functional.one_hot(ids, 5).to(once.dtype)
            return once - 1.001 * (eye @ self.head(torch.eye(5, dtype=once.dtype).expand(len(ids), 5, 5)).mT)

    inner, ids = made(Cancelling), torch.arange(5).repeat(2, 1)[:, :4]

    def loss(y: Tensor) -> Tensor:
        return (y * torch.linspace(0.3, 0.9, 5, dtype=y.dtype)).sum()

    expected = norms_sq(inner, samples_of((ids,), 2), loss)
    model = compiled(inner)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        loss(model(ids)).backward()
        assert_norms(metric, expected, 1e-3)  # of float32 squares, the difference is wrong by a tenth


def test_the_pass_in_eager_mode_draws_no_random_numbers_of_the_loop_and_leaves_buffers() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.dropout = nn.Linear(5, 5), nn.Dropout(0.3)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            y: Tensor = self.dropout(self.linear(x))
            return y

    trained = []
    for watched in (True, False):
        torch._dynamo.reset()
        inner = made(Random)
        model = compiled(inner)
        metric = PerSampleGradNorms(model, loss_reduction="sum") if watched else None
        for _ in range(3):
            sum_loss(model(torch.randn(4, 5))).backward()
        assert metric is None or bool(metric.per_sample.isfinite().all())
        trained.append([p.grad for p in inner.parameters()] + [inner.count, torch.rand(1)])
    assert_equal(*trained)


# ---- what cannot be joined is said


class Broken(nn.Module):
    """Two regions, each with a use of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(TOKENS, 6), nn.Linear(6, TOKENS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).tanh()
        torch._dynamo.graph_break()
        y: Tensor = self.head(x)
        return y


def test_two_regions_are_refused_by_name() -> None:
    model = torch.compile(made(Broken), backend="aot_eager")
    said = r"modules 'embedding' \(Embedding\) \+ 'head' \(Linear\): the same parameter .* fullgraph=True"
    with pytest.raises(ValueError, match=said):
        with PerSampleGradNorms(model, loss_reduction="sum"):
            with pytest.warns(RuntimeWarning, match="stopped recording"):
                sum_loss(model(torch.randint(TOKENS, (3, 4)))).backward()


def test_two_regions_of_a_backend_that_leaves_autograd_alone() -> None:
    inner, ids = made(Broken), torch.randint(TOKENS, (3, 4))
    model = torch.compile(inner, backend="eager")
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        sum_loss(model(ids)).backward()
        assert_norms(metric, norms_sq(inner, samples_of((ids,), 3), sum_loss))


class Borrowed(nn.Module):
    """An embedding whose weight a function is given, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(TOKENS, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.linear(self.embedding(ids)), self.embedding.weight)


def test_a_weight_that_a_function_is_given_is_refused_by_name() -> None:
    model = compiled(made(Borrowed))
    with pytest.raises(ValueError, match=r"'embedding.weight': is used 2 times .* F\.linear is given it directly"):
        with PerSampleGradNorms(model, loss_reduction="sum"):
            with pytest.warns(RuntimeWarning, match="stopped recording"):
                sum_loss(model(torch.randint(TOKENS, (3, 4)))).backward()


class Outside(nn.Module):
    """The embedding is eager, once or twice; the head compiled."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.embedding, head = nn.Embedding(TOKENS, 6), nn.Linear(6, TOKENS, bias=False)
        head.weight = self.embedding.weight
        self.head, self.calls = torch.compile(head, backend="aot_eager"), calls

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.stack([self.embedding(ids).tanh() for _ in range(self.calls)]).sum(0))
        return y


@pytest.mark.parametrize("calls", [1, 2])
def test_an_eager_use_beside_a_compiled_one_has_no_number(calls: int) -> None:
    model = made(lambda: Outside(calls))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        sum_loss(model(torch.randint(TOKENS, (3, 4)))).backward()
        assert bool(metric.per_sample.isnan().all())
        assert "parameter 'embedding.weight' was used again" in metric.broken


class Odd(nn.Linear):
    pass


class OddRule(layers.Rule):
    """A rule that saves what no graph can hold."""

    def save(self, module: Any, arguments: Any, keywords: Any, batch: Any) -> Any:
        return (arguments[0],), {"batch": batch}

    def factors(self, module: Any, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, layers.Factor]:
        batch = extra["batch"]
        grad = batch.tokens(grad_output)
        return {"weight": layers.Outer(batch.tokens(saved[0]), grad), "bias": layers.RowSum(grad)}


@pytest.mark.parametrize("calls", [1, 2])
def test_a_rule_that_saves_objects_serves_one_call(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = Odd(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(calls):
                x = self.odd(x).tanh()
            return x

    layers.register(Odd, OddRule())
    inner, x = made(Model), torch.randn(3, 5)
    model = compiled(inner)
    metric = PerSampleGradNorms(model, loss_reduction="sum")
    if calls == 1:
        sum_loss(model(x)).backward()
        assert_norms(metric, norms_sq(inner, samples_of((x,), 3), sum_loss))
        metric.close()
        return
    with pytest.warns(RuntimeWarning, match="stopped recording"):
        sum_loss(model(x)).backward()
    with pytest.raises(ValueError, match=r"module 'odd' \(Odd\): the same parameter is used more than once"):
        metric.close()
