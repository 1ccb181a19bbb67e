"""What must not matter (loss, reduction, scale, weights, accumulation), and samples that say nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import cnn, mlp, mse, observe, reference, relative_error, seeded
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor
from lipcore.metric.results import MetricResult


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
    result = one_by_one(model, x, y, loss, batch_of_one="fast" if shortcut else "exact")
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
        with Monitor(model, metrics=[Lipschitz(batch_of_one="fast" if shortcut else "exact")]) as monitor:
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
        result = one_by_one(
            model, torch.randn(3, 5), torch.randn(3, 1), mse, batch_of_one="fast" if shortcut else "exact"
        )
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
