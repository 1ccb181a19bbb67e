"""Norms that are estimated from random probes: unbiased, with a standard error, and asked for by name only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from per_sample_models import made, sum_loss
from torch import Tensor, nn

from lipcore import Monitor, PerSampleGradNorms


class Repeated(nn.Module):
    """A layer that is called twice, and one that sees no sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.twice(torch.tanh(self.twice(x)))).mean(1))
        return y


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))


METHODS = {"twice": "estimate", "head": "estimate"}


def squares(model: nn.Module, x: Tensor, passes: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Squared norms of the estimated layer [passes, B], and their standard errors."""
    found, errors = [], []
    with PerSampleGradNorms(model, loss_reduction="mean", **options) as metric:
        for _ in range(passes):
            model.zero_grad()
            (sum_loss(model(x)) / len(x)).backward()
            norms = metric.per_layer["twice"]
            found.append(norms.square())
            if options:
                errors.append(2 * norms * metric.standard_error["twice"])
    return torch.stack(found), torch.stack(errors) if errors else found[0]


@pytest.mark.parametrize("size", [1, 3])
def test_the_mean_of_many_estimates_is_what_they_estimate(size: int) -> None:
    model, x = made(Repeated), torch.randn(size, 9, 6)
    exact = squares(model, x, 1)[0][0]
    found, errors = squares(model, x, 200, methods=METHODS)
    assert (found[0] != found[1]).all()
    spread = found.std(0)
    assert ((found.mean(0) - exact).abs() < 4 * spread / 200**0.5).all()
    assert torch.allclose(errors.square().mean(0).sqrt(), spread, rtol=0.2)


def test_what_is_estimated_is_labelled_and_what_needs_no_estimate_is_exact() -> None:
    model, x = made(Repeated), torch.randn(3, 9, 6)
    metric = PerSampleGradNorms(loss_reduction="sum", methods=METHODS)
    with Monitor(model, metrics=[metric]) as monitor:
        sum_loss(model(x)).backward()
        assert set(metric.standard_error) == {"twice", "total"}
        share = metric.per_layer["twice"] / metric.per_sample
        assert torch.allclose(metric.standard_error["total"], metric.standard_error["twice"] * share)
        lines = {line.what: line.rule for line in metric.plan()}
        estimated, norms = metric.per_layer["head"], metric.per_layer["twice"]
        monitor.step()
        result = monitor.compute()["per_sample_grad_norm"]
    assert lines["twice"].endswith("by estimate")
    assert lines["head"].endswith("by product of norms")
    assert result.norm["twice"].mean.label == result.norm["total"].mean.label == "estimate"
    assert result.norm["twice"].mean.value == pytest.approx(float(norms.mean()))
    with PerSampleGradNorms(model, loss_reduction="sum") as exact:
        sum_loss(model(x)).backward()
        assert torch.equal(exact.per_layer["head"], estimated)
        assert list(exact.standard_error) == []


def test_probes_leave_the_random_numbers_of_the_training_alone() -> None:
    gradients = []
    for methods in (None, {"0": "estimate", "2": "estimate"}):
        model = made(dropping)
        with PerSampleGradNorms(model, loss_reduction="sum", methods=methods):
            for _ in range(3):
                sum_loss(model(torch.randn(2, 5, 6))).backward()
        gradients.append([p.grad for p in model.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        assert mine is not None
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("build", "options", "match"),
    [
        (lambda: nn.Conv1d(2, 2, 1), {}, "expected 'gram' or 'direct', got 'estimate'"),
        (lambda: nn.LayerNorm(2), {}, "LayerNorm has one way"),
        (lambda: nn.Linear(2, 2), {"fused": True}, "with fused=True"),
    ],
    ids=["convolution", "norm", "fused"],
)
def test_layers_that_have_no_estimate(build: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PerSampleGradNorms(build(), loss_reduction="sum", methods={"model": "estimate"}, **options)
