"""Calls under torch.inference_mode leave nothing behind that the next step could not write to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from few import few, spread
from torch import nn
from wrappers import mlp

from lipcore import Distribution, Lipschitz, Monitor, PerSampleGradNorms, TensorStats, Trajectory

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))


def metrics() -> list[Any]:
    return [
        Trajectory(stats=["update_norm", "variance", "element_variance", "grad_norm", "distance"], window_blocks=1),
        Lipschitz(),
        TensorStats(every_steps=1),
        PerSampleGradNorms(loss_reduction="mean"),
    ]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


CALLS: dict[str, Callable[[Monitor, dict[str, Any]], object]] = {
    "compute": lambda m, state: m.compute(),
    "flush": lambda m, state: m.flush(),
    "close_window": lambda m, state: m.close_window(),
    "load_state_dict": lambda m, state: m.load_state_dict(state),
    "state_dict": lambda m, state: m.load_state_dict(m.state_dict()),
    "rebind": lambda m, state: m.rebind(),
    "reset": lambda m, state: [metric.reset() for metric in m.metrics.values()],
    "rebase": lambda m, state: m.metrics["trajectory"].rebase(),
    "set_reference": lambda m, state: m.metrics["trajectory"].set_reference(),
    "drain": lambda m, state: m.metrics["trajectory"].drain(),
    "probe": lambda m, state: m.probe(X, "x"),
    "set_ids": lambda m, state: m.metrics["per_sample_grad_norm"].set_ids(range(6)),
    "norms": lambda m, state: m.metrics["per_sample_grad_norm"].per_layer,
}


@pytest.mark.parametrize("blocks", few([1, 2], 1))
@pytest.mark.parametrize("name", spread(CALLS, 3))
def test_training_goes_on_after_it(name: str, blocks: int) -> None:
    """And all numbers are those of a run that made the call in ordinary mode."""
    seen = []
    for mode in (contextlib.nullcontext, torch.inference_mode):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kept = metrics() if blocks == 1 else [Trajectory(), PerSampleGradNorms(loss_reduction="mean")]
        with Monitor(model, optimizer, kept, window_steps=20, window_blocks=blocks) as monitor:
            for _ in range(7):
                step(model, optimizer)
            state = monitor.state_dict()
            with mode():
                CALLS[name](monitor, state)
            for _ in range(30):
                step(model, optimizer)
            seen.append([window.flat("tensor") for window in (*monitor.history, monitor.compute())])
    assert all(one == pytest.approx(other, nan_ok=True) for one, other in zip(*seen, strict=True))


@pytest.mark.parametrize("when", ["all of it", "the monitor alone"])
def test_a_monitor_made_there(when: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.inference_mode():
        monitor = Monitor(model, optimizer, metrics())
    for _ in range(3):
        step(model, optimizer)
    if when == "all of it":
        with torch.inference_mode():
            monitor.close()
    window = monitor.compute()
    assert window.steps == 3
    assert window["per_sample_grad_norm"].norm["total"].mean.count == 18
    monitor.close()


def test_metrics_that_stand_alone() -> None:
    model = mlp()
    with torch.inference_mode():
        trajectory, distribution = Trajectory(model), Distribution()
        distribution.observe(torch.ones(3))
    for _ in range(600):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01)
        trajectory.update()
    with torch.inference_mode():
        assert trajectory.compute().path_length["total"].sum.value > 0
        trajectory.reset()
    trajectory.update()
    distribution.observe(torch.ones(3))
    assert distribution.count == 6
