"""Parameters that no layer's rule covers, measured from the autograd graph, against one sample at a time in float64."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from models import Graph
from models_without_rules import WITHOUT_RULES, C, OwnLinear, OwnRMSNorm, T, between, parameters
from per_sample_models import assert_equal, made, train, weights
from per_sample_oracle import assert_norms, check, norms_sq, samples_of, weighted_sum
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lipcore
from lipcore import Monitor
from lipcore.capture.graph.replay_costs import flops_of
from lipcore.capture.graph.walk import shapes

ENOUGH = 1 << 30
PerSampleGradNorms = functools.partial(lipcore.PerSampleGradNorms, max_replay_bytes=ENOUGH)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", WITHOUT_RULES)
def test_against_one_sample_at_a_time(name: str, size: int) -> None:
    model = made(WITHOUT_RULES[name])
    metric = check(model, (torch.randn(size, T, C),), max_replay_bytes=ENOUGH)
    assert not metric.coverage().uncovered


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_reductions_of_losses(reduction: str) -> None:
    check(made(WITHOUT_RULES["several"]), (torch.randn(4, T, C),), reduction=reduction, max_replay_bytes=ENOUGH)


def test_a_mean_over_tokens() -> None:
    model, x = made(WITHOUT_RULES["Conv1D"]), torch.randn(4, T, C)
    expected = norms_sq(model, samples_of((x,), 4), weighted_sum)
    with PerSampleGradNorms(model, loss_reduction="mean", loss_terms=4 * T) as metric:
        (weighted_sum(model(x)) / (4 * T)).backward()
        assert_norms(metric, expected)


@pytest.mark.parametrize("name", ["own RMSNorm", "spectral norm", "recurrence", "dropout", "used elsewhere"])
def test_the_training_stays_the_same_bits(name: str) -> None:
    mine = made(WITHOUT_RULES[name])
    theirs, inputs = copy.deepcopy(mine), [torch.randn(size, T, C) for size in (4, 4, 3, 1)]
    other = torch.optim.SGD(theirs.parameters(), 0.001)
    torch.manual_seed(1)
    train(theirs, other, inputs)
    optimizer = torch.optim.SGD(mine.parameters(), 0.001)
    metric = PerSampleGradNorms(loss_reduction="mean")
    torch.manual_seed(1)
    with Monitor(mine, optimizer, metrics=[metric]):
        train(mine, optimizer, inputs)
        assert not metric.per_sample.isnan().any()
    assert_equal(weights(mine), weights(theirs))
    assert_equal(mine.buffers(), theirs.buffers())


def test_structures_that_change_from_pass_to_pass() -> None:
    model = made(WITHOUT_RULES["positions"])
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for size, length in ((4, 5), (3, 5), (4, 2), (4, 5), (1, 7)):
            x = torch.randn(size, length, C)
            weighted_sum(model(x)).backward()
            assert_norms(metric, norms_sq(model, samples_of((x,), size), weighted_sum))


@pytest.mark.parametrize("chosen", ["of each as many", "all at first"])
def test_tokens_that_are_gathered_and_put_back(chosen: str) -> None:
    """By another mask in every pass; the first says nothing of those that come later."""
    model = made(lambda: Graph(_gathered, a=nn.Linear(C, C), b=nn.Linear(C, C), c=nn.Linear(C, 2)))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for step in range(12):
            x, mask = torch.randn(2, 4, C), torch.rand(2, 4) < (0.6 if step else 2.0)
            if chosen == "of each as many":  # four, of both samples or of one
                mask = torch.arange(8).roll(2 * step).reshape(2, 4) % 4 < 2 if step < 2 else _first_of_eight(step)
            expected = norms_sq(model, samples_of((x, mask), 2), weighted_sum)
            model.zero_grad()
            weighted_sum(model(x, mask)).backward()
            total = torch.stack(list(expected.values())).sum(0).sqrt()
            assert torch.allclose(metric.per_sample, total, rtol=1e-5)


def _first_of_eight(step: int) -> Tensor:
    return (torch.arange(8) < 4).roll(step % 4).reshape(2, 4)


def test_an_order_that_is_the_samples_own_at_first() -> None:
    model = made(lambda: Graph(_ordered, a=nn.Linear(C, C), g=OwnRMSNorm(), c=nn.Linear(C, 2)))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for step in range(4):
            x, order = torch.randn(5, T, C), torch.randperm(5) if step else torch.arange(5)
            alone = torch.zeros(1, dtype=torch.int64)
            expected = norms_sq(model, [(row, alone) for row in x.split(1)], weighted_sum)
            model.zero_grad()
            weighted_sum(model(x, order)).backward()
            assert_norms(metric, expected)


def _ordered(m: Any, x: Tensor, order: Tensor) -> Tensor:
    y: Tensor = m.c(torch.tanh(m.g(m.a(x)[order]))[order.argsort()])
    return y


def _gathered(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    h = m.a(x)
    y = h.clone()
    y[mask] = torch.tanh(m.b(h[mask]))
    z: Tensor = m.c(y)
    return z


def test_mixing_that_the_graph_alone_shows() -> None:
    model = made(parameters(lambda x, g: (h := x * g) - h.mean(0), g=(C,)))
    with PerSampleGradNorms(model, loss_reduction="sum", on_unsupported="skip") as metric:
        weighted_sum(model(torch.randn(4, T, C))).backward()
        assert "parts of several samples" in metric.coverage().uncovered["1.g"]


def test_two_passes_before_their_backward_passes() -> None:
    model = made(WITHOUT_RULES["own RMSNorm"])
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        inputs = [torch.randn(3, T, C) for _ in range(2)]
        losses = [weighted_sum(model(x)) for x in inputs]
        for x, loss in zip(inputs, losses, strict=True):
            loss.backward()
            assert_norms(metric, norms_sq(model, samples_of((x,), 3), weighted_sum))


def test_a_graph_is_gone_with_its_pass() -> None:
    model = made(WITHOUT_RULES["several"])
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        freed: list[bool] = []

        class Witness(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.witness = _Witness(freed)
                return x.clone()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return grad

        output = model(Witness.apply(torch.randn(3, T, C, requires_grad=True)))  # type: ignore[no-untyped-call]
        output.sum().backward()
        del output
        assert not metric.broken
        assert freed


class _Witness:
    def __init__(self, freed: list[bool]) -> None:
        self._freed = freed

    def __del__(self) -> None:
        self._freed.append(True)


def test_the_plan_names_the_way() -> None:
    model = made(WITHOUT_RULES["layer scale"])
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        assert "graph: chosen at the first forward pass" in str(metric.plan())
        model(torch.randn(4, T, C)).sum().backward()
        assert "graph: sums over rows at Mul" in str(metric.plan())
    with PerSampleGradNorms(made(WITHOUT_RULES["Conv1D"]), loss_reduction="sum") as metric:
        metric._capture.model(torch.randn(4, T, C)).sum().backward()  # type: ignore[union-attr, attr-defined]
        assert "graph: products of rows at Addmm" in str(metric.plan())


# ---- what the graph cannot do either


def _refused(model: nn.Module, words: str, **options: Any) -> None:
    """The user's pass goes on; the error comes at the end, and with on_unsupported="skip" the rest is measured."""
    x = torch.randn(4, T, C)
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match=words):
        with PerSampleGradNorms(model, loss_reduction="sum", **options):
            model(x).sum().backward()
    model.zero_grad()
    with PerSampleGradNorms(model, loss_reduction="sum", on_unsupported="skip", **options) as metric:
        model(x).sum().backward()
        assert "0.weight" in metric.per_parameter
        assert not metric.per_parameter["0.weight"].isnan().any()


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_a_function_in_python() -> None:
    _refused(made(parameters(lambda x, g: x * _Double.apply(g), g=(C,))), "'1.g': .* autograd Function _Double")


