"""Copies and pickles of what watches a model: all numbers, no model, nothing recorded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batches, mlp, seeded
from torch import nn
from windows import assert_same

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, TensorStats, Trajectory


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, pickled])


def trained(metrics: list[Any] | None, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer, Monitor]:
    model = seeded(lambda: mlp(5, 7, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = Monitor(model, optimizer, metrics=metrics, **settings)
    step(model, optimizer, 5)
    return model, optimizer, monitor


def step(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for x, y in batches(steps, 4):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


@COPIES
@pytest.mark.parametrize("many", [True, False], ids=["all", "default"])
def test_a_monitor(copied: Callable[[Any], Any], many: bool) -> None:
    metrics = [Trajectory(groups=lambda name: "all"), Lipschitz(), PerSampleGradNorms(loss_reduction="mean")]
    model, optimizer, monitor = trained(metrics if many else None, window_steps=2)
    other = copied(monitor)
    expected = monitor.compute()
    assert_same(other.compute(), expected)
    assert [window.steps for window in other.history] == [2, 2]
    assert other.model is None
    assert "holds numbers" in str(other.plan())
    step(model, optimizer, 2)
    assert_same(other.compute(), expected)
    other.step()
    assert_same(other.compute(), expected)
    assert monitor.compute()["trajectory"].path_length["total"].cumulative.value > 0
    other.close()
    monitor.close()


@COPIES
@pytest.mark.parametrize("make", [Trajectory, Lipschitz, TensorStats])
def test_a_metric(copied: Callable[[Any], Any], make: Callable[[], Any]) -> None:
    metric = make()
    model, _, monitor = trained([metric])
    other = copied(metric)
    assert type(other) is type(metric)
    assert_same(other.compute(), monitor.compute()[metric.name])
    with pytest.raises(RuntimeError, match="is a copy"):
        Monitor(model, metrics=[other])
    assert_same(copied(other).compute(), other.compute())


@COPIES
@pytest.mark.parametrize("make", [Trajectory, Lipschitz, TensorStats, lambda: PerSampleGradNorms(loss_reduction="sum")])
def test_what_watches_nothing_yet(copied: Callable[[Any], Any], make: Callable[[], Any]) -> None:
    _, _, monitor = trained([copied(make())])
    assert monitor.compute().steps == 5


def test_a_model_that_is_copied_with_its_monitor_trains_unwatched() -> None:
    model, optimizer, monitor = trained(None)
    other, _, watched = copy.deepcopy((model, optimizer, monitor))
    before = watched.compute().to_dict()
    step(other, torch.optim.SGD(other.parameters(), lr=0.1), 3)
    assert watched.compute().to_dict() == before
