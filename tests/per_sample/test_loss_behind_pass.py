"""A loss that is told behind its backward pass: its graph has nothing left to read, and nothing is raised."""

from __future__ import annotations

import torch
from torch import nn

from lipcore import Monitor, PerSampleGradNorms


def test_logging_a_loss_behind_its_pass_raises_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    metric = PerSampleGradNorms(loss_reduction="auto")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, metrics=[metric]) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            output = model(torch.randn(4, 6))
            loss = (output.detach() * output).square().mean()
            loss.backward()
            optimizer.step()
            monitor.log(loss=loss)
        assert "no loss was set before this backward pass" in " ".join(metric.unrecorded)
