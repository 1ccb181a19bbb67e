"""Lipschitz and local_lipschitz: their numbers against float64 autograd, one sample at a time, and what they refuse."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Graph, batches, cnn, mlp, mse, observe, reference, relative_error, seeded, train
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor, local_lipschitz
from lipcore.results import MetricResult
from lipcore.spectral import singular_values

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

# ---- the lemma: lambda from the ordinary backward pass is ||grad_x f||, whatever follows the first layer


def chain(first: nn.Module, *rest: nn.Module) -> nn.Sequential:
    return nn.Sequential(first, *rest)


def behind(first: nn.Module, width: int, *between: nn.Module) -> nn.Sequential:
    return nn.Sequential(first, *between, nn.Flatten(), nn.Linear(width, 1))


def frozen(model: nn.Sequential, *names: str) -> nn.Sequential:
    for name in names:
        getattr(model[0], name).requires_grad_(False)
    return model


def attention_after(first: nn.Linear) -> Graph:
    def rule(m: Any, x: Tensor) -> Tensor:
        u = m.first(x)
        mixed, _ = m.attention(u, u, u)
        return m.head((m.norm(u + mixed)).mean(1))

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    return Graph(rule, first=first, attention=attention, norm=nn.LayerNorm(8), head=nn.Linear(8, 1))


def skips_after(first: nn.Linear) -> Graph:
    def rule(m: Any, x: Tensor) -> Tensor:
        u = m.first(x)
        h = u + m.block(u.tanh())
        return m.head(torch.cat([h, u], 1))

    return Graph(rule, first=first, block=mlp(7, 9, 7), head=nn.Linear(14, 1))


LEMMA: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear": (lambda: mlp(5, 7, 1), (5,), "0"),
    "linear_no_bias": (lambda: mlp(5, 7, 6, 1, bias=False), (5,), "0"),
    "linear_one_output": (lambda: chain(nn.Linear(5, 1), nn.Sigmoid()), (5,), "0"),
    "linear_wide": (lambda: mlp(130, 70, 1), (130,), "0"),
    "linear_nested": (lambda: nn.Sequential(nn.Sequential(nn.Linear(5, 7), nn.ReLU()), mlp(7, 6, 1)), (5,), "0.0"),
    "linear_tokens": (lambda: behind(nn.Linear(5, 3), 12, nn.ReLU()), (4, 5), "0"),
    "linear_4d": (lambda: behind(nn.Linear(5, 3), 24, nn.ReLU()), (2, 4, 5), "0"),
    "conv1d": (lambda: behind(nn.Conv1d(2, 3, 3), 18, nn.ReLU()), (2, 8), "0"),
    "conv1d_stride_dilation": (
        lambda: behind(nn.Conv1d(2, 3, 3, stride=2, dilation=2, padding=1), 9, nn.ReLU()),
        (2, 8),
        "0",
    ),
    "conv1d_stride_leaves_a_rest": (lambda: behind(nn.Conv1d(2, 3, 3, stride=3), 6, nn.ReLU()), (2, 8), "0"),
    "conv1d_same": (lambda: behind(nn.Conv1d(2, 3, 4, padding="same"), 24, nn.ReLU()), (2, 8), "0"),
    "conv1d_no_bias": (lambda: behind(nn.Conv1d(2, 3, 3, bias=False), 18, nn.ReLU()), (2, 8), "0"),
    "conv2d": (lambda: behind(nn.Conv2d(2, 3, 3, padding=1), 75, nn.ReLU()), (2, 5, 5), "0"),
    "conv2d_groups": (lambda: behind(nn.Conv2d(4, 6, 3, groups=2), 54, nn.ReLU()), (4, 5, 5), "0"),
    "conv2d_depthwise": (lambda: behind(nn.Conv2d(4, 4, (3, 2), groups=4), 48, nn.ReLU()), (4, 5, 5), "0"),
    "conv2d_circular": (
        lambda: behind(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), 75, nn.ReLU()),
        (2, 5, 5),
        "0",
    ),
    "conv2d_reflect": (
        lambda: behind(nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), 105, nn.ReLU()),
        (2, 5, 5),
        "0",
    ),
    "conv2d_replicate_same": (
        lambda: behind(nn.Conv2d(2, 3, 3, padding="same", padding_mode="replicate"), 75, nn.ReLU()),
        (2, 5, 5),
        "0",
    ),
    "conv2d_channels_last": (
        lambda: behind(nn.Conv2d(2, 3, 3), 27, nn.ReLU()).to(memory_format=torch.channels_last),
        (2, 5, 5),
        "0",
    ),
    "conv3d": (lambda: behind(nn.Conv3d(1, 2, 2, stride=(1, 2, 1)), 36, nn.ReLU()), (1, 4, 4, 4), "0"),
    "conv3d_dilation": (lambda: behind(nn.Conv3d(1, 2, 2, dilation=2), 16, nn.ReLU()), (1, 4, 4, 4), "0"),
    "frozen_weight": (lambda: frozen(mlp(5, 7, 1), "weight"), (5,), "0"),
    "frozen_bias": (lambda: frozen(mlp(5, 7, 1), "bias"), (5,), "0"),
    "frozen_layer": (lambda: frozen(mlp(5, 7, 6, 1), "weight", "bias"), (5,), "0"),
    "frozen_layer_in_place": (
        lambda: frozen(chain(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 1)), "weight", "bias"),
        (5,),
        "0",
    ),
    "frozen_tokens_in_place": (
        lambda: frozen(behind(nn.Linear(5, 3), 12, nn.ReLU(inplace=True)), "weight", "bias"),
        (4, 5),
        "0",
    ),
    "frozen_conv_in_place": (
        lambda: frozen(behind(nn.Conv1d(2, 3, 3), 18, nn.ReLU(inplace=True)), "weight", "bias"),
        (2, 8),
        "0",
    ),
    "relu_in_place": (lambda: chain(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 1)), (5,), "0"),
    "tokens_relu_in_place": (lambda: behind(nn.Linear(5, 3), 12, nn.ReLU(inplace=True)), (4, 5), "0"),
    "tokens_no_bias_in_place": (lambda: behind(nn.Linear(5, 3, bias=False), 12, nn.ReLU(inplace=True)), (4, 5), "0"),
    "conv_relu_in_place": (lambda: behind(nn.Conv1d(2, 3, 3), 18, nn.ReLU(inplace=True)), (2, 8), "0"),
    "gelu": (lambda: mlp(5, 7, 6, 1, activation=nn.GELU), (5,), "0"),
    "tanh": (lambda: mlp(5, 7, 6, 1, activation=nn.Tanh), (5,), "0"),
    "layernorm": (lambda: chain(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 1)), (5,), "0"),
    "groupnorm": (lambda: behind(nn.Conv1d(2, 4, 3), 24, nn.GroupNorm(2, 4), nn.ReLU()), (2, 8), "0"),
    "batchnorm_eval": (
        lambda: chain(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 1)).eval(),
        (5,),
        "0",
    ),
    "average_pool": (lambda: behind(nn.Conv1d(2, 3, 3), 9, nn.AvgPool1d(2), nn.ReLU()), (2, 8), "0"),
    "max_pool": (lambda: behind(nn.Conv1d(2, 3, 3), 9, nn.MaxPool1d(2)), (2, 8), "0"),
    "skips_after": (lambda: skips_after(nn.Linear(5, 7)), (5,), "first"),
    "attention_after": (lambda: attention_after(nn.Linear(5, 8)), (4, 5), "first"),
    "output_vector": (
        lambda: Graph(lambda m, x: m.head(m.first(x).relu()).squeeze(1), first=nn.Linear(5, 7), head=nn.Linear(7, 1)),
        (5,),
        "first",
    ),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("case", LEMMA)
def test_lemma(case: str, dtype: torch.dtype, tolerance: float) -> None:
    build, shape, first = LEMMA[case]
    model = seeded(build, dtype=dtype)
    x = torch.randn(6, *shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    expected_r, expected_lambda = reference(model, x, first=first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no input goes past these first layers
        warnings.filterwarnings("ignore", "Using padding='same'")  # torch's
        r, lambdas = observe(model, x)
    assert expected_lambda is not None
    for found, expected in ((r, expected_r), (lambdas, expected_lambda)):
        if dtype == torch.float32:  # the network's own rounding: relative to the batch, not to where terms cancel
            found, expected = found / expected.max(), expected / expected.max()
            assert float((found - expected).abs().max()) <= tolerance
        assert relative_error(found, expected) <= (tolerance if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize(
    "case", ["linear", "linear_tokens", "conv2d_circular", "frozen_layer_in_place", "attention_after"]
)
def test_a_batch_brings_what_single_samples_bring(case: str) -> None:
    build, shape, _ = LEMMA[case]
    model = seeded(build, dtype=torch.float64)
    x = torch.randn(5, *shape, dtype=torch.float64)
    together = observe(model, x)
    alone = [observe(model, x[i : i + 1], shortcut=False) for i in range(5)]
    for k in range(2):
        assert relative_error(torch.cat([pair[k] for pair in alone]), together[k]) <= 1e-12


def test_embedding_has_r_and_no_lambda() -> None:
    model = seeded(lambda: behind(nn.Embedding(11, 4), 12, nn.Tanh()), dtype=torch.float64)
    x = torch.tensor([[1, 2, 3], [4, 4, 4], [0, 10, 0]])
    expected, _ = reference(model, x)
    for freeze in (False, True):
        model[0].weight.requires_grad_(not freeze)
        metric = Lipschitz()
        with Monitor(model, metrics=[metric]) as monitor:
            model(x).square().sum().backward()
            monitor.flush()
            assert relative_error(metric.per_sample.normalized_gradient_norm, expected) <= 1e-12
            result = monitor.compute()["lipschitz"]
        assert "local_lipschitz" not in result
        assert "sandwich" not in result
        assert result.normalized_gradient_norm["model:Linear"].mean.label == "exact"


def test_parametrized_first_layer_counts_with_its_effective_weight() -> None:
    def build() -> nn.Module:
        model = mlp(5, 7, 1)
        torch.nn.utils.parametrizations.weight_norm(model[0])
        return model

    model = seeded(build, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = reference(model, x)
    for found, wanted in zip(observe(model, x), expected, strict=True):
        assert relative_error(found, wanted) <= 1e-12


def test_first_layer_called_by_keyword() -> None:
    model = seeded(
        lambda: Graph(lambda m, x: m.head(m.first(input=x).relu()), first=nn.Linear(5, 7), head=nn.Linear(7, 1)),
        dtype=torch.float64,
    )
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = reference_by_keyword(model, x)
    found = observe(model, x)
    assert relative_error(found[0], expected[0]) <= 1e-12
    assert relative_error(found[1], expected[1]) <= 1e-12


def reference_by_keyword(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    r, lambdas = reference(model, x, first="first")
    assert lambdas is not None
    return r, lambdas


@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
def test_half_precision_is_right_to_its_own_precision(way: str) -> None:
    model = seeded(lambda: mlp(6, 9, 8, 1, activation=nn.GELU))
    x = torch.randn(16, 6)
    expected = reference(model, x)
    if way == "bfloat16":
        found = observe(model.bfloat16(), x.bfloat16())
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = observe(model, x)
    for got, wanted in zip(found, expected, strict=True):
        assert relative_error(got, wanted) <= 0.1
        assert float((got / wanted).mean()) == pytest.approx(1, abs=0.02)


# ---- what must not matter: loss, reduction, scale, weights, accumulation


def in_probability(target: Tensor) -> Tensor:
    return target.sigmoid()


LOSSES: dict[str, tuple[bool, Callable[[Tensor, Tensor], Tensor]]] = {
    "mse_mean": (False, nn.functional.mse_loss),
    "mse_sum": (False, lambda f, y: nn.functional.mse_loss(f, y, reduction="sum")),
    "mse_half": (False, lambda f, y: nn.functional.mse_loss(f, y) / 2),
    "mse_scaled": (False, lambda f, y: nn.functional.mse_loss(f, y) * 65536),
    "mse_negative": (False, lambda f, y: -nn.functional.mse_loss(f, y)),
    "mse_tiny": (False, lambda f, y: nn.functional.mse_loss(f, y) * 1e-30),
    "mse_weighted": (False, lambda f, y: (torch.arange(1, len(f) + 1).to(f).reshape(-1, 1) * (f - y) ** 2).sum()),
    "l1": (False, nn.functional.l1_loss),
    "huber": (False, nn.functional.huber_loss),
    "bce": (True, lambda f, y: nn.functional.binary_cross_entropy(f, in_probability(y))),
    "bce_weighted": (
        True,
        lambda f, y: nn.functional.binary_cross_entropy(f, in_probability(y), weight=y.abs() + 0.1, reduction="sum"),
    ),
    "bce_logits": (False, lambda f, y: nn.functional.binary_cross_entropy_with_logits(f, in_probability(y))),
    "bce_logits_pos_weight": (
        False,
        lambda f, y: nn.functional.binary_cross_entropy_with_logits(
            f, in_probability(y), pos_weight=torch.tensor([3.0])
        ),
    ),
    "custom": (False, lambda f, y: ((f - y).abs() + 1).log().sum() + (f * y).logsumexp(0).sum()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_cancels(name: str) -> None:
    sigmoid, loss = LOSSES[name]
    model = seeded(lambda: nn.Sequential(mlp(5, 7, 6, 1), nn.Sigmoid()) if sigmoid else mlp(5, 7, 6, 1))
    x, y = torch.randn(8, 5), torch.randn(8, 1)
    expected = reference(model, x, first="0.0" if sigmoid else "0")
    for size in (8, 1):
        found = [observe(model, x[i : i + size], lambda f, i=i: loss(f, y[i : i + size])) for i in range(0, 8, size)]
        if size == 1:
            continue
        for k in range(2):
            assert relative_error(torch.cat([pair[k] for pair in found]), expected[k]) <= 1e-5


@pytest.mark.parametrize("shortcut", [True, False], ids=["shortcut", "taps"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_cancels_at_batch_one(name: str, shortcut: bool) -> None:
    sigmoid, loss = LOSSES[name]
    model = seeded(lambda: nn.Sequential(*mlp(5, 7, 6, 1), *([nn.Sigmoid()] if sigmoid else [])))
    x, y = torch.randn(8, 5), torch.randn(8, 1)
    expected_r, expected_lambda = reference(model, x)
    result = one_by_one(model, x, y, loss, shortcut=shortcut)
    place = "model:Sigmoid" if sigmoid else "model:Linear"
    assert result.normalized_gradient_norm[place].sum.value == pytest.approx(float(expected_r.sum()), rel=1e-5)
    assert result.local_lipschitz[place].mean.value == pytest.approx(float(expected_lambda.mean()), rel=1e-5)


def one_by_one(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor], **settings: Any) -> MetricResult:
    with Monitor(model, metrics=[Lipschitz(**settings)]) as monitor:
        for i in range(len(x)):
            model.zero_grad()
            loss(model(x[i : i + 1]), y[i : i + 1]).backward()
            monitor.step()
        return monitor.compute()["lipschitz"]


def test_scaling_the_loss_up_and_down_leaves_f64_ratios_alone() -> None:
    model = seeded(lambda: mlp(5, 7, 1), dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    plain = observe(model, x, lambda f: f.square().mean())
    for scale in (65536.0, 1e-100, -3.0, 1e100):
        scaled = observe(model, x, lambda f, c=scale: f.square().mean() * c)
        assert relative_error(scaled[0], plain[0]) <= 1e-14
        assert relative_error(scaled[1], plain[1]) <= 1e-14


@pytest.mark.parametrize("logit", [-55.0, -30.0, 10.0, 20.0])
def test_saturated_logits_keep_their_ratio_in_float32(logit: float) -> None:
    # dL/dp p (1 - p) passes through values whose square underflows float32.
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1)))
    with torch.no_grad():
        model[2].bias.fill_(logit)
    x = torch.randn(6, 5)
    expected = reference(model, x)
    labels = torch.full((6, 1), float(logit > 0))  # the right class, so the gradient is about exp(-|logit|)
    found = observe(model, x, lambda f: nn.functional.binary_cross_entropy_with_logits(f, labels, reduction="sum"))
    if logit > 17:  # the sigmoid is 1 in float32: the gradient is exactly 0 and the samples are skipped
        assert found[0].isnan().all()
        return
    assert relative_error(found[0], expected[0]) <= 1e-5
    assert relative_error(found[1], expected[1]) <= 1e-5


def test_accumulated_micro_batches_are_recorded_once_each() -> None:
    model = seeded(lambda: mlp(5, 7, 1), dtype=torch.float64)
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64)
    expected_r, expected_lambda = reference(model, x)
    for size in (1, 3, 4):
        for set_to_none in (True, False):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            with Monitor(model, optimizer, metrics=[Lipschitz()]) as monitor:
                for start in range(0, 12, size):
                    (mse(model(x[start : start + size]), y[start : start + size]) * size / 12).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
                result = monitor.compute()["lipschitz"]
            ratios = result.normalized_gradient_norm["model:Linear"]
            assert ratios.sum.count == 12
            assert ratios.sum.value == pytest.approx(float(expected_r.sum()), rel=1e-12)
            lambdas = result.local_lipschitz["model:Linear"]
            assert lambdas.mean.value == pytest.approx(float(expected_lambda.mean()), rel=1e-12)
            assert lambdas.max.value == pytest.approx(float(expected_lambda.max()), rel=1e-12)


def test_permuting_samples_permutes_and_splitting_concatenates() -> None:
    model = seeded(cnn, dtype=torch.float64)
    x = torch.randn(9, 1, 8, 8, dtype=torch.float64)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    whole = observe(model, x)
    permuted = observe(model, x[order])
    halves = observe(model, x[:4]), observe(model, x[4:])
    for k in range(2):
        assert relative_error(permuted[k], whole[k][order]) <= 1e-13
        assert relative_error(torch.cat([half[k] for half in halves]), whole[k]) <= 1e-13


# ---- samples that say nothing


def test_samples_with_zero_or_non_finite_output_gradient_are_skipped_and_counted() -> None:
    model = seeded(lambda: mlp(5, 7, 1), dtype=torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64)
    expected_r, _ = reference(model, x)
    weights = torch.tensor([1.0, 0.0, math.inf, math.nan, -2.0, -0.0], dtype=torch.float64).reshape(6, 1)
    usable = torch.tensor([0, 4])
    for size, shortcut in ((6, True), (1, True), (1, False)):
        with Monitor(model, metrics=[Lipschitz(shortcut=shortcut)]) as monitor:
            for start in range(0, 6, size):
                model.zero_grad()
                output = model(x[start : start + size])
                output.backward(weights[start : start + size])
                monitor.step()
            result = monitor.compute()["lipschitz"]
        ratios = result.normalized_gradient_norm["model:Linear"]
        assert ratios.mean.count == 2
        assert ratios.sum.value == pytest.approx(float(expected_r[usable].sum()), rel=1e-12)
        skipped = result.skipped["model:Linear"].sum
        assert (skipped.value, skipped.count) == (4.0, 6)


def test_a_dead_first_layer_is_a_ratio_of_zero_not_a_skip() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    for shortcut in (True, False):
        result = one_by_one(model, torch.randn(3, 5), torch.randn(3, 1), mse, shortcut=shortcut)
        assert result.normalized_gradient_norm["model:Linear"].max.value == 0.0
        assert result.normalized_gradient_norm["model:Linear"].max.count == 3
        assert result.skipped["model:Linear"].sum.value == 0


def test_an_empty_batch_adds_nothing() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    with Monitor(model, metrics=[Lipschitz()]) as monitor:
        model(torch.zeros(0, 5)).sum().backward()
        monitor.step()
        result = monitor.compute()["lipschitz"]
    value = result.normalized_gradient_norm["model:Linear"].mean
    assert value.count == 0
    assert math.isnan(value.value)
    assert not value.valid
    assert value.note


def test_a_forward_without_backward_is_counted_as_unrecorded() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    x = torch.randn(4, 5)
    with Monitor(model, metrics=[Lipschitz()], window_steps=1) as monitor:
        for forwards in (1, 3, 1):
            for _ in range(forwards - 1):
                model(x)
            model(x).sum().backward()
            with torch.no_grad():
                model(x)
            monitor.step()
    assert [window["lipschitz"].details["unrecorded_forwards"] for window in monitor.history] == [0, 2, 0]


# ---- Theorem 1


def window_of(model: nn.Module, x: Tensor, **settings: Any) -> MetricResult:
    with Monitor(model, metrics=[Lipschitz(**settings)]) as monitor:
        model(x).sum().backward()
        return monitor.close_window()["lipschitz"]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU, nn.LeakyReLU], ids=lambda a: a.__name__)
def test_sandwich_holds_for_random_networks(activation: Callable[[], nn.Module]) -> None:
    generator = torch.Generator().manual_seed(7)
    for seed in range(25):
        n = int(torch.randint(1, 9, (), generator=generator))
        n_1 = int(torch.randint(1, n + 1, (), generator=generator))
        depth = int(torch.randint(0, 3, (), generator=generator))
        hidden = torch.randint(1, 12, (depth,), generator=generator).tolist()
        model = seeded(lambda s=(n, n_1, *hidden, 1): mlp(*s, activation=activation), seed, torch.float64)
        result = window_of(model, torch.randn(7, n, dtype=torch.float64))
        place = next(iter(result.sandwich))
        lower, middle, upper = (result.sandwich[place][side] for side in ("lower", "middle", "upper"))
        assert lower.label == middle.label == upper.label == "exact"
        assert upper.valid
        assert lower.value <= middle.value * (1 + 1e-12)
        assert middle.value <= upper.value * (1 + 1e-12)
        sigma = torch.linalg.svdvals(model[0].weight.detach())
        average = result.local_lipschitz[place].mean.value
        assert lower.value == pytest.approx(average / float(sigma[0]), rel=1e-12)
        assert upper.value == pytest.approx(average / float(sigma[-1]), rel=1e-10)


@pytest.mark.parametrize("n_1", [2, 9, 40])
def test_sandwich_lower_side_holds_without_the_upper(n_1: int) -> None:
    for seed in range(10):
        model = seeded(lambda: mlp(3 if n_1 > 2 else 1, n_1, 6, 1), seed, torch.float64)
        result = window_of(model, torch.randn(5, model[0].in_features, dtype=torch.float64))
        sides = result.sandwich["model:Linear"]
        assert sides.lower.value <= sides.middle.value * (1 + 1e-12)
        assert not sides.upper.valid
        assert math.isnan(sides.upper.value)
        assert "more outputs than inputs" in sides.upper.note


def test_sandwich_counterexample_for_a_first_layer_wider_than_its_input() -> None:
    # f(x) = relu(x + 1) - relu(x + 1): lambda is 0 while ||grad_b f|| is sqrt 2, so the printed upper bound fails.
    model = mlp(1, 2, 1).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(1.0)
        model[2].weight.copy_(torch.tensor([[1.0, -1.0]]))
    result = window_of(model, torch.ones(3, 1, dtype=torch.float64))
    sides = result.sandwich["model:Linear"]
    assert result.local_lipschitz["model:Linear"].max.value == 0.0
    assert sides.middle.value == pytest.approx(math.sqrt(2), rel=1e-15)
    assert sides.lower.value == 0.0
    assert sides.upper.valid is False


def test_sandwich_of_a_rank_deficient_first_layer_is_bounded_by_infinity() -> None:
    model = seeded(lambda: mlp(5, 3, 1), dtype=torch.float64)
    with torch.no_grad():
        model[0].weight[2] = model[0].weight[1]
    upper = window_of(model, torch.randn(4, 5, dtype=torch.float64)).sandwich["model:Linear"].upper
    assert (upper.value, upper.valid) == (math.inf, False)
    assert "rank" in upper.note


@pytest.mark.parametrize("size", [1, 4], ids=["shortcut", "taps"])
def test_sandwich_is_heuristic_only_when_w_1_moved_within_the_window(size: int) -> None:
    model = seeded(lambda: mlp(5, 4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, metrics=[Lipschitz()]) as monitor:
        train(model, batches(3, size), optimizer)
        moved = monitor.close_window()["lipschitz"].sandwich["model:Linear"]
        model[0].weight.requires_grad_(False)
        train(model, batches(3, size), optimizer)
        fixed = monitor.close_window()["lipschitz"].sandwich["model:Linear"]
    assert moved.lower.label == moved.middle.label == moved.upper.label == "heuristic"
    assert "moved within the window" in moved.lower.note
    assert fixed.lower.label == fixed.upper.label == "exact"
    assert fixed.lower.note == ""


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (2, 9)),
    "conv2d_strided": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 6, 6)),
    "conv2d_circular": (lambda: nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), (1, 6, 6)),
    "conv2d_groups": (lambda: nn.Conv2d(4, 4, 3, groups=2), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, dilation=2), (1, 4, 4, 4)),
    "conv2d_many_inputs": (lambda: nn.Conv2d(3, 2, 3), (3, 15, 15)),
    "conv1d_many_inputs": (lambda: nn.Conv1d(2, 1, 5, padding=2, padding_mode="reflect"), (2, 300)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_largest_singular_value_of_a_convolution(name: str) -> None:
    build, shape = CONVOLUTIONS[name]
    for seed in range(3):
        layer = seeded(build, seed, torch.float64)
        inputs = math.prod(shape)
        layer.bias.detach().zero_()
        with torch.no_grad():
            matrix = layer(torch.eye(inputs, dtype=torch.float64).reshape(inputs, *shape)).reshape(inputs, -1)
        expected = float(torch.linalg.svdvals(matrix)[0])
        found = singular_values(layer, (1, *shape))
        assert found is not None
        assert found.smallest is None
        # Iteration approaches it from below; the sandwich's lower side is overstated by no more than this.
        assert found.largest == pytest.approx(expected, rel=1e-4 if "many_inputs" in name else 1e-12)
        assert found.largest <= expected * (1 + 1e-9)


def test_sandwich_of_a_convolution_has_only_its_lower_side() -> None:
    model = seeded(cnn, dtype=torch.float64)
    sides = window_of(model, torch.randn(5, 1, 8, 8, dtype=torch.float64)).sandwich["model:Linear"]
    assert sides.lower.valid
    assert 0 < sides.lower.value <= sides.middle.value
    assert not sides.upper.valid
    assert "smallest singular value is not known" in sides.upper.note


@pytest.mark.parametrize("shape", [(600, 530), (530, 600)])
def test_singular_values_of_a_large_linear_layer(shape: tuple[int, int]) -> None:
    layer = seeded(lambda: nn.Linear(*shape), dtype=torch.float64)
    found = singular_values(layer, (1, shape[0]))
    assert found is not None
    assert found.smallest is None
    assert found.largest == pytest.approx(float(torch.linalg.svdvals(layer.weight.detach())[0]), rel=1e-8)


# ---- steadiness


def test_steadiness_is_the_suffix_maximum_of_r() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    largest = []
    with Monitor(model, optimizer, metrics=[Lipschitz()], window_steps=2) as monitor:
        for pair in zip(batches(12, 4)[::2], batches(12, 4)[1::2], strict=True):
            highest = 0.0
            for x, y in pair:
                highest = max(highest, float(reference_outside(model, x).max()))
                train(model, [(x, y)], optimizer)
            largest.append(highest)
    within = [window["lipschitz"].steadiness["model:Linear"].max.value for window in monitor.history]
    assert within == pytest.approx(largest, rel=1e-5)
    curve = monitor.history.steadiness("model:Linear")
    assert curve == pytest.approx([max(largest[i:]) for i in range(6)], rel=1e-5)
    assert all(a >= b for a, b in itertools.pairwise(curve))


def reference_outside(model: nn.Sequential, x: Tensor) -> Tensor:
    """The reference for a model that is being watched: of an untouched model with the same parameters."""
    twin = mlp(5, 7, 1)
    twin.load_state_dict(model.state_dict())
    return reference(twin, x)[0]


# ---- BatchNorm


def with_batchnorm(**settings: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7, **settings), nn.ReLU(), nn.Linear(7, 1))


def test_batchnorm_in_train_mode_warns_once_and_labels_heuristic() -> None:
    model = seeded(with_batchnorm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(model, optimizer, metrics=[Lipschitz()], window_steps=2) as monitor:
            train(model, batches(6, 4), optimizer)
    assert [str(w.message).startswith("BatchNorm in train mode") for w in caught] == [True]
    for window in monitor.history:
        result = window["lipschitz"]
        for quantity in ("normalized_gradient_norm", "local_lipschitz", "sandwich", "steadiness"):
            for value in result[quantity]["model:Linear"].values():
                assert value.label == "heuristic"
                assert "BatchNorm" in value.note or not value.valid


def test_batchnorm_in_eval_mode_is_exact_again_in_the_next_window() -> None:
    model = seeded(with_batchnorm)
    with Monitor(model, metrics=[Lipschitz()]) as monitor, pytest.warns(UserWarning, match="mixes samples"):
        model(torch.randn(4, 5)).sum().backward()
        monitor.step()
        assert monitor.close_window()["lipschitz"].normalized_gradient_norm["model:Linear"].mean.label == "heuristic"
        model.eval()
        model(torch.randn(4, 5)).sum().backward()
        assert monitor.close_window()["lipschitz"].normalized_gradient_norm["model:Linear"].mean.label == "exact"


def test_batchnorm_without_running_statistics_mixes_samples_in_eval_mode_too() -> None:
    model = seeded(lambda: with_batchnorm(track_running_stats=False)).eval()
    with Monitor(model, metrics=[Lipschitz()]) as monitor, pytest.warns(UserWarning, match="mixes samples"):
        model(torch.randn(4, 5)).sum().backward()
        assert monitor.close_window()["lipschitz"].normalized_gradient_norm["model:Linear"].mean.label == "heuristic"
    with pytest.raises(ValueError, match="mixes samples"):
        local_lipschitz(model, torch.randn(4, 5))


# ---- outputs with several values


def test_vector_output_is_refused_with_its_shape_and_the_choices() -> None:
    model = seeded(lambda: mlp(5, 7, 3))
    with (
        pytest.warns(RuntimeWarning, match="stopped recording"),
        pytest.raises(ValueError, match=r"shape \[4, 3\].*output='<module>'.*quantity='residual'"),
        Monitor(model, metrics=[Lipschitz()]),
    ):
        model(torch.randn(4, 5)).sum().backward()


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "sum"])
def test_residual_is_a_one_sided_bound(loss: str) -> None:
    model = seeded(lambda: mlp(5, 4, 8, 3, activation=nn.Tanh), dtype=torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64)
    labels, targets = torch.randint(0, 3, (6,)), torch.randn(6, 3, dtype=torch.float64)
    functions = {
        "cross_entropy": lambda z: nn.functional.cross_entropy(z, labels),
        "mse": lambda z: nn.functional.mse_loss(z, targets),
        "sum": lambda z: z.sum(),
    }
    spectral = [float(torch.linalg.svdvals(torch.func.jacrev(model)(row).detach())[0]) for row in x]
    z = model(x).detach().requires_grad_()
    (upstream,) = torch.autograd.grad(functions[loss](z), z)
    exact = [
        float((torch.func.jacrev(model)(row).detach().T @ g).norm() / g.norm())
        for row, g in zip(x, upstream, strict=True)
    ]
    metric = Lipschitz(quantity="residual")
    with Monitor(model, metrics=[metric]) as monitor:
        functions[loss](model(x)).backward()
        q = metric.per_sample.local_lipschitz
        result = monitor.compute()["lipschitz"]
    assert all(float(value) <= bound * (1 + 1e-12) for value, bound in zip(q, spectral, strict=True))
    assert q.tolist() == pytest.approx(exact, rel=1e-11)
    assert result.details["quantity"] == "residual"
    for quantity in ("normalized_gradient_norm", "local_lipschitz", "steadiness"):
        assert all(value.label == "one-sided" for value in result[quantity]["model:Linear"].values())
    assert "sandwich" not in result


def test_residual_of_a_scalar_output_is_the_scalar_quantity() -> None:
    model = seeded(lambda: mlp(5, 7, 1), dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    for found, expected in zip(observe(model, x, quantity="residual"), reference(model, x), strict=True):
        assert relative_error(found, expected) <= 1e-12


# ---- which layer, which output


def two_headed() -> Graph:
    def rule(m: Any, x: Tensor) -> dict[str, Tensor]:
        h = m.body(m.stem(x)).relu()
        return {"value": m.value(h), "policy": m.policy(h)}

    return Graph(rule, stem=nn.Linear(5, 6), body=nn.Linear(6, 7), value=nn.Linear(7, 1), policy=nn.Linear(7, 3))


def test_named_output_and_named_input() -> None:
    model = seeded(two_headed, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    both = lambda out: out["value"].square().sum() + 0.0 * out["policy"].sum()  # noqa: E731
    expected = reference(model, x, first="stem", head="value")
    for found, wanted in zip(observe(model, x, both, output="value"), expected, strict=True):
        assert relative_error(found, wanted) <= 1e-12
    stem = copy.deepcopy(model.stem)
    rest = Graph(
        lambda m, h: m.value(m.body(h).relu()), body=copy.deepcopy(model.body), value=copy.deepcopy(model.value)
    )
    expected = reference(rest, stem(x).detach(), first="body")
    for found, wanted in zip(observe(model, x, both, input="body", output="value"), expected, strict=True):
        assert relative_error(found, wanted) <= 1e-12


def test_the_output_stands_in_the_keys_because_it_changes_the_answer() -> None:
    model = seeded(
        lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1), nn.Sigmoid()), dtype=torch.float64
    )
    x = torch.randn(4, 5, dtype=torch.float64)
    probabilities = window_of(model, x)
    logits = window_of(model, x, output="2")
    assert list(probabilities.normalized_gradient_norm) == ["model:Sigmoid"]
    assert list(logits.normalized_gradient_norm) == ["2:Linear"]
    p = model(x).detach().reshape(-1)
    r_logit, _ = reference(model, x, head="2")
    mean = probabilities.normalized_gradient_norm["model:Sigmoid"].mean.value
    assert mean == pytest.approx(float((r_logit * p * (1 - p)).mean()), rel=1e-12)
    assert logits.normalized_gradient_norm["2:Linear"].mean.value == pytest.approx(float(r_logit.mean()), rel=1e-12)


@pytest.mark.parametrize(
    ("build", "place"),
    [
        (lambda: Graph(lambda m, x: m.b(m.a(x)), a=nn.Linear(5, 7), b=nn.Linear(7, 1)), "model"),
        (lambda: Graph(lambda m, x: m.b(m.a(x)).sigmoid(), a=nn.Linear(5, 7), b=nn.Linear(7, 1)), "model:Sigmoid"),
        (lambda: Graph(lambda m, x: m.a(x).squeeze(1), a=nn.Linear(5, 1)), "model"),
    ],
    ids=["custom", "functional_sigmoid", "squeezed"],
)
def test_places_of_custom_models(build: Callable[[], nn.Module], place: str) -> None:
    assert list(window_of(seeded(build), torch.randn(4, 5)).normalized_gradient_norm) == [place]


def test_the_first_layer_is_the_one_that_runs_first() -> None:
    def build() -> nn.Module:
        return Graph(
            lambda m, x: m.last(m.middle(m.early(x)).relu()),
            last=nn.Linear(7, 1),
            unused=nn.Linear(5, 5),
            middle=nn.Linear(6, 7),
            early=nn.Linear(5, 6),
        )

    model = seeded(build, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = reference(model, x, first="early")
    for found, wanted in zip(observe(model, x), expected, strict=True):
        assert relative_error(found, wanted) <= 1e-12
    assert window_of(model, x).details["first_layer"] == "early"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": "1"}, "input: module '1' is a ReLU; the first layer must be a Linear"),
        ({"input": "o"}, r"input: the model has no module named 'o'.*'0'"),
        ({"output": "head"}, r"output: the model has no module named 'head'.*'0', '1', '2'"),
        ({"input": "nope.2"}, r"input: the model has no module named 'nope\.2'; did you mean '2'\?"),
    ],
    ids=["wrong_kind", "unknown_input", "unknown_output", "did_you_mean"],
)
def test_wrong_names_are_refused_at_once(settings: dict[str, str], message: str) -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    with pytest.raises(ValueError, match=message):
        Monitor(model, metrics=[Lipschitz(**settings)])
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not any(module._forward_hooks for module in model)


def test_a_misspelt_name_is_answered_with_the_nearest_one() -> None:
    model = seeded(two_headed)
    with pytest.raises(ValueError, match=r"output: .*'valeu'; did you mean 'value'\?"):
        Monitor(model, metrics=[Lipschitz(output="valeu")])


def test_quantity_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="quantity: expected 'scalar' or 'residual', got 'jacobian'"):
        Lipschitz(quantity="jacobian")


REFUSED_AT_THE_FIRST_PASS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "returns_a_dict": (two_headed, (4, 5), r"output: model returns a dict, not a tensor.*output='<module>'"),
    "returns_a_tuple": (
        lambda: Graph(lambda m, x: (m.a(x), x), a=nn.Linear(5, 1)),
        (4, 5),
        r"output: model returns a tuple, not a tensor",
    ),
    "flattened_batch": (
        lambda: Graph(lambda m, x: m.b(m.a(x.flatten(0, 1)).reshape(4, -1)), a=nn.Linear(5, 2), b=nn.Linear(6, 1)),
        (4, 3, 5),
        r"input: first layer 'a' has 12 rows, model has 4; .*first dimension",
    ),
    "batch_not_first": (
        lambda: Graph(lambda m, x: m.b(m.a(x).mean(0)), a=nn.Linear(5, 2), b=nn.Linear(2, 1)),
        (3, 4, 5),
        r"input: first layer 'a' has 3 rows, model has 4",
    ),
    "called_twice": (
        lambda: Graph(lambda m, x: m.b(m.a(m.a(x))), a=nn.Linear(5, 5), b=nn.Linear(5, 1)),
        (4, 5),
        r"module 'a' is called twice in one forward pass",
    ),
    "tokens_out": (
        lambda: Graph(lambda m, x: m.a(x), a=nn.Linear(5, 1)),
        (4, 3, 5),
        r"output: model has shape \[4, 3, 1\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED_AT_THE_FIRST_PASS)
def test_what_cannot_be_measured_is_refused_by_name(name: str) -> None:
    build, shape, message = REFUSED_AT_THE_FIRST_PASS[name]
    model = seeded(build)

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        out = model(torch.linspace(-1, 1, math.prod(shape)).reshape(shape))
        total = (
            out if isinstance(out, Tensor) else sum(t.sum() for t in (out.values() if isinstance(out, dict) else out))
        )
        total.sum().backward()
        return {key: p.grad.clone() for key, p in model.named_parameters()}

    undisturbed = run()
    with pytest.warns(RuntimeWarning, match="stopped recording"), pytest.raises(ValueError, match=message):
        with Monitor(model, metrics=[Lipschitz()]):
            watched = run()
    assert all(torch.equal(undisturbed[key], watched[key]) for key in undisturbed)


def test_a_squeezed_output_of_a_last_batch_of_one_is_still_one_value_per_sample() -> None:
    model = seeded(lambda: Graph(lambda m, x: m.b(m.a(x).relu()).squeeze(), a=nn.Linear(5, 7), b=nn.Linear(7, 1)))
    with Monitor(model, metrics=[Lipschitz()]) as monitor:
        for size in (4, 1):
            model(torch.randn(size, 5)).sum().backward()
            monitor.step()
        assert monitor.compute()["lipschitz"].normalized_gradient_norm["model"].mean.count == 5


# ---- per_sample


def test_per_sample_says_when_it_has_nothing() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    metric = Lipschitz()
    with Monitor(model, metrics=[metric]):
        with pytest.raises(RuntimeError, match="none was recorded yet"):
            _ = metric.per_sample
        model(torch.randn(3, 5)).sum().backward()
        assert metric.per_sample.local_lipschitz.shape == (3,)
        for _ in range(2):  # the second is served by the shortcut, which keeps nothing
            model.zero_grad()
            model(torch.randn(1, 5)).sum().backward()
        with pytest.raises(RuntimeError, match="batch-1 shortcut"):
            _ = metric.per_sample


# ---- the metric alone


def test_a_metric_alone_keeps_its_own_clock() -> None:
    model = seeded(lambda: mlp(5, 7, 1), dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected, _ = reference(model, x)
    metric = Lipschitz(model)
    for _ in range(3):
        model(x).sum().backward()
        metric.update()
    result = metric.compute()
    assert result.normalized_gradient_norm["model:Linear"].sum.count == 12
    assert result.normalized_gradient_norm["model:Linear"].mean.value == pytest.approx(
        float(expected.mean()), rel=1e-12
    )
    metric.reset()
    assert metric.compute().normalized_gradient_norm["model:Linear"].mean.count == 0
    metric.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="no model of its own"):
        Lipschitz().update()


def test_merging_two_windows_gives_the_distribution_of_both() -> None:
    model = seeded(lambda: mlp(5, 7, 1), dtype=torch.float64)
    x = torch.randn(10, 5, dtype=torch.float64)
    parts = []
    for rows in (x, x[:3], x[3:]):
        metric = Lipschitz()
        with Monitor(model, metrics=[metric]):
            model(rows).sum().backward()
        parts.append(metric)
    whole, first, second = parts
    first.merge(second)
    for quantity in ("normalized_gradient_norm", "local_lipschitz"):
        expected, found = (metric.finalize()[quantity]["model:Linear"] for metric in (whole, first))
        for reducer in expected:
            assert found[reducer].count == 10
            assert found[reducer].value == pytest.approx(expected[reducer].value, rel=1e-14)


# ---- local_lipschitz


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize(
    "case", ["linear", "conv2d", "attention_after", "batchnorm_eval", "output_vector", "frozen_layer"]
)
def test_local_lipschitz_is_the_norm_of_the_input_gradient(case: str, dtype: torch.dtype, tolerance: float) -> None:
    build, shape, first = LEMMA[case]
    model = seeded(build, dtype=dtype)
    x = torch.randn(6, *shape, dtype=dtype)
    _, expected = reference(model, x, first=first)
    found = local_lipschitz(model, x)
    assert expected is not None
    assert (found.dtype, found.requires_grad) == (torch.float64, False)
    assert relative_error(found, expected) <= tolerance


def test_local_lipschitz_of_one_of_several_outputs() -> None:
    model = seeded(lambda: mlp(5, 7, 3), dtype=torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64)
    jacobians = torch.func.vmap(torch.func.jacrev(model))(x)
    for index in (0, 2, -1):
        assert relative_error(local_lipschitz(model, x, output=index), jacobians[:, index].norm(dim=1)) <= 1e-12
    difference = local_lipschitz(model, x, output=lambda z: z[:, 0] - z[:, 1])
    assert relative_error(difference, (jacobians[:, 0] - jacobians[:, 1]).norm(dim=1)) <= 1e-12
    spectral = local_lipschitz(model, x, quantity="jacobian")
    assert relative_error(spectral, torch.linalg.svdvals(jacobians)[:, 0]) <= 1e-12


def test_local_lipschitz_leaves_model_and_input_alone() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    x = torch.randn(4, 5, requires_grad=True)
    model(x).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    kept, x_grad = x.detach().clone(), x.grad.clone()
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            local_lipschitz(model, x)
            assert torch.is_grad_enabled() == (context is torch.enable_grad)
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))
    assert torch.equal(x, kept)
    assert torch.equal(x.grad, x_grad)


@pytest.mark.parametrize("quantity", ["scalar", "jacobian"])
def test_local_lipschitz_of_no_samples(quantity: str) -> None:
    found = local_lipschitz(seeded(lambda: mlp(5, 7, 1)), torch.zeros(0, 5), quantity=quantity)
    assert (found.shape, found.dtype) == ((0,), torch.float64)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("shortcut", [True, False], ids=["shortcut", "taps"])
def test_local_lipschitz_is_not_recorded_by_a_monitor(size: int, shortcut: bool) -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, metrics=[Lipschitz(shortcut=shortcut)]) as monitor:
        for batch in batches(3, size):
            train(model, [batch], optimizer)
            local_lipschitz(model, torch.randn(6, 5))
        result = monitor.compute()["lipschitz"]
    assert result.local_lipschitz["model:Linear"].mean.count == 3 * size
    assert result.details["unrecorded_forwards"] == 0


def constant() -> nn.Module:
    return Graph(lambda m, x: m.a(torch.ones(len(x), 5)), a=nn.Linear(5, 1))


def detached() -> nn.Module:
    return Graph(lambda m, x: m.a(x).detach(), a=nn.Linear(5, 1))


LOCAL_ERRORS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], type[Exception], str]] = {
    "x_list": (lambda: mlp(5, 1), [1.0], {}, TypeError, "x: expected a tensor, got list"),
    "x_integers": (
        lambda: mlp(5, 1),
        torch.ones(2, 5, dtype=torch.long),
        {},
        TypeError,
        "x: expected a floating tensor",
    ),
    "x_scalar": (lambda: mlp(5, 1), torch.tensor(1.0), {}, ValueError, r"x: expected shape \[B, \.\.\.\]"),
    "vector_output": (lambda: mlp(5, 3), torch.ones(2, 5), {}, ValueError, r"output: .*shape \[2, 3\].*jacobian"),
    "index_too_large": (lambda: mlp(5, 3), torch.ones(2, 5), {"output": 3}, ValueError, "output: index 3 does not fit"),
    "index_into_one_dimension": (
        lambda: nn.Sequential(mlp(5, 1), nn.Flatten(0)),
        torch.ones(2, 5),
        {"output": 0},
        ValueError,
        r"output: index 0 does not fit the model's output of shape \[2\]",
    ),
    "callable_reduces_everything": (
        lambda: mlp(5, 3),
        torch.ones(2, 5),
        {"output": lambda z: z.sum()},
        ValueError,
        r"output: .*shape \[\] for 2 samples",
    ),
    "dict_output": (two_headed, torch.ones(2, 5), {}, ValueError, "output: the model returns a dict"),
    "quantity": (lambda: mlp(5, 1), torch.ones(2, 5), {"quantity": "norm"}, ValueError, "quantity: expected 'scalar'"),
    "jacobian_of_a_dict": (two_headed, torch.ones(2, 5), {"quantity": "jacobian"}, ValueError, "quantity: 'jacobian'"),
    "batchnorm": (
        with_batchnorm,
        torch.ones(2, 5),
        {},
        ValueError,
        r"model: module '1' is a BatchNorm1d in train mode",
    ),
    "constant": (constant, torch.ones(2, 5), {}, ValueError, "model: its output does not depend on x"),
    "detached": (detached, torch.ones(2, 5), {}, ValueError, "model: its output does not depend on x"),
}


@pytest.mark.parametrize("name", LOCAL_ERRORS)
def test_local_lipschitz_names_what_is_wrong(name: str) -> None:
    build, x, settings, error, message = LOCAL_ERRORS[name]
    with pytest.raises(error, match=message):
        local_lipschitz(seeded(build), x, **settings)
