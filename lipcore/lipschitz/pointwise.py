"""Local Lipschitz constants at any points, by backward passes of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lipcore import functional
from lipcore.models.checks import check_input, check_model, finite_rows, mixes_samples
from lipcore.models.names import called_inside
from lipcore.models.outputs import _flat_output, check_output, one_per_sample
from lipcore.models.own_pass import fresh, own_pass, run

_GOLDEN = 0.6180339887498949

__all__ = ["local_lipschitz", "mixes_samples", "one_per_sample"]


def local_lipschitz(
    model: nn.Module,
    x: Tensor,
    *,
    output: int | str | Callable[[Any], Tensor] | None = None,
    quantity: Literal["scalar", "jacobian"] = "scalar",
) -> Tensor:
    r"""Compute local Lipschitz constants at given points, :math:`\lambda_i = \|\nabla_x f(x_i)\|_2`, by one backward
    pass.

    For a network with piecewise linear activations this is the Lipschitz constant of the linear region that holds x_i.
    A pass of its own first checks that samples do not influence each other. Autocast is off in both passes; the
    parameters' gradients, the buffers and the state of random numbers are left as they are.

    A row whose input or output is NaN or infinite gets NaN: ReLU passes no gradient at NaN, so the number would be
    finite and mean nothing.

    Args:
        model: maps x [B, ...] to one value per sample, [B] or [B, 1].
        x: [B, ...], floating.
        output: for other outputs, which value: an index into the last dimension of [B, K], the key or attribute that
            it has in what the model returns, or a callable that turns what the model returns into [B].
        quantity: "scalar", or "jacobian" for the spectral norm of the Jacobian of an output [B, K], by K backward
            passes.

    Returns:
        float64 [B], detached.

    Raises:
        ValueError: the output has several values per sample and nothing says which one is meant; x has no batch
            dimension, or another device or dtype than the model; the output does not depend on x; samples influence
            each other (BatchNorm in train mode, a sum over the batch); or random numbers are drawn (Dropout or RReLU in
            train mode, and others). For the last two, call model.eval().
        TypeError: x is not a floating tensor; output is no index and no callable.

    >>> line = nn.Linear(2, 1)
    >>> _ = line.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> local_lipschitz(line, torch.zeros(1, 2))
    tensor([5.], dtype=torch.float64)
    """
    return constants(model, x, output, quantity)


def constants(
    model: nn.Module, x: Tensor, output: Any = None, quantity: str = "scalar", *, known_apart: bool = False
) -> Tensor:
    """Compute what :func:`local_lipschitz` returns. For points of which another batch has shown that samples do not mix
    (`known_apart`), one pass does instead of two."""
    model = called_inside(model)
    check_input(model, x)
    if not x.is_floating_point():
        raise TypeError(
            f"x: expected a floating tensor, got {x.dtype}; the gradient with respect to integers is not defined"
        )
    check_model(model)
    check_output(output)
    if quantity not in ("scalar", "jacobian"):
        raise ValueError(f"quantity: expected 'scalar' or 'jacobian', got {quantity!r}")
    take = _flat_output if quantity == "jacobian" else functools.partial(one_per_sample, output=output)
    if len(x) > 1 and not known_apart:
        with own_pass(model):
            point, given = fresh(x)
            in_eval = not any(module.training for module in model.modules())
            _check_apart(take(run(model, given), batch=len(x)), point, "" if in_eval else "call model.eval(), or ")
    with own_pass(model):
        point, given = fresh(x)
        values = take(run(model, given), batch=len(x))
        if quantity == "jacobian":
            norms = _jacobian_norms(values, point)
        else:
            norms = functional.sample_norms(_grad(values.sum(), point)[0]) if len(x) else _none(x)
        finite = finite_rows(point.detach()) & finite_rows(values.detach())
        return norms.masked_fill(~finite, float("nan"))


def _check_apart(values: Tensor, point: Tensor, first_way: str) -> None:
    """Raise a ValueError where values of some samples depend on others, with a way out to try first. Their own gradient
    shows it, which is 0 where samples are apart, so mixing is seen whatever causes it. A pass of its own: a compiled
    model's graph can be gone through backwards once."""
    if not values.numel():
        return
    # About half of them, in a sequence without a period: samples at any distance from one another are told apart.
    some = torch.arange(len(point), device="cpu").double().mul(_GOLDEN).remainder(1) < 0.5
    (gradient,) = _grad(values[some.to(values.device)].sum(), point)
    others = gradient[~some.to(point.device)]
    if torch.nan_to_num(others, 0.0, 0.0, 0.0).any():  # NaN comes from 0 times an infinity of the sample's own
        raise ValueError(
            "model: its output for one sample depends on other samples of the batch (batch statistics, a sum over the "
            f"batch), so it has no constant of its own; {first_way}leave out what mixes samples"
        )


def _none(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float64, device=x.device)


def _jacobian_norms(values: Tensor, point: Tensor) -> Tensor:
    if not len(point):
        return _none(point)
    rows = [_grad(column.sum(), point, retain=True)[0].reshape(len(point), -1) for column in values.unbind(1)]
    jacobians = torch.stack(rows, 1).double()
    finite = finite_rows(jacobians)
    # An SVD refuses the whole batch for one row that is not finite.
    norms: Tensor = torch.linalg.matrix_norm(torch.nan_to_num(jacobians), ord=2)
    return norms.masked_fill(~finite, float("nan"))


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
