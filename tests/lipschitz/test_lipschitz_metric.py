"""Lipschitz by itself: per_sample, its own clock, merging."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import mlp, reference, seeded
from torch import nn

from lipcore import Lipschitz, Monitor


def test_per_sample_says_when_it_has_nothing() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    metric = Lipschitz(batch_of_one="fast")
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


@pytest.mark.parametrize("name", ["input", "output"])
def test_choices_of_another_kind_are_refused_at_once(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected the name of .*got 0"):
        Lipschitz(**{name: 0})  # type: ignore[arg-type]


def test_a_window_without_a_lambda_says_how_often_there_is_one() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    notes = []
    for every in (3, 1):
        metric = Lipschitz(lambda_every=every)
        with Monitor(model, optimizer, [metric], window_steps=1) as monitor:
            for _ in range(3):
                model(torch.randn(6, 5)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            found = [window["lipschitz"].local_lipschitz["model:Linear"].mean for window in monitor.history]
        assert all(value.valid or value.note for value in found)
        notes.append([value.note for value in found if not value.valid])
    assert notes[1] == []  # as the note says
    assert set(notes[0]) == {
        "no micro-batch of this window had one: lambda every 3 micro-batches; lambda_every=1 takes one in each"
    }


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


class Rateless(torch.optim.Optimizer):
    """An optimizer that finds a rate of its own: its groups have none, or None (Adafactor)."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=0.1)


@pytest.mark.parametrize("settings", [{}, {"lr": None}, {"lr": "auto"}])
def test_an_optimizer_without_a_learning_rate(settings: dict[str, Any]) -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = Rateless(model.parameters(), **settings)
    with Monitor(model, optimizer, [Lipschitz()], window_steps=None) as monitor:
        for _ in range(3):
            model(torch.randn(3, 5)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        window = monitor.compute()
    assert window is not None
    assert window["lipschitz"].local_lipschitz["model:Linear"].mean.count == 9
    assert window["lipschitz"].details["first_bias"]["learning_rate"] is None


def test_merging_two_windows_gives_the_distribution_of_both() -> None:
    model = seeded(lambda: mlp(5, 7, 1), dtype=torch.float64)
    x = torch.randn(10, 5, dtype=torch.float64)
    parts = []
    for rows in (x, x[:3], x[3:]):
        metric = Lipschitz(batch_of_one="fast")
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


def test_merge_of_sliding_windows_takes_all_blocks_and_labels() -> None:
    metrics = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), 0.1 * seed)  # the first one's weights stay
        metrics.append(Lipschitz())
        Monitor(model, optimizer, metrics=metrics[-1:], window_steps=4, window_blocks=2)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().mean().backward()
            optimizer.step()
    first, second = metrics
    counts = [metric.compute().local_lipschitz["model:Linear"].mean.count for metric in metrics]
    assert counts == [24, 24]
    assert not first.compute().details["first_weight_moved"]
    first.merge(second)
    found = first.compute()
    assert found.local_lipschitz["model:Linear"].mean.count == 48
    assert found.details["first_weight_moved"]
    with pytest.raises(ValueError, match="other: this Lipschitz is a copy"):
        first.merge(copy.deepcopy(second))
