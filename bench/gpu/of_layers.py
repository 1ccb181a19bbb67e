"""Norms of per-sample gradients of one layer, against the layer's own weight gradient and what people write instead."""

from __future__ import annotations

from typing import Any

import torch
from timing import assert_close, copy_limit, extra_mib, measure
from torch import Tensor
from torch.nn import functional as F

from lipcore import functional

# (samples, tokens, inputs, outputs, dtype)
LINEAR = [
    (8, 1024, 768, 3072, torch.bfloat16),
    (8, 1024, 4096, 4096, torch.bfloat16),
    (8, 2048, 2048, 8192, torch.bfloat16),
    (64, 65, 768, 3072, torch.bfloat16),
    (256, 16, 512, 512, torch.bfloat16),
    (8, 1024, 768, 3072, torch.float32),
    (64, 65, 768, 3072, torch.float32),
    (256, 16, 512, 512, torch.float32),
]
FUSED = [(8, 1024, 768, 3072, torch.float32), (64, 65, 768, 3072, torch.float32), (256, 1, 4096, 4096, torch.float32)]
# (samples, channels in, channels out, side, kernel, dtype)
CONV = [(64, 64, 128, 32, 3, torch.float32), (64, 64, 128, 32, 3, torch.bfloat16), (32, 256, 256, 14, 3, torch.float32),
        (64, 512, 512, 7, 3, torch.float32), (64, 512, 512, 7, 3, torch.bfloat16)]  # fmt: skip
ROWS = [(8, 1024, 768, torch.bfloat16), (8, 1024, 768, torch.float32), (256, 196, 384, torch.float32)]


