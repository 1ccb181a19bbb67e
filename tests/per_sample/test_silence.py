"""A loop in which no per-sample norm can be recorded is told, once, with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lipcore import Monitor, PerSampleGradNorms


def run(steps: int, prepare: Callable[[PerSampleGradNorms, torch.Tensor], None], **settings: Any) -> list[str]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metric = PerSampleGradNorms(**settings)
    with warnings.catch_warnings(record=True) as caught, Monitor(model, optimizer, [metric]):
        warnings.simplefilter("always")
        for _ in range(steps):
            loss = model(torch.randn(5, 3)).square().mean()
            prepare(metric, loss)
            loss.backward()
            optimizer.step()
    return [str(one.message) for one in caught if "no sample" in str(one.message)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"loss_reduction": "auto"}, "set_loss"), ({"loss_reduction": "mean", "loss_terms": "n_items"}, "n_items")],
    ids=str,
)
def test_it_is_told_once_with_the_reason(settings: dict[str, Any], words: str) -> None:
    told = run(12, lambda metric, loss: None, **settings)
    assert len(told) == 1
    assert "in 4 steps" in told[0]
    assert words in told[0]
    assert not run(3, lambda metric, loss: None, **settings)


def test_where_numbers_come_nothing_is_said() -> None:
    assert not run(12, lambda metric, loss: metric.set_loss(loss), loss_reduction="auto")
    assert not run(12, lambda metric, loss: None, loss_reduction="mean")
