"""Public architectures with default arguments: everything is covered, the norms are those of single samples in float64,
that is proved, and the training is the same bits. Those that mix samples are refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from per_sample_models import assert_equal, weights
from per_sample_oracle import seeded
from torch import Tensor, nn

from lipcore import PerSampleGradNorms

pytest.importorskip("transformers", reason="public models need the transformers library: pip install 'lipcore[models]'")
pytest.importorskip("peft", reason="adapters need the peft library: pip install 'lipcore[models]'")

from public_cases import Build, Case
from public_models import FIRST, MODELS, REFUSED

LARGEST = 700_000  # parameters: a size that its configuration does not know would be a real model's


def built(build: Build, seed: int = 0) -> Case:
    with seeded(seed):
        case = build()
    case.model.train()
    assert sum(p.numel() for p in case.model.parameters()) < LARGEST
    return case


def step(case: Case, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    with seeded(1):
        case.loss(case.model, case.batch).backward()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)


def assert_norms(metric: PerSampleGradNorms, expected: dict[str, Tensor], tolerance: float) -> None:
    """A norm is compared with itself, or with the model's largest where it is zero but for rounding; what no gradient
    came to has none."""
    found = metric.per_parameter
    largest = max(float(row.max()) for row in expected.values()) ** 0.5
    for name, row in expected.items():
        torch.testing.assert_close(found[name], row.sqrt(), rtol=tolerance, atol=tolerance * largest, msg=name)
    for name in found.keys() - expected.keys():
        assert found[name].isnan().all() or not found[name].any(), name
    total = torch.stack(list(expected.values())).sum(0).sqrt()
    torch.testing.assert_close(metric.per_sample, total, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.ci) for n in MODELS])
def test_a_public_model(name: str) -> None:
    case = built(MODELS[name])
    expected, plain = case.norms_sq(), copy.deepcopy(case.model)
    optimizer = optimizer_of(case.model)
    with PerSampleGradNorms(case.model, loss_reduction="mean", loss_terms=case.terms(case.batch)) as metric:
        step(case, optimizer)
        assert_norms(metric, expected, case.tolerance)
        assert metric.unproved == metric.broken == ""
        assert not metric.coverage().uncovered
        optimizer.step()
        step(case, optimizer)
        assert not metric.per_sample.isnan().any()
        optimizer.step()
    other = Case(plain, case.batch, case.terms, case.loss)
    same = optimizer_of(plain)
    for _ in range(2):
        step(other, same)
        same.step()
    assert_equal(weights(case.model), weights(plain))
    assert_equal(case.model.buffers(), plain.buffers())


@pytest.mark.filterwarnings("ignore:lipcore stopped recording:RuntimeWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_mix_their_samples(name: str) -> None:
    build, words = REFUSED[name]
    case = built(build)
    with pytest.raises(ValueError, match=words):
        with PerSampleGradNorms(case.model, loss_reduction="mean", loss_terms=case.terms(case.batch)):
            case.loss(case.model, case.batch).backward()


def test_every_way_of_a_mixture_of_experts_is_among_them() -> None:
    assert len(MODELS) >= 40
    assert {name for name in MODELS if name.startswith("Mixtral")} >= {
        "Mixtral, experts one by one",
        "Mixtral, grouped products",
    }
