"""fused=True: norms from inside the weight gradient of Linears on sequences, in every kind of training."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import Graph
from models_without_rules import C, OwnRMSNorm
from per_sample_models import Block, made, sum_loss
from per_sample_oracle import assert_norms, check, norms_sq, samples_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lipcore import PerSampleGradNorms
from lipcore.functional import linear
from lipcore.layers import factor_outer

LENGTH = 50  # long enough


class Sequences(nn.Module):
    def __init__(self, checkpointed: bool | None = None, tied: bool = False) -> None:
        super().__init__()
        self.first, self.block, self.again = nn.Linear(5, 6), Block(6), nn.Linear(6, 6)
        self.last = nn.Linear(6, 6 if tied else 3, bias=False)
        self.checkpointed = checkpointed
        if tied:
            self.last.weight = self.again.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu_()
        again = self.checkpointed is not None and x.dtype != torch.float64
        x = checkpoint(self.block, x, use_reentrant=self.checkpointed) if again else self.block(x)
        y: Tensor = self.last(self.again(x).tanh())
        return y


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def assert_close(mine: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-4) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("options", [{}, {"checkpointed": False}, {"checkpointed": True}, {"tied": True}], ids=str)
def test_norms_and_gradients(options: dict[str, Any], size: int) -> None:
    plain, model = made(lambda: Sequences(**options)), made(lambda: Sequences(**options))
    with PerSampleGradNorms(model, loss_reduction="sum", fused=True) as metric:
        for _ in range(3):
            x = torch.randn(size, LENGTH, 5)
            expected = norms_sq(model, samples_of((x,), size), sum_loss)
            sum_loss(plain(x)).backward()
            sum_loss(model(x)).backward()  # accumulates
            assert_norms(metric, expected, 5e-5)
            assert_close(gradients(model), gradients(plain))


class Others(nn.Module):
    """Linears among parameters without a rule, one of whose weights a function is given too where `shared`."""

    def __init__(self, shared: bool, checkpointed: bool) -> None:
        super().__init__()
        self.norm, self.scale = OwnRMSNorm(), nn.Parameter(torch.ones(C))
        self.a, self.b = nn.Linear(C, C), nn.Linear(C, C)
        self.shared, self.checkpointed = shared, checkpointed

    def part(self, x: Tensor) -> Tensor:
        return x + self.norm(self.a(x)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x + self.b(x)
        x = self.b(x) * self.scale
        x = checkpoint(self.part, x, use_reentrant=False) if self.checkpointed else self.part(x)
        return x @ self.b.weight if self.shared else x


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_beside_parameters_that_the_graph_measures(shared: bool, checkpointed: bool) -> None:
    plain, model = made(lambda: Others(shared, checkpointed)), made(lambda: Others(shared, checkpointed))
    with PerSampleGradNorms(model, loss_reduction="sum", fused=True) as metric:
        for number in range(3):
            x = torch.randn(4, LENGTH, C)
            expected = norms_sq(model, samples_of((x,), 4), sum_loss)
            sum_loss(plain(x)).backward()
            sum_loss(model(x)).backward()
            assert_close(gradients(model), gradients(plain))
            if shared and number == 0:
                assert "in the next passes that layer is not" in metric.broken
                continue
            assert_norms(metric, expected, 5e-5)
            assert not metric.unproved
        ways = {site.name: site.how for site in metric._capture.sites}  # type: ignore[union-attr]
    assert ways["a"] == "inside the weight gradient"


def test_the_plan_says_from_which_length_on() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv1d(LENGTH, 4, 3))
    with PerSampleGradNorms(model, loss_reduction="sum", fused=True) as metric:
        before = [line.rule for line in metric.plan()][1:]
        model(torch.randn(3, LENGTH, 64)).sum().backward()
        after = next(line.rule for line in metric.plan() if line.what == "0")
    lengths = "inside the weight gradient from 48 positions on, else Gram up to 28 positions, else direct"
    assert before[0] == f"Linear: weight, bias, {lengths}"
    assert before[1] == "Conv1d: weight, bias, Gram or direct, by the sizes"
    assert after == "Linear: weight, bias, inside the weight gradient"
    compiled = torch.compile(model, backend="eager")  # which torch makes the weight gradients of
    with PerSampleGradNorms(compiled, loss_reduction="sum", fused=True) as metric:
        assert "weight gradient" not in str(metric.plan())


def test_the_way_is_put_in_words_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer that does not fill a device, whose words take a search."""
    calls: list[int] = []
    in_words = linear.way
    monkeypatch.setattr(linear, "made_in_one_pass", lambda *_: False)
    monkeypatch.setattr(factor_outer, "way", lambda *a: calls.append(1) or in_words(*a))
    model = nn.Sequential(nn.Linear(5, 3))
    with PerSampleGradNorms(model, loss_reduction="sum", fused=True) as metric:
        for _ in range(3):
            model(torch.randn(3, LENGTH, 5)).sum().backward()
        assert "by direct (50 positions" in str(metric.plan())
    assert len(calls) == 1


def test_it_is_the_fused_way_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from lipcore import functional

    calls = []
    fused = functional.linear_weight_grad
    monkeypatch.setattr(functional, "linear_weight_grad", lambda *a, **k: calls.append(1) or fused(*a, **k))
    model = made(Sequences)
    with PerSampleGradNorms(model, loss_reduction="sum", fused=True):
        output = model(torch.randn(3, LENGTH, 5))
        assert not calls  # the proof asks for gradients of activations alone
        sum_loss(output).backward()
    assert len(calls) == 7  # every Linear


