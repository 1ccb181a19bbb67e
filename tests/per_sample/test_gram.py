"""Inner products of samples' gradients with each other against float64 gradients of one sample at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import CASES, Case
from models_without_rules import WITHOUT_RULES, C, T
from per_sample_models import MODELS, made, sum_loss
from per_sample_oracle import gradients, samples_of, seeded, weighted_sum
from torch import Tensor, nn

import lipcore
from lipcore import PerSampleGradNorms


def check(model: nn.Module, arguments: tuple[Any, ...], reduction: str = "sum", **options: Any) -> None:
    size = len(arguments[0])
    rows = gradients(model, samples_of(arguments, size), weighted_sum)
    flat = torch.cat([each.reshape(size, -1) for each in rows.values()], 1)
    lengths = flat.norm(dim=1)
    with PerSampleGradNorms(model, loss_reduction=reduction, keep_factors=True, **options) as norms:
        total = weighted_sum(model(*arguments))
        (total / size if reduction == "mean" else total).backward()
        gram = norms.gram()
        assert torch.equal(gram["total"], gram["total"].T)
        error = (gram["total"] - flat @ flat.T).abs()
        assert (error <= 1e-5 * lengths[:, None] * lengths).all()
        layers = [gram[layer] for layer in gram if layer != "total"]
        assert list(gram) == [*norms.per_layer, "total"]
        torch.testing.assert_close(torch.stack(layers).sum(0), gram["total"])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_rule(case: Case) -> None:
    with seeded(1):
        check(case.make(), case.arguments(5))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, reduction: str) -> None:
    build, inputs = MODELS[name]
    check(made(build), (inputs(6),), reduction)


@pytest.mark.parametrize("name", ["several", "own RMSNorm"])
def test_parameters_without_a_rule(name: str) -> None:
    check(made(WITHOUT_RULES[name]), (torch.randn(4, T, C),), max_replay_bytes=1 << 30)


def test_what_has_no_number() -> None:
    model, x = made(MODELS["mlp"][0]), torch.randn(4, 5)
    with PerSampleGradNorms(model, loss_reduction="sum", keep_factors=True) as norms:
        sum_loss(model(x)).backward()
        record = norms._last_norms().record
        record.norms_sq = {name: row.clone() for name, row in record.norms_sq.items()}
        record.norms_sq["0.weight"][1] = torch.nan
        found: Tensor = norms.gram()["total"].isnan()
        assert found[1].all()
        assert found[:, 1].all()
        assert found.sum() == 7
        assert norms.gram()["3"].isfinite().all()
        torch.autograd.grad(sum_loss(model(x)), list(model.parameters()))
        gram = norms.gram()
        assert all(gram[place].shape == (4, 4) and gram[place].isnan().all() for place in ("0", "total"))
        assert gram.reasons["total"] == gram.reasons["0"] == norms.broken
        model(x)
    with lipcore.PerSampleGradNorms(model, loss_reduction="sum") as norms:
        sum_loss(model(x)).backward()
        with pytest.raises(RuntimeError, match="gram: this metric keeps no factors"):
            norms.gram()


def test_released_factors_are_named() -> None:
    model, x = made(MODELS["mlp"][0]), torch.randn(4, 5)
    with PerSampleGradNorms(model, loss_reduction="sum", keep_factors=True) as norms:
        sum_loss(model(x)).backward()
        y = model(x)
        with pytest.raises(RuntimeError, match="gram: .*released"):
            norms.gram()
        sum_loss(y).backward()
        assert norms.gram()["total"].isfinite().all()
