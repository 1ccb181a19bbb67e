"""Global Lipschitz constants of torch's layers, each by a formula that holds for all its settings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lipcore.lipschitz.pointwise import mixes_samples
from lipcore.lipschitz.singular_values import singular_values
from lipcore.models.torch_internals import AnyBatchNorm

#: Of activations without settings (or whose settings do not matter): the largest slope, rounded up.
_SLOPES: dict[type[nn.Module], float] = {
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Hardtanh: 1.0,
    nn.Tanh: 1.0,
    nn.Tanhshrink: 1.0,
    nn.Softshrink: 1.0,
    nn.Softsign: 1.0,
    nn.Sigmoid: 0.25,
    nn.LogSigmoid: 1.0,
    nn.Hardsigmoid: 1 / 6 + 1e-7,  # float32 rounds 1/6 up
    nn.SELU: 1.758100,  # scale times alpha, just below 0
    nn.SiLU: 1.09984,
    nn.Mish: 1.08850,
    nn.Hardswish: 1.5,  # (2x + 3)/6 just below 3
    nn.Identity: 1.0,
    nn.Flatten: 1.0,
    nn.Unflatten: 1.0,
}
_GELU = {"none": 1.12891, "tanh": 1.12900}
_SOFTPLUS_THRESHOLD = 20  # below it the switch to the identity is a jump that float32 sees
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGES = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def layer_constant(module: nn.Module, x: Tensor) -> tuple[float, str] | None:
    """Bound the Lipschitz constant of a layer in the 2-norm. Returns the bound and the iteration that found it, if one
    was needed; None where the constant is not known or does not exist (a jump, a layer that mixes samples).

    Args:
        x: one sample [1, ...]; its shape matters to convolutions and pooling.
    """
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        found = singular_values(module, tuple(x.shape))
        return None if found is None else (found.upper, "" if found.exact else found.rule)
    constant = _activation(module)
    if constant is None:
        constant = _other(module, x)
    return None if constant is None else (constant, "")


def _activation(module: nn.Module) -> float | None:
    if type(module) in _SLOPES:
        return _SLOPES[type(module)]
    if isinstance(module, nn.GELU):
        return _GELU.get(module.approximate)
    if isinstance(module, nn.LeakyReLU):
        return max(1.0, abs(module.negative_slope))
    if isinstance(module, nn.RReLU) and not module.training:
        return max(1.0, abs(module.lower + module.upper) / 2)
    if isinstance(module, nn.PReLU):
        return float(module.weight.detach().double().abs().clamp(min=1.0).max())  # NaN stays NaN
    if isinstance(module, nn.ELU):
        return max(1.0, abs(module.alpha))
    if isinstance(module, nn.CELU) and module.alpha > 0:
        return 1.0
    if isinstance(module, nn.Softplus) and module.beta > 0 and module.threshold >= _SOFTPLUS_THRESHOLD:
        return 1.0
    return None


def _other(module: nn.Module, x: Tensor) -> float | None:
    if isinstance(module, _DROPOUTS) and not module.training:
        return 1.0
    if isinstance(module, AnyBatchNorm) and not mixes_samples(module):
        assert module.running_var is not None
        scale = torch.rsqrt(module.running_var.double() + module.eps)
        return float((scale if module.weight is None else scale * module.weight.double().abs()).max())
    if isinstance(module, _MAX_POOLS) and not module.return_indices:
        return _max_pooling(module)
    return _averaging(module, x) if isinstance(module, _AVERAGES) else None


def _max_pooling(module: nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d) -> float:
    """Compute the root of the number of windows of which an input element can be the maximum. Element p is in window
    j at place i when p = j stride + i dilation: every stride / gcd(stride, dilation)-th of the kernel's places."""
    dims = int(type(module).__name__[-2])
    settings = (
        [size] * dims if isinstance(size, int) else list(size) * (dims if len(size) == 1 else 1)
        for size in (module.kernel_size, module.stride, module.dilation)
    )
    return math.sqrt(math.prod(math.ceil(k * math.gcd(s, d) / s) for k, s, d in zip(*settings, strict=True)))


def _averaging(module: nn.Module, x: Tensor) -> float:
    r"""Bound the norm of a linear map A with entries of one sign: :math:`\|A\|_2 \le \sqrt{\|A\|_1 \|A\|_\infty}`,
    with the sums from A 1 and A^T 1. So padding, ceil_mode and divisors are whatever the layer makes of them."""
    with torch.enable_grad():
        ones = torch.ones(x.shape, dtype=torch.float64, device=x.device, requires_grad=True)
        rows = module(ones)
        (columns,) = torch.autograd.grad(rows, ones, torch.ones_like(rows))
    return math.sqrt(float(rows.detach().abs().max()) * float(columns.abs().max()))