def test_the_bound() -> None:
    _refused(made(lambda: between(OwnLinear(C, C))), "'1.weight': .*max_replay_bytes=100; raise", max_replay_bytes=100)


def test_the_bound_of_operations() -> None:
    """Raised to what the refusal says, the norms are right; products and sums need none."""
    model, words = made(WITHOUT_RULES["scaled product"]), "replays of 4 samples take 12,648 FLOPs, more than"
    _refused(model, rf"'1.b': .*{words} max_replay_flops=12,647; raise.*\(so too '1.a'\)", max_replay_flops=12647)
    x = (torch.randn(4, T, C),)
    metric = check(model, x, max_replay_flops=12648)
    assert "4 replays at Addmm (12,648 FLOPs in replays of the first pass)" in str(metric.plan())
    check(made(WITHOUT_RULES["Conv1D"]), x, max_replay_flops=0)
    check(made(WITHOUT_RULES["own RMSNorm"]), x, max_replay_flops=0)


def test_only_what_is_beyond_the_bound_of_operations_is_left_out() -> None:
    model, x = made(WITHOUT_RULES["weight norm"]), torch.randn(4, T, C)
    expected = norms_sq(model, samples_of((x,), 4), weighted_sum)
    with PerSampleGradNorms(model, loss_reduction="sum", on_unsupported="skip", max_replay_flops=12648) as metric:
        weighted_sum(model(x)).backward()
        left_out = metric.coverage().uncovered
        assert set(left_out) == {name for name in expected if "parametrizations" in name}
        assert all("more than max_replay_flops=12,648; raise" in why for why in left_out.values())
        for name in expected.keys() - left_out.keys():
            torch.testing.assert_close(metric.per_parameter[name], expected[name].sqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (lambda a, b: a @ b, [(7, 3), (3, 5)]),
        (lambda a, b, c: torch.addmm(a, b, c), [(5,), (7, 3), (3, 5)]),
        (torch.bmm, [(2, 7, 3), (2, 3, 5)]),
        (lambda a, b, c: torch.baddbmm(a, b, c), [(2, 7, 5), (2, 7, 3), (2, 3, 5)]),
        (lambda x, w: F.conv2d(x, w, stride=2), [(3, 4, 9, 8), (6, 4, 3, 3)]),
        (lambda x, w: F.conv_transpose1d(x, w, stride=2), [(3, 4, 9), (4, 6, 3)]),
    ],
    ids=["mm", "addmm", "bmm", "baddbmm", "conv", "conv_transpose"],
)
def test_operations_are_those_that_torch_counts(build: Any, shapes: list[tuple[int, ...]]) -> None:
    made_of = [torch.randn(shape, requires_grad=True) for shape in shapes]
    out = build(*made_of)
    elements = out.numel() + sum(x.numel() for x in made_of)
    with FlopCounterMode(display=False) as counter:
        out.grad_fn(torch.ones_like(out))
    assert flops_of(out.grad_fn) == counter.get_total_flops() + elements


