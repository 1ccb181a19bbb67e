"""Calls of layers and models that are out of the ordinary: right, or refused by name."""

from __future__ import annotations

import pytest
import torch
from per_sample_models import made
from torch import Tensor, nn

from lipcore import PerSampleGradNorms


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return y


def test_a_mask_that_is_used_again_before_the_backward_pass() -> None:
    model, x, mask = made(Masked), torch.randn(2, 3, 4), torch.ones(3, 3, dtype=torch.bool).triu(1)
    model(x, mask).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        y = model(x, mask)
        mask.fill_(False)
        y.sum().backward()
        assert metric.per_sample.isfinite().all()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_a_packed_sequence_is_refused() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, sequence: nn.utils.rnn.PackedSequence) -> Tensor:
            y: Tensor = self.linear(sequence.data)
            return y

    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="PackedSequence.*cu_seqlens="):
        model = Rows()
        with PerSampleGradNorms(model, loss_reduction="sum") as metric:
            metric.coverage()
            model(packed)
            assert metric.per_sample.isnan().all()


def test_a_scripted_part_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), torch.jit.trace(nn.Linear(3, 3), torch.randn(1, 3)))
    with pytest.raises(ValueError, match="module '1' is a TorchScript module"):
        PerSampleGradNorms(model, loss_reduction="sum")


@pytest.mark.parametrize("layer", ["convolution", "attention", "twice"])
def test_normalized_looks_for_the_batch_where_the_layer_has_it(layer: str) -> None:
    """As many channels, or steps, as samples; a layer that is called twice has no one output gradient."""
    size = 3

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.m, self.l = nn.Conv1d(size, size, 1), nn.MultiheadAttention(4, 1), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if layer == "convolution":
                y = self.c(x.transpose(0, 1)).transpose(0, 1)
            elif layer == "attention":
                y = self.m(x, x, x, need_weights=False)[0]
            else:
                y = self.l(self.l(x))
            summed: Tensor = y.sum((0, 2))
            return summed

    model = made(Net)
    unused = {"convolution": ("m", "l"), "attention": ("c", "l"), "twice": ("c", "m")}[layer]
    for name in unused:
        getattr(model, name).requires_grad_(False)
    with PerSampleGradNorms(model, loss_reduction="sum", batch_dim=1, normalized=True) as metric:
        (model(torch.randn(size, size, 4)) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        (name,) = [n for n in metric.normalized if not torch.isnan(metric.normalized[n]).all()] or ["l"]
        if layer == "twice":
            assert "several times" in metric.normalized.reasons["l"]
        else:
            assert torch.allclose(metric.normalized[name], torch.full((size,), (4 * size) ** 0.5).double())
