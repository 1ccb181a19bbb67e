"""Biases and element-wise scales: squared norms of sums over a sample's rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipcore import _core
from lipcore.functional import library as _library
from lipcore.functional import portable
from lipcore.functional.arguments import (
    of_one_dtype,
    packed_offsets,
    readable,
    result_beside,
    rows,
    same_place,
    within_range,
)

_SHIFT, _SCALE, _BOTH = 0, 1, 2  # csrc/ops/row_sum_norms.h: Terms


def row_sum_norms_sq(grad: Tensor, x: Tensor | None = None, *, offsets: Tensor | None = None) -> Tensor:
    r"""Compute the squared norms of the per-sample gradients of a bias, or with x of an element-wise scale.

    .. math:: n_b^2 = \|\sum_t g_{bt}\|_2^2 \quad\text{or}\quad n_b^2 = \|\sum_t g_{bt}\odot x_{bt}\|_2^2

    Products and sums are float64: what a sum over a sequence leaves after cancelling is exact to 1e-13 of its terms.
    The number is what grad is: under a mean-reduced loss it carries 1/B^2.

    Args:
        grad: [B, ..., F], the gradient at the layer's output; the dimensions between are summed over. With offsets the
            packed rows [N, F] of all samples.
        x: of the shape of grad, what the scale multiplies: of a norm layer the normalised input.
        offsets: int [B + 1], ascending from 0 to N: sample b has the rows offsets[b] ... offsets[b + 1] - 1.

    Returns:
        float64 [B], detached.

    Raises:
        TypeError, ValueError: an argument lipcore cannot use, or shapes that do not fit; the message names it.

    >>> row_sum_norms_sq(torch.tensor([[[1.0, 2.0], [2.0, 2.0]]]))
    tensor([25.], dtype=torch.float64)
    """
    if torch.compiler.is_compiling():
        x = None if x is None else x.detach()
        traced: Tensor = torch.ops.lipcore.row_sum_norms_sq(grad.detach(), x, offsets)
        return traced
    return _row_sums(grad, x, offsets, _SHIFT if x is None else _SCALE)


def affine_norms_sq(grad: Tensor, x: Tensor, *, offsets: Tensor | None = None) -> Tensor:
    r"""Compute both squared norms of a norm layer's affine parameters, scale and shift, in one pass.

    .. math:: \|\sum_t g_{bt}\odot x_{bt}\|_2^2, \quad \|\sum_t g_{bt}\|_2^2

    Args:
        grad: [B, ..., F], the gradient at the layer's output, or packed [N, F]; see :func:`row_sum_norms_sq`.
        x: of the shape of grad, the normalised input.
        offsets: int [B + 1] of packed rows.

    Returns:
        float64 [2, B]: of the scale, of the shift; detached.

    Raises:
        TypeError, ValueError: as for row_sum_norms_sq.

    >>> affine_norms_sq(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [1.0]]]))
    tensor([[25.],
            [ 9.]], dtype=torch.float64)
    """
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.lipcore.affine_norms_sq(grad.detach(), x.detach(), offsets)
        return traced
    return _row_sums(grad, x, offsets, _BOTH)


def norm_layer_norms_sq(
    grad: Tensor, x: Tensor, *, eps: float, center: bool = True, offsets: Tensor | None = None
) -> Tensor:
    r"""Compute :func:`affine_norms_sq` of a layer norm, or without `center` of an RMS norm, from the layer's input.

    .. math:: \hat x_{bt} = (x_{bt} - \mu_{bt}) / \sqrt{\sigma^2_{bt} + \epsilon}, \quad
        \|\sum_t g_{bt}\odot\hat x_{bt}\|_2^2, \quad \|\sum_t g_{bt}\|_2^2

    with mean and variance of the features of a row; without `center` the mean is 0 and the variance the mean square.
    On the CPU rows are normalised on the way, and no :math:`\hat x` is made. Means and variances are float64,
    :math:`\hat x` is float32 (float64 for float64), as in the layer itself.

    Args:
        grad: [B, ..., F], the gradient at the layer's output, or packed [N, F]; see :func:`row_sum_norms_sq`.
        x: of the shape and dtype of grad, the layer's input.
        eps: what the layer adds to the variance, at least 0.
        center: whether the layer takes the mean off.
        offsets: int [B + 1] of packed rows.

    Returns:
        float64 [2, B]: of the scale, of the shift; detached.

    Raises:
        TypeError, ValueError: as for row_sum_norms_sq; eps is no number that is at least 0, or the dtypes differ.

    >>> norm_layer_norms_sq(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 5.0]]]), eps=0.0)
    tensor([[5.],
            [5.]], dtype=torch.float64)
    """
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.lipcore.norm_layer_norms_sq(grad.detach(), x.detach(), eps, center, offsets)
        return traced
    grad, checked = _checked(grad, x, _BOTH)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a number that is at least 0, got {eps!r}")
    if checked is None or checked.dtype != grad.dtype:
        raise ValueError(f"x: expected the dtype of grad, {grad.dtype}, got {x.dtype}; pass x.to(grad.dtype)")
    if not grad.is_cpu:
        return _row_sums(grad, portable.normalized(checked, eps, center), offsets, _BOTH)
    offsets = packed_offsets(offsets, grad)
    g, x = (rows(t, name, offsets is not None) for t, name in ((grad, "grad"), (checked, "x")))
    g, x = (t if _is_flat(t, 2) else t.contiguous() for t in (g, x))
    found = torch.empty(2, g.shape[0] if offsets is None else len(offsets) - 1, dtype=torch.float64, device=g.device)

    def compute(g: Tensor) -> Tensor:
        out = torch.empty_like(found)
        _core.row_sum_norms(g, x, offsets, _BOTH, out, float(eps), center)
        return out

    return within_range(compute(g), compute, (g,), 2)


def channel_sum_norms_sq(grad: Tensor, x: Tensor | None = None) -> Tensor:
    r"""Compute :func:`row_sum_norms_sq` for channels first: squared norms of sums over space.

    .. math:: n_b^2 = \sum_c(\sum_s g_{bcs})^2 \quad\text{or}\quad n_b^2 = \sum_c(\sum_s g_{bcs}\,x_{bcs})^2

    Args:
        grad: [B, C, \*space], contiguous or channels_last without a copy.
        x: of the shape of grad: of a batch, group or instance norm the normalised input.

    Returns:
        float64 [B], detached.

    Raises:
        TypeError, ValueError: an argument lipcore cannot use, or shapes that do not fit; the message names it.

    >>> channel_sum_norms_sq(torch.ones(1, 2, 3))
    tensor([18.], dtype=torch.float64)
    """
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.lipcore.channel_sum_norms_sq(grad.detach(), None if x is None else x.detach())
        return traced
    return _channel_sums(grad, x, _SHIFT if x is None else _SCALE)


def channel_affine_norms_sq(grad: Tensor, x: Tensor) -> Tensor:
    r"""Compute :func:`affine_norms_sq` for channels first.

    Args:
        grad: [B, C, \*space].
        x: of the shape of grad, the normalised input.

    Returns:
        float64 [2, B]: of the scale, of the shift; detached.

    Raises:
        TypeError, ValueError: as for channel_sum_norms_sq.

    >>> channel_affine_norms_sq(torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0))
    tensor([[72.],
            [18.]], dtype=torch.float64)
    """
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.lipcore.channel_affine_norms_sq(grad.detach(), x.detach())
        return traced
    return _channel_sums(grad, x, _BOTH)


def _checked(grad: Tensor, x: Tensor | None, terms: int) -> tuple[Tensor, Tensor | None]:
    grad = readable(grad, "grad")
    if terms == _SHIFT or x is None:
        return grad, None if terms == _SHIFT else readable(x, "x")  # type: ignore[arg-type]  # None is refused in words
    x = readable(x, "x")
    same_place(x, "x", grad, "grad")
    if x.shape != grad.shape:
        raise ValueError(f"x: expected the shape of grad, {list(grad.shape)}, got {list(x.shape)}")
    return grad, x


def _row_sums(grad: Tensor, x: Tensor | None, offsets: Tensor | None, terms: int) -> Tensor:
    grad, x = _checked(grad, x, terms)
    offsets = packed_offsets(offsets, grad)
    g = rows(grad, "grad", offsets is not None)
    return _sums(g, None if x is None else rows(x, "x", offsets is not None), offsets, terms)


def _channel_sums(grad: Tensor, x: Tensor | None, terms: int) -> Tensor:
    grad, x = _checked(grad, x, terms)
    if grad.dim() < 2:
        raise ValueError(f"grad: expected shape [B, C, *space], got {list(grad.shape)}")
    return _sums(_space_first(grad), None if x is None else _space_first(x), None, terms)


def _space_first(t: Tensor) -> Tensor:
    """Return [B, S, C] of [B, C, *space]: columns that are flat runs, or of channels_last memory rows."""
    by_row = t.movedim(1, -1)
    space = math.prod(t.shape[2:])
    if t.stride(1) == 1 and t.shape[1] > 1:
        return by_row.reshape(t.shape[0], space, t.shape[1])
    return t.reshape(t.shape[0], t.shape[1], space).transpose(1, 2)


def _sums(g: Tensor, x: Tensor | None, offsets: Tensor | None, terms: int) -> Tensor:
    if x is not None and x.dtype != g.dtype:
        g, x = of_one_dtype(g, x)
    samples = g.shape[0] if offsets is None else len(offsets) - 1

    def compute(g: Tensor, x: Tensor | None = None, *, terms: int = terms) -> Tensor:
        if g.is_cpu:
            g, x = _alike(g, x)
        out = result_beside(g, 2, samples) if terms == _BOTH else result_beside(g, samples)
        _core.row_sum_norms(g, x, offsets, terms, out)
        return out

    found = compute(g, x)
    if g.dtype != torch.float64 or not g.is_cpu:  # a device's kernels see to the range themselves
        return found
    if terms != _BOTH or x is None:
        return within_range(found, compute, (g,) if x is None else (g, x), 2)
    scale = within_range(found[0], lambda g, x: compute(g, x, terms=_SCALE), (g, x), 2)
    return torch.stack([scale, within_range(found[1], lambda g: compute(g, terms=_SHIFT), (g,), 2)])


def _alike(g: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return both with flat rows or with flat columns, which is what the kernel reads; copies where they are not."""
    if g.is_contiguous() and (x is None or x.is_contiguous()):
        return g, x
    tensors = [t for t in (g, x) if t is not None]
    if any(all(_is_flat(t, d) for t in tensors) for d in (2, 1)):
        return g, x
    return g if _is_flat(g, 2) else g.contiguous(), x if x is None or _is_flat(x, 2) else x.contiguous()