def test_operations_of_attention() -> None:
    q, k, v = (torch.randn(2, 3, size, 4, requires_grad=True) for size in (5, 7, 7))
    node = F.scaled_dot_product_attention(q, k, v).grad_fn
    products = 10 * 2 * 3 * 5 * 7 * 4 if node.name().startswith("ScaledDotProduct") else 0
    assert flops_of(node) - products == sum(math.prod(s) for s in (*shapes(node), q.shape, k.shape, v.shape))


class _Recurrent:
    """The node of a fused recurrent layer, which is there on some devices alone: rows, and a weight and a bias."""

    _input_metadata = (torch.empty(5, 2, 3),)

    def __init__(self) -> None:
        nodes = [
            (x * 1).grad_fn for x in (torch.ones(size, requires_grad=True) for size in ((5, 2, 4), (12, 4), (12,)))
        ]
        self.next_functions = [(node, 0) for node in nodes]

    def name(self) -> str:
        return "CudnnRnnBackward0"


def test_operations_of_fused_recurrent_layers() -> None:
    assert flops_of(_Recurrent()) == 4 * 10 * 12 * 4 + 5 * 2 * 3 + 5 * 2 * 4 + 12 * 4 + 12


def test_operations_of_grouped_products_count_every_row_once() -> None:
    x, w = torch.randn(7, 4, requires_grad=True), torch.randn(3, 4, 8, requires_grad=True)
    try:
        out = F.grouped_mm(x, w, offs=torch.tensor([2, 5, 7], dtype=torch.int32))
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"no grouped product here: {error}")
    assert flops_of(out.grad_fn) == 2 * 2 * 7 * 4 * 8 + x.numel() + w.numel() + out.numel()


def test_a_parameter_that_mixes_samples() -> None:
    model = made(parameters(lambda x, g: x * g - (x * g).mean(0), g=(C,)))
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="samples|one sample"):
        with PerSampleGradNorms(model, loss_reduction="sum"):
            model(torch.randn(4, T, C)).square().sum().backward()


def test_max_replay_bytes_is_checked() -> None:
    with pytest.raises(ValueError, match="max_replay_bytes: expected an integer >= 0"):
        PerSampleGradNorms(loss_reduction="sum", max_replay_bytes=-1)


def test_hooks_that_see_nothing_new_in_another_pass() -> None:
    """Those by which transformers collects the outputs that a call asks for; anyone else's refuse another pass."""
    capturing = pytest.importorskip("transformers.utils.output_capturing", reason="a hook of the transformers library")
    model = made(WITHOUT_RULES["own RMSNorm"])
    capturing.install_output_capuring_hook(model[0], "hidden_states", 0)
    check(model, (torch.randn(4, T, C),))
    model[0].register_forward_hook(lambda module, arguments, output: None)
    _refused(model, f"a hook of {__name__} on module '0' would see another forward pass")


