"""Layers whose rule is not for how they are configured: their parameters are measured from the autograd graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore import PerSampleGradNorms

B, C = 4, 3


class Around(nn.Module):
    def __init__(self, layer: nn.Module, features: int, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self.call = layer, nn.Linear(features, C), call

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.call(self.layer, x))
        return y


CASES: dict[str, tuple[Callable[[], Around], Callable[[], Tensor], str]] = {
    "attention with dropout": (
        lambda: Around(nn.MultiheadAttention(8, 2, 0.2, batch_first=True), 8, lambda a, x: a(x, x, x)[0].mean(1)),
        lambda: torch.randn(B, 6, 8),
        "its rule cannot repeat its dropout of 0.2",
    ),
    "encoder layer as torch makes it": (
        lambda: Around(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 8, lambda layer, x: layer(x).mean(1)),
        lambda: torch.randn(B, 6, 8),
        "its rule cannot repeat its dropout of 0.1",
    ),
    "bags with their largest": (
        lambda: Around(nn.EmbeddingBag(9, 5, mode="max"), 5, lambda bag, x: bag(x)),
        lambda: torch.randint(9, (B, 6)),
        "its rule is for mode='sum' and 'mean'",
    ),
    "complex": (
        lambda: Around(nn.Linear(5, 4, dtype=torch.cfloat), 4, lambda layer, x: layer(x.to(torch.cfloat)).abs()),
        lambda: torch.randn(B, 5),
        "it is complex",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_norms_are_those_of_each_loss_alone(name: str) -> None:
    make, draw, why = CASES[name]
    torch.manual_seed(0)
    model = make()
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        for _ in range(3):
            losses = F.cross_entropy(model(draw()), torch.randint(C, (B,)), reduction="none")
            losses.mean().backward(retain_graph=True)
            assert not norms.unproved
            for loss, norm in zip(losses, norms.per_sample, strict=True):
                each = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                assert float(norm) == pytest.approx(sum(float(g.abs().square().sum()) for g in each) ** 0.5, rel=1e-5)
        assert not norms.coverage().uncovered
        assert why in str(norms.plan())


def test_dropout_that_begins_later() -> None:
    """The rule serves until then, and the graph from that pass on."""
    model = CASES["attention with dropout"][0]().eval()
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        for step in range(4):
            model.train(step > 1)
            losses = F.cross_entropy(model(torch.randn(B, 6, 8)), torch.randint(C, (B,)), reduction="none")
            losses.mean().backward(retain_graph=True)
            for loss, norm in zip(losses, norms.per_sample, strict=True):
                each = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                assert float(norm) == pytest.approx(sum(float(g.square().sum()) for g in each) ** 0.5, rel=1e-5)
