"""Local Lipschitz constants at any points, by a backward pass of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lipcore import functional
from lipcore.capture import paused
from lipcore.names import named_modules


def mixes_samples(module: nn.Module) -> bool:
    """Whether this BatchNorm normalises by the statistics of the batch."""
    return module.training or getattr(module, "running_mean", None) is None


def refuse_mixing(model: nn.Module) -> None:
    """ValueError where one sample's output depends on the others'."""
    for name, module in named_modules(model):
        if isinstance(module, _BatchNorm) and mixes_samples(module):
            mode = "in train mode" if module.training else "without running statistics"
            raise ValueError(
                f"model: module '{name}' is a {type(module).__name__} {mode}, which mixes samples; call model.eval()"
            )


def local_lipschitz(
    model: nn.Module,
    x: Tensor,
    *,
    output: int | Callable[[Any], Tensor] | None = None,
    quantity: Literal["scalar", "jacobian"] = "scalar",
) -> Tensor:
    r"""Local Lipschitz constants at given points, :math:`\lambda_i = \|\nabla_x f(x_i)\|_2`, by one backward pass.

    For a network with piecewise linear activations this is the Lipschitz constant of the linear region around x_i.
    Parameters' gradients are not touched.

    Args:
        model: maps x [B, ...] to one value per sample, [B] or [B, 1].
        x: [B, ...], floating.
        output: for other outputs, which value: an index into the last dimension of [B, K], or a callable that turns
            what the model returns into [B].
        quantity: "jacobian" gives the spectral norm of the Jacobian of an output [B, K] instead, by K backward passes.

    Returns:
        float64 [B], detached.

    Raises:
        ValueError: the output has several values per sample and nothing says which; x is empty of dimensions; BatchNorm
            in train mode (samples mix; call model.eval()); the output does not depend on x.
        TypeError: x is not a floating tensor.

    >>> line = nn.Linear(2, 1)
    >>> _ = line.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> local_lipschitz(line, torch.zeros(1, 2))
    tensor([5.], dtype=torch.float64)
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"x: expected a floating tensor, got {x.dtype}; the gradient with respect to integers is not defined"
        )
    if not x.dim():
        raise ValueError("x: expected shape [B, ...], got a 0-dimensional tensor")
    refuse_mixing(model)
    if quantity not in ("scalar", "jacobian"):
        raise ValueError(f"quantity: expected 'scalar' or 'jacobian', got {quantity!r}")
    with torch.enable_grad(), paused():
        point = x.detach().clone().requires_grad_()
        result = model(point)
        if quantity == "jacobian":
            return _jacobian_norms(result, point)
        value = _one_per_sample(result, output, len(x))
        if not len(x):
            return torch.empty(0, dtype=torch.float64, device=x.device)
        (gradient,) = _grad(value.sum(), point)
    return functional.sample_norms(gradient)


def _one_per_sample(result: Any, output: int | Callable[[Any], Tensor] | None, batch: int) -> Tensor:
    if callable(output):
        result = output(result)
    if not isinstance(result, Tensor):
        raise ValueError(
            f"output: the model returns a {type(result).__name__}; pass output=<callable that gives one value per "
            "sample>"
        )
    if isinstance(output, int):
        if result.dim() != 2 or not -result.shape[1] <= output < result.shape[1]:
            raise ValueError(
                f"output: index {output} does not fit the model's output of shape {list(result.shape)}; expected [B, K]"
            )
        result = result[:, output]
    if result.dim() == 0 or result.shape[0] != batch or result.numel() != batch:
        raise ValueError(
            f"output: the model's output has shape {list(result.shape)} for {batch} samples, but one value per "
            "sample is needed; pass "
            "output=<index or callable>, or quantity='jacobian' for the Jacobian's spectral norm"
        )
    value: Tensor = result
    return value


def _jacobian_norms(result: Any, point: Tensor) -> Tensor:
    if not isinstance(result, Tensor) or result.dim() < 1 or result.shape[0] != point.shape[0]:
        raise ValueError("quantity: 'jacobian' needs a tensor output of shape [B, ...]")
    if not len(point):
        return torch.empty(0, dtype=torch.float64, device=point.device)
    flat = result.reshape(len(point), -1)
    rows = [_grad(column.sum(), point, retain=True)[0].reshape(len(point), -1) for column in flat.unbind(1)]
    norms: Tensor = torch.linalg.matrix_norm(torch.stack(rows, 1).double(), ord=2)
    return norms


def _grad(value: Tensor, point: Tensor, *, retain: bool = False) -> tuple[Tensor, ...]:
    if not value.requires_grad:
        raise ValueError("model: its output does not depend on x through differentiable operations")
    try:
        gradients: tuple[Tensor, ...] = torch.autograd.grad(value, point, retain_graph=retain)
    except RuntimeError as error:
        if "not have been used" not in str(error):
            raise
        raise ValueError("model: its output does not depend on x through differentiable operations") from None
    return gradients
