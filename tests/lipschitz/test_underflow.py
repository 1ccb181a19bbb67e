"""Gradients at the output that are subnormal in their dtype have lost digits: no ratio is made of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lipcore import Lipschitz, Monitor


@pytest.mark.parametrize(
    ("dtype", "scale", "recorded"),
    [
        (torch.float16, 1e-6, False),
        (torch.float16, 1.0, True),
        (torch.float32, 1e-42, False),
        (torch.float32, 1e-30, True),
    ],
)
def test_subnormal_gradients_count_as_none(dtype: torch.dtype, scale: float, recorded: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, [Lipschitz()]) as monitor:
        (model(torch.randn(5, 3, dtype=dtype)).float() * scale).sum().backward()
        optimizer.step()
        result = monitor.compute()["lipschitz"]
        values = monitor.metrics["lipschitz"].per_sample.normalized_gradient_norm
    found = result.normalized_gradient_norm["model:Linear"].mean
    assert found.count == (5 if recorded else 0)
    assert result.skipped["model:Linear"]["sum"].value == (0 if recorded else 5)
    assert bool(values.isnan().all()) is not recorded
    assert math.isfinite(found.value) is recorded