def test_rows_that_never_had_a_gradient_need_no_order() -> None:
    """Zeros are anyone's; the first gradient is nobody's until a proof has seen it."""
    model = made(lambda: between(_Gated()))
    gated = model[1]
    x = torch.randn(4, T, C)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(12):  # more than are proved as they come
            weighted_sum(model(x)).backward()
            assert not metric.unproved
            assert not metric.per_parameter["1.weight"].any()
        gated.gate.fill_(1.0)  # type: ignore[operator, union-attr]
        weighted_sum(model(x)).backward()
        assert "some rows had no gradient" in metric.unproved
        assert metric.per_parameter["1.weight"].isnan().all()
        for _ in range(64):
            weighted_sum(model(x)).backward()
        assert not metric.unproved
        assert_norms(metric, norms_sq(model, samples_of((x,), 4), weighted_sum))


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, C))
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * (x.view(-1, C) @ self.weight).view(x.shape)


def test_experts_with_much_in_their_order() -> None:
    """Rows sorted by expert go through biases, slices, clamps and gates before they are put back."""
    model, x = made(lambda: between(_Experts())), torch.randn(4, T, C)
    assert not check(model, (x,)).unproved


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(2, C, 2 * C)), nn.Parameter(torch.randn(2, 2 * C))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, C)
        order = (rows[:, 0] > 0).long().argsort(stable=True)
        own = (rows[:, 0] > 0).long()[order]
        both = (rows[order].unsqueeze(1) @ self.weight[own]).squeeze(1) + self.bias[own]
        gate, up = both[:, ::2].clamp(max=2), both[:, 1::2].clamp(-2, 2)
        done = (up + 1) * (gate * torch.sigmoid(gate * 1.7)).exp().sin()
        return torch.zeros_like(rows).index_add(0, order, done).view(x.shape)


class _EachSample(nn.Module):
    """Goes from sample to sample, with a token of its own in front of each."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.scale = nn.Parameter(torch.randn(1, C)), nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        each = [torch.cat([self.token, row * self.scale]) for row in x]
        return torch.stack([torch.sin(row) for row in each])


def test_a_loop_over_the_samples() -> None:
    assert not check(made(lambda: between(_EachSample())), (torch.randn(4, T, C),)).unproved


class _Features(nn.Module):
    """Returns a list with an entry per sample beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = between(OwnLinear(C, C)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        features = list(self.first(x).unbind())
        joined = torch.cat(features).view(len(x), T, 3)
        return self.last(joined), features, joined


def test_an_output_that_is_a_list_of_samples() -> None:
    metric = check(made(_Features), (torch.randn(4, T, C),), loss=lambda out: weighted_sum(out[0]))
    assert not metric.unproved


class _Patches(nn.Module):
    """Takes a block of rows of each sample beside the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.randn(C)), OwnLinear(C, 2)

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:
        seen = torch.sin(patches * self.scale).view(len(x), 3, C)
        return self.head(x + seen.sum(1, keepdim=True))


def test_an_argument_with_a_block_of_rows_of_each_sample() -> None:
    model, x, patches = made(_Patches), torch.randn(4, T, C), torch.randn(12, C)
    expected = norms_sq(model, list(zip(x.split(1), patches.split(3), strict=True)), weighted_sum)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        weighted_sum(model(x, patches)).backward()
        assert_norms(metric, expected)
        assert not metric.unproved


@pytest.mark.parametrize("name", ["class token", "several", "weight norm", "gathered positions", "used elsewhere"])
def test_half_precision(name: str) -> None:
    """Sums over rows in float32 go on through nodes in bfloat16."""
    model, x = made(WITHOUT_RULES[name]), torch.randn(4, T, C)
    expected = norms_sq(model, samples_of((x,), 4), torch.sum)
    model.bfloat16()
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        model(x.bfloat16()).sum().backward()
        assert_norms(metric, expected, 0.05)


class _Complex(nn.Module):
    """Weights of a Fourier layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(C, C, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x, dim=1) @ self.w, n=x.shape[1], dim=1)