def linear(samples: int, tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> dict[str, Any]:
    x = torch.randn(samples, tokens, inputs, device="cuda").to(dtype)
    grad = torch.randn(samples, tokens, outputs, device="cuda").to(dtype)
    want = torch.stack([(g.double().T @ a.double()).square().sum() for g, a in zip(grad[:3], x[:3], strict=True)])
    assert_close(functional.linear_norms_sq(x, grad)[:3], want, 1e-5)

    def two_bmm() -> Tensor:
        return ((x @ x.transpose(1, 2)) * (grad @ grad.transpose(1, 2))).sum((1, 2), dtype=torch.float32)

    def one_bmm() -> Tensor:
        return torch.linalg.vector_norm(grad.transpose(1, 2) @ x, dim=(1, 2), dtype=torch.float32)

    calls = {
        "lipcore": lambda: functional.linear_norms_sq(x, grad),
        "weight_gradient": lambda: grad.flatten(0, 1).T @ x.flatten(0, 1),
        "one_bmm": one_bmm,
        "two_bmm": two_bmm,
    }
    sizes = {"samples": samples, "tokens": tokens, "inputs": inputs, "outputs": outputs, "dtype": str(dtype)[6:]}
    extra = {"extra_MiB": round(extra_mib(calls["lipcore"]), 1)}
    return {"op": "linear_norms_sq", **sizes, **extra, **measure(calls)}


def fused(samples: int, tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> dict[str, Any]:
    x = torch.randn(samples, tokens, inputs, device="cuda").to(dtype)
    grad = torch.randn(samples, tokens, outputs, device="cuda").to(dtype)
    total, norms = functional.linear_weight_grad(x, grad)
    want = grad.double().flatten(0, 1).T @ x.double().flatten(0, 1)
    assert float(torch.linalg.vector_norm(total.double() - want) / torch.linalg.vector_norm(want)) < 1e-5
    assert_close(norms[:1], (grad[0].double().T @ x[0].double()).square().sum()[None], 1e-5)
    calls = {
        "lipcore": lambda: functional.linear_weight_grad(x, grad),
        "weight_gradient": lambda: grad.flatten(0, 1).T @ x.flatten(0, 1),
    }
    sizes = {"samples": samples, "tokens": tokens, "inputs": inputs, "outputs": outputs, "dtype": str(dtype)[6:]}
    return {"op": "linear_weight_grad", **sizes, **measure(calls)}


def conv(samples: int, channels: int, outputs: int, side: int, kernel: int, dtype: torch.dtype) -> dict[str, Any]:
    x = torch.randn(samples, channels, side, side, device="cuda").to(dtype)
    grad = torch.randn(samples, outputs, side, side, device="cuda").to(dtype)
    shape: dict[str, Any] = {
        "kernel_size": [kernel] * 2,
        "stride": [1, 1],
        "padding": [kernel // 2] * 2,
        "dilation": [1, 1],
    }

    def unfolded() -> Tensor:
        patches = F.unfold(x, kernel, padding=kernel // 2)
        return torch.linalg.vector_norm(grad.flatten(2) @ patches.transpose(1, 2), dim=(1, 2), dtype=torch.float32)

    def weight_gradient() -> Tensor:
        return torch.nn.grad.conv2d_weight(x, (outputs, channels, kernel, kernel), grad, padding=kernel // 2)

    patches = F.unfold(x[:3].double(), kernel, padding=kernel // 2)
    want = (grad[:3].double().flatten(2) @ patches.transpose(1, 2)).square().sum((1, 2))
    assert_close(functional.conv_norms_sq(x, grad, **shape)[:3], want, 1e-5)
    calls = {
        "lipcore": lambda: functional.conv_norms_sq(x, grad, **shape),
        "weight_gradient": weight_gradient,
        "unfold_and_bmm": unfolded,
    }
    sizes = {"samples": samples, "channels": channels, "outputs": outputs, "side": side, "kernel": kernel}
    return {"op": "conv_norms_sq", **sizes, "dtype": str(dtype)[6:], **measure(calls)}


def rows(samples: int, tokens: int, features: int, dtype: torch.dtype) -> dict[str, Any]:
    """Of a bias, and of a norm layer's scale and bias."""
    grad = torch.randn(samples, tokens, features, device="cuda").to(dtype)
    x = torch.randn(samples, tokens, features, device="cuda").to(dtype)
    assert_close(functional.row_sum_norms_sq(grad), grad.double().sum(1).square().sum(1), 1e-10)

    def torch_sums() -> tuple[Tensor, Tensor]:
        return (grad * x).sum(1, dtype=torch.float32).square().sum(1), grad.sum(1, dtype=torch.float32).square().sum(1)

    size = grad.numel() * grad.element_size()
    both = {
        "lipcore": lambda: functional.affine_norms_sq(grad, x),
        "torch": torch_sums,
        "copy_limit": copy_limit(2 * size),
    }
    bias = {
        "lipcore": lambda: functional.row_sum_norms_sq(grad),
        "torch": lambda: grad.sum(1, dtype=torch.float32).square().sum(1),
        "copy_limit": copy_limit(size),
    }
    sizes = {"samples": samples, "tokens": tokens, "features": features, "dtype": str(dtype)[6:]}
    return {"op": "row_sums", **sizes, "bias": measure(bias, size), **measure(both, 2 * size)}


def embedding(samples: int, tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> dict[str, Any]:
    indices = torch.randint(vocabulary, (samples, tokens), device="cuda")
    grad = torch.randn(samples, tokens, width, device="cuda").to(dtype)
    dense = torch.zeros(vocabulary, width, dtype=torch.float64, device="cuda").index_add_(
        0, indices[0], grad[0].double()
    )
    assert_close(functional.embedding_norms_sq(indices, grad)[:1], dense.square().sum()[None], 1e-10)
    ids = torch.arange(samples, device="cuda")[:, None] * vocabulary + indices

    def by_unique() -> Tensor:
        unique, inverse = ids.flatten().unique(return_inverse=True)
        sums = torch.zeros(len(unique), width, device="cuda").index_add_(0, inverse, grad.flatten(0, 1).float())
        return torch.zeros(samples, device="cuda").index_add_(0, unique // vocabulary, sums.square().sum(1))

    def weight_gradient() -> Tensor:
        return torch.ops.aten.embedding_dense_backward(grad, indices, vocabulary, -1, False)

    calls = {
        "lipcore": lambda: functional.embedding_norms_sq(indices, grad),
        "weight_gradient": weight_gradient,
        "unique": by_unique,
    }
    sizes = {"samples": samples, "tokens": tokens, "width": width, "vocabulary": vocabulary, "dtype": str(dtype)[6:]}
    return {"op": "embedding_norms_sq", **sizes, **measure(calls, grad.numel() * grad.element_size())}


CASES = [
    *((linear, case) for case in LINEAR),
    *((fused, case) for case in FUSED),
    *((conv, case) for case in CONV),
    *((rows, case) for case in ROWS),
    (embedding, (8, 1024, 768, 50257, torch.bfloat16)),
    (embedding, (8, 1024, 768, 50257, torch.float32)),
]
