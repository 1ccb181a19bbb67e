"""local_lipschitz is the gradient at the model's input, whatever the model, and training does not notice."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from any_models import ANY, constants
from few import few
from models import relative_error, seeded
from oracle import same_bits
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.(weight|spectral)_norm. is deprecated")


def samples(shape: tuple[int, ...], dtype: torch.dtype, size: int = 6) -> Tensor:
    return torch.randn(size, *shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, x: Tensor, metric: Lipschitz | None) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of two passes, and lambda of each sample in each."""
    gradients, found, count = [], [], 0
    monitor = Monitor(model, metrics=[metric]) if metric is not None else None
    for _ in range(2):
        model.zero_grad()
        out = model(x.clone())
        (out.pow(2) + out).mean().backward()
        gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        if monitor is not None and metric is not None:
            monitor.step()
            (place,) = metric.finalize().local_lipschitz
            before, count = count, metric.finalize().local_lipschitz[place].mean.count
            if count > before:
                found.append(metric.per_sample.local_lipschitz)
    if monitor is not None:
        monitor.close()
    return gradients, found


@pytest.mark.parametrize("dtype", few([torch.float64, torch.float32], 1), ids=str)
@pytest.mark.parametrize("name", ANY)
def test_lambda_is_the_gradient_at_the_input(name: str, dtype: torch.dtype) -> None:
    build, shape, _ = ANY[name]
    model, bare = seeded(build, dtype=dtype), seeded(build, dtype=dtype)
    x = samples(shape, dtype)
    expected = constants(seeded(build, dtype=dtype), x)
    undisturbed, _ = trained(bare, x, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of r, which some of them do not have
        gradients, found = trained(model, x, Lipschitz(lambda_every=1))
    assert len(found) == 2
    for lambdas in found:
        if dtype == torch.float64:
            assert relative_error(lambdas, expected) <= 1e-11
        assert float((lambdas - expected).abs().max() / expected.max()) <= 2e-5
    assert len(gradients) == len(undisturbed)
    assert all(same_bits(mine, theirs) for mine, theirs in zip(gradients, undisturbed, strict=True))


@pytest.mark.parametrize("name", ANY)
def test_the_product_with_the_first_weight_is_taken_where_it_is_all(name: str) -> None:
    build, shape, by_product = ANY[name]
    metric = Lipschitz()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained(seeded(build), samples(shape, torch.float32), metric)
    assert bool(metric._at_input.by_product) is by_product
    value: Any = metric.compute().local_lipschitz
    (place,) = value
    assert value[place].mean.label == "exact"
    sides: Any = metric.compute().get("sandwich")
    if sides is not None and not by_product:
        assert not metric.compute().sandwich[place].lower.valid
        assert "Theorem 1 does not hold" in metric.compute().sandwich[place].lower.note
