"""Per-sample norms that need no matrix product, on one thread: Linear without a sequence, affines of LayerNorm, and
embeddings, each against what one would write with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import interleave, ratios, threads
from torch import Tensor

from lipcore import functional
from lipcore.functional import reference

Calls = dict[str, Callable[[], Any]]


def measure(
    benchmark: Any, report: Any, title: str, calls: Calls, targets: dict[str, float | None], **details: Any
) -> None:
    """A row per baseline: how many times as fast lipcore is. `targets` has the baselines, with None for a finding."""
    with threads(1):
        times = interleave(calls, seconds=3)
        benchmark(calls["lipcore"])
    found, fastest = ratios(times, "lipcore"), min(times["lipcore"])
    for baseline, target in targets.items():
        held = {} if target is None else {"target": target, "better": "higher"}
        report.add(
            f"{title}: against {baseline}", found[baseline], "x faster", **held, microseconds=fastest * 1e6, **details
        )


def error(got: Tensor, truth: Tensor) -> float:
    return float(((got.double() - truth).abs() / truth).max())


# ---- Linear without a sequence: |x|^2 |g|^2 and, of the bias, |g|^2


def eager_outer(x: list[Tensor], grad: list[Tensor]) -> tuple[Tensor, Tensor]:
    bias = [g.square().sum(1) for g in grad]
    return torch.stack([a.square().sum(1) * b for a, b in zip(x, bias, strict=True)]), torch.stack(bias)


def vector_norm_outer(x: list[Tensor], grad: list[Tensor]) -> tuple[Tensor, Tensor]:
    bias = [torch.linalg.vector_norm(g, dim=1) for g in grad]
    weight = [torch.linalg.vector_norm(a, dim=1) * b for a, b in zip(x, bias, strict=True)]
    return torch.stack(weight).square(), torch.stack(bias).square()


# In memory both are at the limit of a read: parity is what can be claimed.
OUTER = {
    "in cache": (1, 256, 1024, {"eager": 3, "vector_norm": 3}),
    "in memory": (1, 8192, 4096, {"eager": 0.92, "vector_norm": 0.92}),
    "8 layers in one call": (8, 64, 256, {"eager": 3, "vector_norm": 3}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", OUTER)
def bench_outer(benchmark: Any, report: Any, case: str, dtype: torch.dtype) -> None:
    layers, samples, features, targets = OUTER[case]
    torch.manual_seed(0)
    x, grad = ([torch.randn(samples, features).to(dtype) for _ in range(layers)] for _ in range(2))
    some = slice(0, 16)
    truth = reference.outer_and_bias_norms_sq([a[some] for a in x], [g[some] for g in grad])
    for ours, expected in zip(functional.outer_and_bias_norms_sq(x, grad), truth, strict=True):
        torch.testing.assert_close(ours[:, some], expected, rtol=1e-12, atol=0)
    calls: Calls = {
        "lipcore": lambda: functional.outer_and_bias_norms_sq(x, grad),
        "eager": lambda: eager_outer(x, grad),
        "vector_norm": lambda: vector_norm_outer(x, grad),
    }
    title = f"outer_and_bias_norms_sq, {case}, {layers} x [{samples}, {features}], {str(dtype)[6:]}"
    wrong = {name: error(calls[name]()[0][:, some], truth[0]) for name in ("lipcore", "eager")}
    measure(benchmark, report, title, calls, dict(targets), error=wrong["lipcore"], eager_error=wrong["eager"])


# ---- both parameters of a LayerNorm


def eager_affine(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return (grad * x).sum(1).square().sum(1), grad.sum(1).square().sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8, 256, 256), (32, 512, 768)], ids=["in cache", "in memory"])
def bench_affine(benchmark: Any, report: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    grad, x = (torch.randn(shape).to(dtype) for _ in range(2))
    truth = reference.affine_norms_sq(grad, x)
    torch.testing.assert_close(functional.affine_norms_sq(grad, x), truth, rtol=1e-12, atol=0)
    calls: Calls = {"lipcore": lambda: functional.affine_norms_sq(grad, x), "eager": lambda: eager_affine(grad, x)}
    title = f"affine_norms_sq of a LayerNorm, {list(shape)}, {str(dtype)[6:]}"
    wrong = error(torch.stack(eager_affine(grad, x)), truth)
    measure(benchmark, report, title, calls, {"eager": 3.5}, eager_error=wrong)


# ---- embedding: the mask of equal tokens on the Gram matrix, as ghost norms are written


def ghost_mask(indices: Tensor, grad: Tensor) -> Tensor:
    same = indices.unsqueeze(1) == indices.unsqueeze(2)
    return (same * torch.bmm(grad, grad.transpose(1, 2))).sum((1, 2))


@pytest.mark.parametrize("length", [256, 1024])
def bench_embedding(benchmark: Any, report: Any, length: int) -> None:
    torch.manual_seed(0)
    indices, grad = torch.randint(8000, (8, length)), torch.randn(8, length, 256)
    indices[:, ::3] = indices[:, :1]  # words that come again and again, as in text
    truth = reference.embedding_norms_sq(indices, grad)
    torch.testing.assert_close(functional.embedding_norms_sq(indices, grad), truth, rtol=1e-12, atol=0)
    calls: Calls = {
        "lipcore": lambda: functional.embedding_norms_sq(indices, grad),
        "the ghost mask": lambda: ghost_mask(indices, grad),
    }
    title = f"embedding_norms_sq, {list(grad.shape)}, float32"
    wrong = error(ghost_mask(indices, grad), truth)
    measure(benchmark, report, title, calls, {"the ghost mask": 20}, ghost_mask_error=wrong)
