"""What tests ask of windows, of a model that was watched, and of the shortcut."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor
from lipcore.metric.results import MetricResult, Window


def served(monitor: Monitor) -> int:
    """How many batches of one the shortcut has taken over."""
    shortcut = monitor._capture._shortcut
    return 0 if shortcut is None else shortcut.served


def assert_same(found: Window | MetricResult, expected: Window | MetricResult, rel: float = 1e-12) -> None:
    one, other = found.flat("tensor"), expected.flat("tensor")
    assert one.keys() == other.keys()
    for key, value in other.items():
        assert one[key] == pytest.approx(value, rel=rel, abs=0, nan_ok=True), key


def assert_unhooked(model: nn.Module) -> None:
    for module in model.modules():
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            assert not hooks
    for parameter in model.parameters():
        assert not parameter._backward_hooks
        assert not getattr(parameter, "_post_accumulate_grad_hooks", None)


def ratios_of(window: Window | MetricResult) -> tuple[int, float, float]:
    """(samples, sum of r, mean of lambda) of the only place."""
    result = window["lipschitz"] if isinstance(window, Window) else window
    (place,) = result.normalized_gradient_norm
    r = result.normalized_gradient_norm[place]
    return r.sum.count, r.sum.value, result.local_lipschitz[place].mean.value


def window_of(model: nn.Module, x: Tensor, **settings: Any) -> MetricResult:
    with Monitor(model, metrics=[Lipschitz(**settings)]) as monitor:
        model(x).sum().backward()
        monitor.step()
        return monitor.close_window()["lipschitz"]
