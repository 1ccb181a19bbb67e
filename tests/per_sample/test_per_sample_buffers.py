"""Buffers that a loader fills anew between the forward pass, the backward pass and the step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import Graph
from per_sample_models import made, mlp, sum_loss
from torch import Tensor, nn

from lipcore import Monitor, PerSampleGradNorms


@pytest.mark.parametrize("buffer", [torch.zeros(2, dtype=torch.int64), np.zeros(2, np.int32)], ids=["tensor", "numpy"])
def test_ids(buffer: Any) -> None:
    model, metric = made(mlp), PerSampleGradNorms(loss_reduction="sum")
    with Monitor(model, metrics=[metric]) as monitor:
        for first in (0, 10):
            buffer[0], buffer[1] = first, first + 1
            metric.set_ids(buffer)
            sum_loss(model(torch.randn(2, 5))).backward()
        buffer[:] = 7
        monitor.step()
        assert metric.scores.to_numpy()["ids"].tolist() == [0, 1, 10, 11]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_boundaries_of_packed_sequences(dtype: torch.dtype) -> None:
    model = made(lambda: Graph(lambda m, x, cu: m.a(x), a=nn.Linear(5, 4)))
    x, found = torch.randn(6, 5), list[Tensor]()
    with PerSampleGradNorms(model, loss_reduction="sum", cu_seqlens=lambda arguments, keywords: arguments[1]) as metric:
        for again in (False, True):
            model.zero_grad()
            boundaries = torch.tensor([0, 2, 6], dtype=dtype)
            loss = sum_loss(model(x, boundaries))
            if again:
                boundaries.copy_(torch.tensor([0, 5, 6]))
            loss.backward()
            found.append(metric.per_sample)
    assert torch.equal(*found)
