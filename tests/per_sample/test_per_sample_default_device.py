"""Numbers stay on the model's device when new tensors are made elsewhere by default (torch.set_default_device)."""

from __future__ import annotations

import pytest
import torch
from per_sample_models import made, mlp
from per_sample_oracle import norms_sq, samples_of
from torch import Tensor

from lipcore import Monitor, PerSampleGradNorms


def sum_loss(y: Tensor) -> Tensor:
    return y.square().sum()


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_another_default_device(size: int, alone: bool) -> None:
    """The meta device stands for it: a tensor there has no values, and reading one raises."""
    model, x = made(mlp), torch.randn(size, 5)
    expected = torch.stack(list(norms_sq(model, samples_of((x,), size), sum_loss).values())).sum(0).sqrt()
    metric = PerSampleGradNorms(
        model if alone else None,
        loss_reduction="sum",
        batch_of_one="fast",
    )
    monitor = metric._engine if alone else Monitor(model, metrics=[metric])
    with monitor, torch.device("meta"):
        for _ in range(6):  # batches of one are served from the gradients in the end
            model.zero_grad()
            metric.set_ids(list(range(size)))
            sum_loss(model(x)).backward()
            found = metric.per_sample
            monitor.step()
        window = monitor.compute()["per_sample_grad_norm"]
        scores = metric.scores.lookup([0, 9]).count
    assert torch.allclose(found, expected, rtol=1e-5)
    assert window.norm["total"].mean.count == 6 * size
    assert scores.tolist() == [6, 0]


def test_a_batch_of_one_whose_norm_nobody_but_the_window_takes() -> None:
    model, x = made(mlp), torch.randn(1, 5)
    with (
        PerSampleGradNorms(
            model,
            loss_reduction="sum",
            batch_of_one="fast",
        ) as metric,
        torch.device("meta"),
    ):
        for _ in range(6):
            model.zero_grad()
            sum_loss(model(x)).backward()
        assert metric._capture is not None
        assert metric._capture.single.total() is not None
        assert metric.per_sample.isfinite().tolist() == [True]
