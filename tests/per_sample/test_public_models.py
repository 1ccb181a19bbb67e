"""Public architectures with default arguments: everything is covered, the norms are those of single samples in float64,
that is proved, and the training is the same bits. What mixes samples is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from per_sample_models import assert_equal, weights
from per_sample_oracle import seeded
from torch import Tensor, nn

from lipcore import PerSampleGradNorms

pytest.importorskip("transformers", reason="public models need the transformers library: pip install 'lipcore[models]'")
pytest.importorskip("peft", reason="adapters need the peft library: pip install 'lipcore[models]'")

from public_cases import Build, Case, errors, text
from public_models import FIRST, MODELS, REFUSED

LARGEST = 700_000  # parameters: a size that its configuration does not know would be a real model's


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With several, sums of experts that are batched are other bits in every run, watched or not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    """What no gradient came to has no norm."""
    found = metric.per_parameter
    wrong = {name: error for name, error in errors(found, expected).items() if not error <= tolerance}
    assert not wrong
    for name in found.keys() - expected.keys():
        assert found[name].isnan().all() or not found[name].any(), name
    total = torch.stack(list(expected.values())).sum(0).sqrt()
    torch.testing.assert_close(metric.per_sample, total, rtol=tolerance, atol=0.0)


def trained(case: Case, model: nn.Module) -> nn.Module:
    """The model after two steps on the case's batch."""
    optimizer = optimizer_of(model)
    for _ in range(2):
        step(Case(model, case.batch, case.terms, case.loss), optimizer)
        optimizer.step()
    return model


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
    trained(case, plain)
    assert_equal(weights(case.model), weights(plain))
    assert_equal(case.model.buffers(), plain.buffers())


#: Those that are left to the next pass: what is used in a checkpoint outside of its own module.
CHECKPOINTED = {
    "GPT-2": 1,
    "Llama": 1,
    "BERT, masked tokens": 1,
    "ViT": 1,
    "T5": 4,
    "Mistral, sliding window": 1,
    "Qwen2": 1,
    "Gemma": 1,
    "Mixtral": 1,
    "Mamba": 1,
    "Swin": 2,
    "Qwen3-Next": 3,
}


@pytest.mark.parametrize(
    "name", [n if n in ("GPT-2", "Llama") else pytest.param(n, marks=pytest.mark.ci) for n in CHECKPOINTED]
)
def test_under_gradient_checkpointing(name: str) -> None:
    case = built(MODELS[name])
    case.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    case.model.config.use_cache = False  # type: ignore[union-attr]
    expected, plain = case.norms_sq(), copy.deepcopy(case.model)
    optimizer = optimizer_of(case.model)
    with PerSampleGradNorms(case.model, loss_reduction="mean", loss_terms=case.terms(case.batch)) as metric:
        for _ in range(CHECKPOINTED[name]):
            step(case, optimizer)
        assert_norms(metric, expected, case.tolerance)
        assert metric.unproved == metric.broken == ""
        assert not metric.coverage().uncovered
        optimizer.zero_grad()
        trained(case, case.model)
    trained(case, plain)
    assert_equal(weights(case.model), weights(plain))


@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX", pytest.param("T5", marks=pytest.mark.ci)])
def test_fused_linears_among_others(name: str) -> None:
    """Sequences are long enough for them; their sums are in another order."""
    case = built(MODELS[name])
    with seeded(2):
        case.batch.update(text(56))
    expected = case.norms_sq()
    case.loss(case.model, case.batch).backward()
    grads = {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}
    case.model.zero_grad()
    terms = case.terms(case.batch)
    with PerSampleGradNorms(case.model, loss_reduction="mean", loss_terms=terms, fused=True) as metric:
        case.loss(case.model, case.batch).backward()
        assert_norms(metric, expected, case.tolerance)
        assert metric.unproved == metric.broken == ""
        assert "inside the weight gradient" in str(metric.plan())
    for n, p in case.model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, grads[n], rtol=1e-4, atol=1e-5 * float(grads[n].abs().max()))


@pytest.mark.parametrize("name", ["GPT-2", "BERT, masked tokens", "T5"])
def test_dropout_draws_the_same_numbers(name: str) -> None:
    case = built(MODELS[name])
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    plain = trained(case, copy.deepcopy(case.model))
    with PerSampleGradNorms(case.model, loss_reduction="mean", loss_terms=case.terms(case.batch)) as metric:
        trained(case, case.model)
        assert not metric.per_sample.isnan().any()
    assert_equal(weights(case.model), weights(plain))


@pytest.mark.filterwarnings("ignore:lipcore stopped recording:RuntimeWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
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