def _is_flat(t: Tensor, dim: int) -> bool:
    return t.shape[dim] <= 1 or t.stride(dim) == 1


def _fake(grad: Tensor, offsets: Tensor | None, *parts: int) -> Tensor:
    return grad.new_empty(*parts, grad.shape[0] if offsets is None else offsets.shape[0] - 1, dtype=torch.float64)


_library.register(
    "row_sum_norms_sq(Tensor grad, Tensor? x=None, Tensor? offsets=None) -> Tensor",
    lambda grad, x=None, offsets=None: row_sum_norms_sq(grad, x, offsets=offsets),
    lambda grad, x=None, offsets=None: _fake(grad, offsets),
)
_library.register(
    "affine_norms_sq(Tensor grad, Tensor x, Tensor? offsets=None) -> Tensor",
    lambda grad, x, offsets=None: affine_norms_sq(grad, x, offsets=offsets),
    lambda grad, x, offsets=None: _fake(grad, offsets, 2),
)
_library.register(
    "norm_layer_norms_sq(Tensor grad, Tensor x, float eps, bool center=True, Tensor? offsets=None) -> Tensor",
    lambda grad, x, eps, center=True, offsets=None: norm_layer_norms_sq(
        grad, x, eps=eps, center=center, offsets=offsets
    ),
    lambda grad, x, eps, center=True, offsets=None: _fake(grad, offsets, 2),
)
_library.register(
    "channel_sum_norms_sq(Tensor grad, Tensor? x=None) -> Tensor",
    lambda grad, x=None: channel_sum_norms_sq(grad, x),
    lambda grad, x=None: _fake(grad, None),
)
_library.register(
    "channel_affine_norms_sq(Tensor grad, Tensor x) -> Tensor",
    lambda grad, x: channel_affine_norms_sq(grad, x),
    lambda grad, x: _fake(grad, None, 2),
)
