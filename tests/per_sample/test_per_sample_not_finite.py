"""A sample with NaN in a pass that is the first of its structure: the others have their norms, or all have a reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcore import PerSampleGradNorms

B, T, BAD = 4, 5, 2
GOOD = [i for i in range(B) if i != BAD]


class Sums(nn.Module):
    """A model whose parameters without a rule are measured by sums and products of rows."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.embed, self.out, self.flat = nn.Linear(4, 6), nn.Linear(6, 3), flat
        self.positions, self.scale = nn.Parameter(torch.randn(9, 6)), nn.Parameter(torch.randn(6))
        self.matrix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = (self.embed(x) + self.positions[:T]) * self.scale
        h = (h.reshape(-1, 6) @ self.matrix).reshape(h.shape) if self.flat else h @ self.matrix
        return self.out(h.tanh())


class Replayed(nn.Module):
    """A model with a parameter that is measured by replays of a node which keeps the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.kernel = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(self.first(x).transpose(1, 2), self.kernel, padding=1)


def _pass(model: nn.Module, metric: PerSampleGradNorms, x: Tensor) -> Tensor:
    model.zero_grad()
    model(x).square().sum().backward()
    return metric.per_sample


@pytest.mark.parametrize("flat", [False, True], ids=["3-D", "flat"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_sample_that_is_not_finite_spoils_its_own_norm_only(flat: bool, value: float) -> None:
    torch.manual_seed(0)
    model, x = Sums(flat), torch.randn(B, T, 4)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        right = _pass(model, metric, x)
    bad = x.clone()
    bad[BAD] = value
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(2):
            found = _pass(model, metric, bad)
            assert torch.equal(found[GOOD], right[GOOD])
            assert bool(found[BAD].isnan())
            assert "not finite" in metric.broken
            assert "had no gradient" in metric.unproved
        found = _pass(model, metric, x)
        if bool(found.isnan().any()):
            assert "until a later pass proves them" in metric.broken
            found = _pass(model, metric, x)
        assert torch.equal(found, right)
        assert not metric.broken
        assert not metric.unproved


def test_a_replay_that_meets_rows_that_are_not_finite_says_so() -> None:
    torch.manual_seed(0)
    model, x = Replayed(), torch.randn(B, T, 4)
    bad = x.clone()
    bad[BAD] = torch.nan
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        right = _pass(model, metric, x)
        found = _pass(model, metric, bad)
        assert bool(found.isnan().all())
        assert "keeps all samples' rows" in metric.broken
        assert "keeps all samples' rows" in metric.per_parameter.reasons["kernel"]
        assert not bool(metric.per_parameter["first.weight"][GOOD].isnan().any())
        assert torch.equal(_pass(model, metric, x), right)
        assert not metric.broken
