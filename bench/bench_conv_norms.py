"""Per-sample norms of convolutions, against the batch's weight gradient and against what makes each sample's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import interleave, ratios, threads
from torch import Tensor

from lipcore import functional
from lipcore.functional import reference

# (B, C, O, H = W, kernel, stride): a CIFAR-shaped network from its first layer to its last, and a 1x1.
_LAYERS = {
    "3-32, 32x32": (64, 3, 32, 32, 3, 1),
    "32-64, 16x16": (64, 32, 64, 16, 3, 1),
    "64-128, 16x16 by 2": (64, 64, 128, 16, 3, 2),
    "128-128, 8x8": (64, 128, 128, 8, 3, 1),
    "512-512, 4x4": (16, 512, 512, 4, 3, 1),
    "64-256, 8x8, 1x1": (64, 64, 256, 8, 1, 1),
}


def _weight_gradient(x: Tensor, grad: Tensor, kernel: int, stride: int) -> Tensor:
    weight = x.new_empty(grad.shape[1], x.shape[1], kernel, kernel)
    two, padding = [stride] * 2, [kernel // 2] * 2
    mask = [False, True, False]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, two, padding, [1, 1], False, [0, 0], 1, mask)[1]


def _loop(x: Tensor, grad: Tensor, kernel: int, stride: int) -> Tensor:
    parts = zip(x.split(1), grad.split(1), strict=True)
    return torch.stack([_weight_gradient(a, g, kernel, stride).square().sum() for a, g in parts])


def _unfold(x: Tensor, grad: Tensor, kernel: int, stride: int) -> Tensor:
    """What Opacus does for a gradient per sample."""
    patches = torch.nn.functional.unfold(x, kernel, padding=kernel // 2, stride=stride)
    return torch.einsum("bot,bpt->bop", grad.flatten(2), patches).square().sum((1, 2))


@pytest.mark.parametrize("layer", _LAYERS)
def bench_conv_norms(benchmark: Any, report: Any, layer: str) -> None:
    samples, inputs, outputs, side, kernel, stride = _LAYERS[layer]
    torch.manual_seed(0)
    x = torch.randn(samples, inputs, side, side)
    out = (side + 2 * (kernel // 2) - kernel) // stride + 1
    grad = torch.randn(samples, outputs, out, out)
    geometry = {
        "kernel_size": [kernel] * 2,
        "stride": [stride] * 2,
        "padding": [kernel // 2] * 2,
        "dilation": [1, 1],
    }
    truth = reference.conv_norms_sq(x[:4], grad[:4], **geometry)
    error = float(((functional.conv_norms_sq(x[:4], grad[:4], **geometry) - truth).abs() / truth).max())
    assert error <= 1e-5
    with threads(1):
        calls = {
            "lipcore": lambda: functional.conv_norms_sq(x, grad, **geometry),
            "direct": lambda: functional.conv_norms_sq(x, grad, method="direct", **geometry),
            "weight gradient": lambda: _weight_gradient(x, grad, kernel, stride),
            "loop": lambda: _loop(x, grad, kernel, stride),
            "unfold": lambda: _unfold(x, grad, kernel, stride),
        }
        times = interleave(calls, seconds=4)
        benchmark.pedantic(calls["lipcore"], rounds=3, iterations=1)
    found = ratios(times, "lipcore")
    shape = {"kernel_size": geometry["kernel_size"], "padding": geometry["padding"]}
    method = functional.conv_method(x.shape, grad.shape, **shape)
    title = f"convolution norms, {layer}"
    details = {"error": error, "method": method, "direct": ratios(times, "direct")["weight gradient"]}
    report.add(
        f"{title}: time", 1 / found["weight gradient"], "x weight gradient", target=1.3, better="lower", **details
    )
    report.add(f"{title}: against a loop over samples", found["loop"], "x faster", target=1.2, better="higher")
    report.add(f"{title}: against unfold and einsum", found["unfold"], "x faster", target=1.9, better="higher")
