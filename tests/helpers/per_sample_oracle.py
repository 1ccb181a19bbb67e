"""Per-sample gradient norms the slow way: a float64 copy of the model, one sample at a time, torch.autograd.grad."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

import lipcore

Loss = Callable[[Any], Tensor]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from this seed, and afterwards as if nothing had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def to_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def samples_of(arguments: tuple[Any, ...], size: int, dim: int = 0) -> list[tuple[Any, ...]]:
    """The arguments of every sample alone; what is no tensor with a batch dimension is given to each."""
    split = [a.split(1, dim) if isinstance(a, Tensor) and a.dim() > dim else [a] * size for a in arguments]
    return list(zip(*split, strict=True)) if split else []


def gradients(model: nn.Module, samples: list[tuple[Any, ...]], loss: Loss) -> dict[str, Tensor]:
    """Per trainable parameter float64 [B, *shape]: the gradient of `loss` (a sum) on each sample alone."""
    exact = copy.deepcopy(model).double()
    named = {name: p for name, p in exact.named_parameters() if p.requires_grad}
    rows: list[list[Tensor]] = []
    for sample in samples:
        total = loss(exact(*map(to_float64, sample)))
        grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        pairs = zip(named.values(), grads, strict=True)
        rows.append([torch.zeros_like(p).detach() if g is None else g.to_dense() for p, g in pairs])
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(named)}


def norms_sq(model: nn.Module, samples: list[tuple[Any, ...]], loss: Loss) -> dict[str, Tensor]:
    """Per trainable parameter float64 [B]: squared norm of the gradient of `loss` (a sum) on each sample alone."""
    return {
        name: rows.square().reshape(len(rows), rows[0].numel()).sum(1)
        for name, rows in gradients(model, samples, loss).items()
    }


def weighted_sum(output: Any) -> Tensor:
    """A loss whose gradient differs from element to element and from sample to sample."""
    return (output * torch.cos(output.detach() * 3 + 1)).sum()


def one_at_a_time(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient norms of a classifier's samples under cross entropy, float64 [B], each passed alone."""
    model = copy.deepcopy(model).double()
    norms = []
    for i in range(len(x)):
        loss = nnf.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(torch.cat([g.flatten() for g in grads]).norm())
    return torch.stack(norms)


def check(
    model: nn.Module,
    arguments: tuple[Any, ...],
    *,
    loss: Loss = weighted_sum,
    reduction: str = "sum",
    tolerance: float = 1e-5,
    dim: int = 0,
    **options: Any,
) -> lipcore.PerSampleGradNorms:
    """One backward pass under the metric against the oracle, parameter by parameter and in total."""
    size = next(a.shape[dim] for a in arguments if isinstance(a, Tensor))
    expected = norms_sq(model, samples_of(arguments, size, dim), loss)
    model.zero_grad()
    metric = lipcore.PerSampleGradNorms(model, loss_reduction=reduction, batch_dim=dim, **options)
    with metric:
        total = loss(model(*arguments))
        (total / size if reduction == "mean" else total).backward()
        assert_norms(metric, expected, tolerance)
    return metric


def assert_norms(metric: lipcore.PerSampleGradNorms, expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    found = metric.per_parameter
    assert set(found) == set(expected), found.reasons
    largest = max((float(row.max()) for row in expected.values() if row.numel()), default=0.0) ** 0.5
    for name, row in expected.items():
        # A gradient that is zero but for rounding is compared with the largest of the layer.
        near = torch.isclose(found[name], row.sqrt(), rtol=tolerance, atol=tolerance * largest)
        assert near.all(), f"{name}: {found[name]} instead of {row.sqrt()}"
    total = torch.stack(list(expected.values())).sum(0).sqrt()
    torch.testing.assert_close(metric.per_sample, total, rtol=tolerance, atol=tolerance * largest)
