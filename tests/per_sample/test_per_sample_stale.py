"""Numbers of an earlier backward pass are never shown as those of a later one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from per_sample_models import made, mlp, sum_loss
from torch import Tensor, nn

from lipcore import Monitor, PerSampleGradNorms


class Sometimes(nn.Module):
    """Mixes its samples when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mixes = mlp(), False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.mean(0, keepdim=True).expand_as(x) + x if self.mixes else x)
        return y - y.mean(0) if self.mixes else y


@pytest.mark.parametrize("alone", [True, False])
def test_after_recording_has_stopped(alone: bool) -> None:
    model = made(Sometimes)
    metric = PerSampleGradNorms(model if alone else None, loss_reduction="sum")
    with pytest.raises(ValueError, match="parts at other samples"):
        with metric if alone else Monitor(model, metrics=[metric]):
            sum_loss(model(torch.randn(4, 5))).backward()
            assert not metric.per_sample.isnan().any()
            model.mixes = True
            with pytest.warns(RuntimeWarning, match="stopped recording"):
                output = model(torch.randn(3, 5))
            sum_loss(output).backward()
            with pytest.raises(ValueError, match="parts at other samples") if alone else nullcontext():
                metric.per_sample  # noqa: B018
            for size in (3, 4):  # of the last backward pass
                assert metric.per_sample.isnan().tolist() == [True] * size
                assert metric.broken.startswith("recording has stopped: model: ")
                assert all("recording has stopped" in why for why in metric.per_layer.reasons.values())
                model.mixes = False
                sum_loss(model(torch.randn(4, 5))).backward()
            if alone:
                raise ValueError("parts at other samples")  # it was raised already


def test_in_steps_that_are_not_recorded() -> None:
    model = made(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    metric = PerSampleGradNorms(loss_reduction="sum", every_steps=2)
    with Monitor(model, optimizer, metrics=[metric]):
        for step in range(4):
            optimizer.zero_grad()
            sum_loss(model(torch.randn(3, 5))).backward()
            optimizer.step()
            assert metric.per_sample.isnan().all() == (step % 2 == 1)
            assert metric.broken == ("the step is not recorded (every_steps=2)" if step % 2 else "")
    assert metric.compute().norm["total"].mean.count == 6
