"""Corollary 1: a bound of the local Lipschitz constants at the data, beside the truth and the product of norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.chain import modules_in_order
from lipcore.names import unwrap
from lipcore.pointwise import local_lipschitz, mixes_samples
from lipcore.results import Value, Window, weakest
from lipcore.spectral import singular_values
from lipcore.theory.finding import Finding
from lipcore.theory.training import steadiness
from lipcore.theory.windows import select

#: Global Lipschitz constants of torch's element-wise activations.
_CONSTANTS: dict[type[nn.Module], float] = {
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Hardtanh: 1.0,
    nn.Tanh: 1.0,
    nn.Softplus: 1.0,
    nn.Softsign: 1.0,
    nn.Sigmoid: 0.25,
    nn.LogSigmoid: 1.0,
    nn.GELU: 1.12894,  # maximum of its derivative, rounded up
    nn.SiLU: 1.09984,
    nn.Identity: 1.0,
    nn.Flatten: 1.0,
    nn.Unflatten: 1.0,
}


@dataclass(frozen=True, repr=False)
class GlobalBound(Finding):
    """Corollary 1: max of lambda over the data <= beta phi."""

    bound: Value  #: beta phi
    beta: Value  #: largest sigma_1(W_1) over the windows
    phi: Value  #: steadiness from the first of the windows on
    largest: Value  #: true maximum of lambda over the given inputs; NaN without them
    spectral_product: Value  #: prod ||W_l||_2 times the activations' constants; not valid where it is not known


def lipschitz_bound(
    history: Iterable[Window],
    model: nn.Module | None = None,
    x: Tensor | None = None,
    *,
    output: int | Callable[[Any], Tensor] | None = None,
    first_step: int | None = None,
    last_step: int | None = None,
    place: str | None = None,
    metric: str = "lipschitz",
) -> GlobalBound:
    r"""Corollary 1 of Loukas et al.: :math:`\lambda(R_x) \le \beta\varphi` for every sample visited at t >= tau, with
    :math:`\beta \ge \sigma_1(W_1)` and :math:`\varphi` the steadiness from tau on.

    It is about samples as they were visited from tau on. With `model` and `x` (the training inputs) two numbers stand
    beside it: the true maximum of lambda over x now, and :func:`spectral_norm_product`, which bounds it everywhere.

    Raises:
        ValueError: no window; no Lipschitz metric; its first layer has no spectral norm (an Embedding); only one of
            model and x was given.
    """
    if (model is None) != (x is None):
        raise ValueError("model, x: expected both or neither")
    windows = select(history, metric, first_step, last_step)
    curve = steadiness(windows, place=place, metric=metric)
    norms = [window[metric].details.get("singular_values") for window in windows]
    if any(norm is None for norm in norms):
        raise ValueError(
            "history: a window has no singular values of the first layer; it needs a Linear or convolution as first "
            "layer, a scalar output, and recorded samples with a lambda"
        )
    beta = max(norm["largest"] for norm in norms if norm is not None)
    moved = any("moved" in row["lower"].note for w in windows for row in w[metric]["sandwich"].values())
    label = weakest([curve.label, "heuristic" if moved else "one-sided"])
    note = "W_1 moved within a window; beta is from the windows' ends" if moved else ""
    count = len(windows)
    phi = Value(curve.phi[0], count, curve.label, not math.isnan(curve.phi[0]))
    missing = Value(math.nan, 0, "exact", False, "pass model and x")
    largest = product = missing
    if model is not None and x is not None:
        values = local_lipschitz(model, x, output=output)
        if not len(values):
            raise ValueError(f"x: expected shape [N, ...] with N >= 1, got {list(x.shape)}")
        largest = Value(float(values.max()), len(values), "exact")
        try:
            product = spectral_norm_product(model, x)
        except ValueError as error:
            product = Value(math.nan, 0, "one-sided", False, str(error))
    return GlobalBound(
        Value(beta * curve.phi[0], count, label, phi.valid, note), Value(beta, count), phi, largest, product
    )


@torch.no_grad()
def spectral_norm_product(model: nn.Module, x: Tensor) -> Value:
    r"""The textbook bound of the global Lipschitz constant: :math:`\prod_l \|W_l\|_2` times the constants of what lies
    between.

    For chains (nested nn.Sequential) of Linear, convolutions, BatchNorm in eval mode, pooling and element-wise
    activations. Norms are by SVD, of larger maps and convolutions by Lanczos iteration, converged to 1e-4 or better.
    One-sided; exact only by accident.

    Args:
        x: inputs [N, ...] with N >= 1; only their shape matters, for convolutions.

    Raises:
        ValueError: the model is no chain, or a module in it has no known constant (named).
    """
    chain = modules_in_order(model)
    if chain is None:
        raise ValueError(
            f"model: a {type(unwrap(model)).__name__} is not a chain of torch's layers (nn.Sequential), so its "
            "spectral norms do not multiply"
        )
    if not x.dim() or not len(x):
        raise ValueError(f"x: expected shape [N, ...] with N >= 1, got {list(x.shape)}")
    product, point = 1.0, x[:1].detach()
    for position, module in enumerate(chain):
        product *= _constant(module, position, point)
        point = module(point)
    return Value(product, len(chain), "one-sided")


def _constant(module: nn.Module, position: int, x: Tensor) -> float:
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        found = singular_values(module, tuple(x.shape))
        if found is not None:
            return found.largest
    kind = type(module)
    if kind in _CONSTANTS:
        return _CONSTANTS[kind]
    if isinstance(module, nn.LeakyReLU):
        return max(1.0, abs(module.negative_slope))
    if isinstance(module, nn.PReLU):
        return max(1.0, float(module.weight.abs().max()))
    if isinstance(module, nn.ELU):
        return max(1.0, module.alpha)
    if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)) and not module.training:
        return 1.0
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not mixes_samples(module):
        assert module.running_var is not None
        scale = torch.rsqrt(module.running_var.double() + module.eps)
        return float((scale if module.weight is None else scale * module.weight.double().abs()).max())
    pooled = _pooling(module)
    if pooled is not None:
        return pooled
    raise ValueError(
        f"model: module {position} of the chain, {kind.__name__}, has no known Lipschitz constant; leave it out or put "
        "the model into eval mode"
    )


def _pooling(module: nn.Module) -> float | None:
    """An input element enters at most prod ceil(kernel / stride) windows; an average divides by the window's root."""
    maximum = isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d))
    if not maximum and not isinstance(module, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
        return None
    dims = int(type(module).__name__[-2])
    kernel, stride = (
        [size] * dims if isinstance(size, int) else list(size) * (dims if len(size) == 1 else 1)  # type: ignore[arg-type]
        for size in (module.kernel_size, module.stride)
    )
    windows = math.prod(math.ceil(k / s) for k, s in zip(kernel, stride, strict=True))
    return math.sqrt(windows) if maximum else math.sqrt(windows / math.prod(kernel))