def test_the_gradient_of_the_input() -> None:
    found = []
    for fused in (False, True):
        model, x = made(Sequences), torch.linspace(-1, 1, 3 * LENGTH * 5).reshape(3, LENGTH, 5).requires_grad_()
        with PerSampleGradNorms(model, loss_reduction="sum", fused=fused):
            sum_loss(model(x)).backward()
        found.append([x.grad])
    assert_close(*found)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_autocast() -> None:
    found, norms = [], []
    x = torch.randn(3, LENGTH, 5)
    for fused in (False, True):
        model = made(Sequences)
        with PerSampleGradNorms(model, loss_reduction="sum", fused=fused) as metric:
            with torch.autocast("cpu", torch.bfloat16):
                output = model(x)
            sum_loss(output.float()).backward()
            norms.append(metric.per_sample)
        found.append(gradients(model))
        assert all(g.dtype == torch.float32 for g in found[-1])
    assert_close(*found, tolerance=3e-2)
    assert torch.allclose(*norms, rtol=1e-2)


def test_second_derivatives() -> None:
    found = []
    for fused in (False, True):
        model = made(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
        x = torch.linspace(-1, 1, 3 * LENGTH * 5).reshape(3, LENGTH, 5).requires_grad_()
        with PerSampleGradNorms(model, loss_reduction="sum", fused=fused) as metric, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = model(x)
            (slope,) = torch.autograd.grad(sum_loss(output), x, create_graph=True)
            (sum_loss(output) + slope.square().sum()).backward()
            assert metric.per_sample.isnan().all()
        found.append(gradients(model))
    assert_close(*found)


def test_gradients_that_are_not_accumulated() -> None:
    found = []
    for fused in (False, True):
        model = made(Sequences)
        x = torch.linspace(-1, 1, 3 * LENGTH * 5).reshape(3, LENGTH, 5)
        with PerSampleGradNorms(model, loss_reduction="sum", fused=fused) as metric:
            found.append(list(torch.autograd.grad(sum_loss(model(x)), list(model.parameters()))))
            assert metric._capture is not None
            assert metric._capture.records == 0
    assert_close(*found)


def test_a_frozen_weight_or_bias() -> None:
    for frozen in ("weight", "bias"):
        model = made(Sequences)
        getattr(model.again, frozen).requires_grad_(False)
        check(model, (torch.randn(3, LENGTH, 5),), loss=sum_loss, fused=True, tolerance=5e-5)


def test_the_sequence_first_and_packed_sequences() -> None:
    def loss(y: Tensor) -> Tensor:
        return (y.sin() * torch.arange(1, 4, dtype=y.dtype)).sum()

    model = made(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
    check(model, (torch.randn(LENGTH, 3, 5),), loss=loss, dim=1, fused=True, tolerance=5e-5)
    lengths = [60, 0, 100, 1]
    x, offsets = torch.randn(sum(lengths), 5), torch.tensor([0, *lengths]).cumsum(0)
    expected = norms_sq(model, [(part,) for part in x.split(lengths)], loss)
    with PerSampleGradNorms(model, loss_reduction="sum", fused=True, cu_seqlens=lambda a, k: offsets) as metric:
        model.zero_grad()
        loss(model(x)).backward()
        assert_norms(metric, expected, 5e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_a_layer_without_the_batch_dimension(size: int) -> None:
    """A Linear on features of positions [T, F]."""
    places = torch.linspace(-1, 1, LENGTH).unsqueeze(1)
    model = made(
        lambda: Graph(
            lambda m, x: m.head((m.a(x) + m.places(places.to(x.dtype))).tanh()),
            a=nn.Linear(5, 6),
            places=nn.Linear(1, 6),
            head=nn.Linear(6, 3),
        )
    )
    check(
        model,
        (torch.randn(size, LENGTH, 5),),
        loss=sum_loss,
        fused=True,
        broadcast=["places"],
        tolerance=5e-5,
    )


def test_compiled_models_do_without_it() -> None:
    torch._dynamo.reset()
    inner = made(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
    model, x = torch.compile(inner, fullgraph=True, backend="aot_eager"), torch.randn(3, LENGTH, 5)
    expected = norms_sq(inner, samples_of((x,), 3), sum_loss)
    with PerSampleGradNorms(model, loss_reduction="sum", fused=True) as metric:
        sum_loss(model(x)).backward()
        assert_norms(metric, expected, 5e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("order", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("length", [8, 64])
def test_two_metrics_on_one_model(order: tuple[bool, bool], length: int) -> None:
    model = made(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    with (
        PerSampleGradNorms(model, loss_reduction="sum", fused=order[0]) as first,
        PerSampleGradNorms(model, loss_reduction="sum", fused=order[1]) as second,
    ):
        for size in (8, length):  # the proof sees the first pass alone
            x = torch.randn(3, size, 6)
            model.zero_grad()
            sum_loss(model(x)).backward()
            expected = norms_sq(model, samples_of((x,), 3), sum_loss)
            assert_norms(first, expected)
            assert_norms(second, expected)


def test_two_metrics_expand_positions_once() -> None:
    model = made(lambda: Graph(lambda m, x: m.out(m.p(torch.arange(6)) + x), p=nn.Embedding(6, 4), out=nn.Linear(4, 2)))
    x = torch.randn(3, 6, 4)
    plain = model(x)
    options: dict[str, Any] = {"loss_reduction": "sum", "broadcast": ["p"]}
    with PerSampleGradNorms(model, **options) as first, PerSampleGradNorms(model, **options) as second:
        output = model(x)
        assert torch.equal(output, plain)
        sum_loss(output).backward()
        expected = norms_sq(model, samples_of((x,), 3), sum_loss)
        assert_norms(first, expected)
        assert_norms(second, expected)