@pytest.mark.parametrize("size", [1, 3])
def test_complex_parameters(size: int) -> None:
    model, x = made(lambda: between(_Complex())), torch.randn(size, T, C)
    expected = []
    for row in x.split(1):
        (grad,) = torch.autograd.grad(weighted_sum(model(row)), [model[1].w])
        expected.append(grad.norm().double())
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        weighted_sum(model(x)).backward()
        assert torch.allclose(metric.per_parameter["1.w"], torch.stack(expected), rtol=1e-5)


@pytest.mark.parametrize("bytes_", [100, 400])
def test_the_gradient_of_a_parameter_that_is_refused_is_the_same_bits(bytes_: int) -> None:
    """In the pass that refuses it another one is measured."""
    mine = made(parameters(lambda x, a, b: torch.tanh(x @ a) * b, a=(C, C), b=(C,)))
    theirs, x = copy.deepcopy(mine), torch.randn(4, T, C)
    weighted_sum(theirs(x)).backward()
    with PerSampleGradNorms(mine, loss_reduction="sum", max_replay_bytes=bytes_, on_unsupported="skip"):
        weighted_sum(mine(x)).backward()
    assert_equal([p.grad for p in mine.parameters()], [p.grad for p in theirs.parameters()])


class _InMidRun(nn.Module):
    """A checkpoint of a method, before which no module's hook runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w, self.checkpointed = nn.Linear(C, C), nn.Parameter(torch.randn(C, C)), False

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y: Tensor = checkpoint(self.block, h, use_reentrant=False) if self.checkpointed else self.block(h)
        return y


def test_a_checkpoint_of_a_method_in_mid_run() -> None:
    model, x = made(_InMidRun), torch.randn(4, T, C)
    with PerSampleGradNorms(model, loss_reduction="sum", on_unsupported="skip") as metric:
        for model.checkpointed in (False, True, True):
            model.zero_grad()
            weighted_sum(model(x)).backward()
        assert "checkpointing" in metric.coverage().uncovered["w"]


def test_a_batch_of_none_is_no_error() -> None:
    model = made(WITHOUT_RULES["own RMSNorm"])
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for size in (3, 0, 2):
            x = torch.randn(size, T, C)
            model.zero_grad()
            weighted_sum(model(x)).backward()
            assert metric.per_sample.shape == (size,)
        assert_norms(metric, norms_sq(model, samples_of((x,), 2), weighted_sum))


@pytest.mark.parametrize("part", ["output", "h", "c"])
def test_every_output_of_a_recurrent_layer(part: str) -> None:
    def rule(m: Any, x: Tensor) -> Tensor:
        output, (h, c) = m.r(x)
        y: Tensor = m.h({"output": output[:, -1], "h": h[-1], "c": c[-1]}[part])
        return y

    model = made(lambda: Graph(rule, r=nn.LSTM(C, C, 2, batch_first=True), h=nn.Linear(C, 2)))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(2):
            x = torch.randn(4, T, C)
            expected = norms_sq(model, samples_of((x,), 4), weighted_sum)
            model.zero_grad()
            weighted_sum(model(x)).backward()
            total = torch.stack(list(expected.values())).sum(0).sqrt()
            assert torch.allclose(metric.per_sample, total, rtol=1e-5)
            assert not metric.unproved


def test_low_rank_weights_in_half_precision() -> None:
    model = made(parameters(lambda x, a, b: x + x @ (a @ b), a=(C, 2), b=(2, C))).to(torch.bfloat16)
    x = torch.randn(3, T, C, dtype=torch.bfloat16)
    expected = norms_sq(model, samples_of((x,), 3), lambda y: y.square().sum())
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        model(x).square().sum().backward()
        total = torch.stack(list(expected.values())).sum(0).sqrt()
        assert torch.allclose(metric.per_sample, total, rtol=3e-2)


class _LastInMidRun(_InMidRun):
    """The checkpoint holds the index that picks each sample's last token, and no parameter."""

    calls = 0

    def block(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x)[torch.arange(len(x)), torch.arange(len(x)) % T]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.w)


def test_a_checkpoint_around_an_index_in_mid_run() -> None:
    model, x = made(_LastInMidRun), torch.randn(4, T, C)
    plain = copy.deepcopy(model)
    with PerSampleGradNorms(model, loss_reduction="sum", on_unsupported="skip"):
        for checkpointed in (False, True, True):
            for each in (model, plain):
                each.checkpointed, each.calls = checkpointed, 0
                each.zero_grad()
                weighted_sum(each(x)).backward()
            assert model.calls == plain.calls or not checkpointed  # the first pass is proved
            assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
