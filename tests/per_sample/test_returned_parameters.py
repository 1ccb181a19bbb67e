"""Models that return parameters, or what they make of them without the batch: the norms are right where the loss leaves
these alone, and the reason is true where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from few import few
from per_sample_models import made
from per_sample_oracle import assert_norms, norms_sq, samples_of
from torch import Tensor, nn

from lipcore import PerSampleGradNorms

B, C = 4, 3
MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda p: p,
    "a power": lambda p: p.exp(),
    "a view": lambda p: p.view_as(p),
    "transposed": lambda p: p.mT if p.dim() > 1 else p * 1,
    "detached": lambda p: p.detach(),
}
SHAPES = {"a number": (), "as many as samples": (B, C), "others": (1, C)}


class Returning(nn.Module):
    def __init__(self, made_of: Callable[[Tensor], Tensor], shape: tuple[int, ...], used: bool) -> None:
        super().__init__()
        self.linear, self.own = nn.Linear(5, C), nn.Parameter(torch.rand(shape) + 0.5)
        self.made_of, self.used = made_of, used

    def forward(self, x: Tensor) -> Any:
        found = self.made_of(self.own)
        return self.linear(x) * found.mean() if self.used else self.linear(x), found


def squares(output: Any) -> Tensor:
    found: Tensor = output[0].square().sum()
    return found


CASES = [("a power", "as many as samples", True), ("itself", "a number", True), ("a view", "others", False)]
CASES += [(made_of, shape, used) for made_of in MADE for shape in SHAPES for used in (True, False)]


@pytest.mark.parametrize("case", few(CASES, 3), ids=str)
def test_where_the_loss_leaves_them_alone(case: tuple[str, str, bool]) -> None:
    made_of, shape, used = case
    model = made(lambda: Returning(MADE[made_of], SHAPES[shape], used))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(2):
            x = torch.randn(B, 5)
            expected = norms_sq(model, samples_of((x,), B), squares)
            squares(model(x)).backward()
            found = metric.per_parameter
            if not used or made_of == "detached":
                assert found["own"].isnan().all()
                assert found.reasons["own"] == "no gradient reached it in this backward pass"
                expected.pop("own")
                assert torch.allclose(metric.per_sample, torch.stack(list(expected.values())).sum(0).sqrt(), rtol=1e-5)
            else:
                assert_norms(metric, expected)
            assert not metric.unproved
            assert not metric.broken


def penalised(output: Any) -> Tensor:
    return squares(output) + output[1].square().sum()


@pytest.mark.parametrize("case", few([c for c in CASES if c[0] != "detached"], 3), ids=str)
def test_where_it_does_not(case: tuple[str, str, bool]) -> None:
    """A parameter itself that is used in the model, too, is told apart by its sum, as with a penalty."""
    made_of, shape, used = case
    model = made(lambda: Returning(MADE[made_of], SHAPES[shape], used))
    itself = model(torch.randn(B, 5))[1].grad_fn is None
    metric = PerSampleGradNorms(model, loss_reduction="sum")
    penalised_pass = penalised(model(torch.randn(B, 5)))
    if itself and used:
        with pytest.warns(UserWarning, match="is not the sum of the samples' gradients"), metric:
            penalised_pass.backward()
            assert "uses it outside the model's forward pass" in metric.unproved
        return
    with pytest.warns(RuntimeWarning, match="'own': .*the loss uses"), metric:
        penalised_pass.backward()
        with pytest.raises(ValueError, match=r"'own': .*return it expanded over the samples, x.expand\(B, ...\)"):
            _ = metric.per_sample
        assert metric.per_sample.isnan().tolist() == [True] * B
    metric = PerSampleGradNorms(model, loss_reduction="sum", on_unsupported="skip")
    with metric:
        for _ in range(2):
            x = torch.randn(B, 5)
            expected = norms_sq(model, samples_of((x,), B), squares)
            model.zero_grad()
            penalised(model(x)).backward()
            expected.pop("own")
            assert torch.allclose(metric.per_sample, torch.stack(list(expected.values())).sum(0).sqrt(), rtol=1e-5)
    assert list(metric.coverage().uncovered) == ["own"]


class Expanded(Returning):
    def forward(self, x: Tensor) -> Any:
        y, found = super().forward(x)
        return y, found.expand(len(x), *found.shape)


@pytest.mark.parametrize("used", [True, False])
def test_the_remedy_works(used: bool) -> None:
    model, x = made(lambda: Expanded(MADE["a power"], (C,), used)), torch.randn(B, 5)
    expected = norms_sq(model, samples_of((x,), B), penalised)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        penalised(model(x)).backward()
        assert_norms(metric, expected)
