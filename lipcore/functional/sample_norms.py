"""Norms of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lipcore import _core
from lipcore.functional import library as _library
from lipcore.functional.arguments import check_state, resolved


def sample_norms(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    r"""Compute the Euclidean norm of every sample, :math:`n_b = \|x_b\|_2`, with x of shape [B, ...].

    Squares are taken and summed in float64, so nothing overflows or underflows and the order of threads does not
    matter; the error is 1e-13 at most. On CUDA devices that take 16 or more times as long in float64, eight 16-bit
    numbers at a time are squared exactly and added in float32 where their squares fit: the error is 1e-7 at most.
    The number is what x is: of a gradient under a mean-reduced loss it carries that loss's 1/B.

    Args:
        x: [B, ...], one sample per row, any strides. [0, ...] gives [0]; rows without elements give 0.
        out: float64 [B] to write into; it must not share memory with x.

    Returns:
        float64 [B], detached.

    Raises:
        TypeError, ValueError: x or out is not a tensor lipcore can use; the message names it and the remedy.

    >>> sample_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([5., 0.], dtype=torch.float64)
    """
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.lipcore.sample_norms(x.detach())
        return traced
    x = resolved(x, "x")
    if out is None:
        if not x.dim():
            raise ValueError(
                "x: expected shape [B, ...] with one row per sample, got a 0-dimensional tensor; use x.reshape(1)"
            )
        out = (
            torch.empty(x.shape[0], dtype=torch.float64, device=_library.CPU)
            if x.is_cpu
            else x.new_empty(x.shape[0], dtype=torch.float64)
        )
    else:
        check_state(out, "out")
    _core.sample_norms(x, out)
    return out


def normalized_norms(delta: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
    r"""Compute normalised norms :math:`r_b = \|\partial L/\partial u_b\|_2 \,/\, |\partial L/\partial\hat y_b|`.

    Both factors come from the same backward pass, so the loss reduction, a factor 1/2, an AMP loss scale and gradient
    accumulation all cancel: r_b is the norm of the gradient of the network's output with respect to u_b, the summand of
    Theorem 1 of Loukas, Poiitis and Jegelka (NeurIPS 2021).

    Args:
        delta: [B, ...], gradient of the loss with respect to the first layer's output before its activation.
        output_grad: B values, gradient of the loss with respect to the network's output, one value per sample.

    Returns:
        r, float64 [B], NaN where output_grad is 0 or not finite (such a sample says nothing about the network), and how
        many those are, int64 of shape [].

    Raises:
        TypeError, ValueError: an argument lipcore cannot use, or shapes that do not belong together.

    >>> normalized_norms(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([0.5, 0.0]))
    (tensor([10., nan], dtype=torch.float64), tensor(1))
    """
    if torch.compiler.is_compiling():
        both: tuple[Tensor, Tensor] = torch.ops.lipcore.normalized_norms(delta.detach(), output_grad.detach())
        return both
    delta, output_grad = resolved(delta, "delta"), resolved(output_grad, "output_grad")
    if not delta.dim():
        raise ValueError("delta: expected shape [B, ...] with one row per sample, got a 0-dimensional tensor")
    if not delta.is_cpu:
        return _normalized_norms_on_device(delta, output_grad)
    r = torch.empty(delta.shape[0], dtype=torch.float64, device=_library.CPU)
    # scalar_tensor: a third of torch.tensor's time
    return r, torch.scalar_tensor(_core.normalized_norms(delta, output_grad, r), dtype=torch.int64)


def _normalized_norms_on_device(delta: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
    if output_grad.numel() != delta.shape[0] or output_grad.device != delta.device:
        raise ValueError(
            f"output_grad: expected {delta.shape[0]} values on {delta.device}, one per sample of delta, got shape "
            f"{list(output_grad.shape)} on {output_grad.device}"
        )
    eps = output_grad.detach().reshape(-1).to(torch.float64).abs()
    usable = (eps > 0) & eps.isfinite()
    return torch.where(usable, sample_norms(delta) / eps, torch.nan), (~usable).sum()


_library.register(
    "sample_norms(Tensor x) -> Tensor",
    lambda x: sample_norms(x),
    lambda x: x.new_empty(x.shape[:1], dtype=torch.float64),
)
_library.register(
    "normalized_norms(Tensor delta, Tensor output_grad) -> (Tensor, Tensor)",
    normalized_norms,
    lambda delta, output_grad: (
        delta.new_empty(delta.shape[:1], dtype=torch.float64),
        delta.new_empty((), dtype=torch.int64),
    ),
)
