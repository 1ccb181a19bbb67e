"""Layers that see one row per sample: a product of two norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipcore import _core
from lipcore.functional import library as _library
from lipcore.functional.arguments import same_place
from lipcore.functional.sample_norms import sample_norms


def outer_norms_sq(x: Sequence[Tensor], grad: Sequence[Tensor]) -> Tensor:
    r"""Compute squared norms of weight gradients of Linears that see one row per sample, many layers in one call.

    .. math:: n_{lb}^2 = \|g_{lb}\,x_{lb}^T\|_F^2 = \|x_{lb}\|_2^2\,\|g_{lb}\|_2^2

    Squares are taken and summed in float64. The number is what grad is: under a mean-reduced loss it carries 1/B^2.

    Args:
        x: the inputs of the layers, each [B, ...] with any strides; a sample's elements count as one row.
        grad: the gradients at their outputs, each [B, ...]. Its dtype need not be that of x.

    Returns:
        float64 [layers, B], detached.

    Raises:
        TypeError, ValueError: a tensor lipcore cannot use, lists or batches of different length; the message names it.

    Source: Goodfellow, "Efficient per-example gradient computations", arXiv:1510.01799 (2015).

    >>> outer_norms_sq([torch.tensor([[1.0, 2.0]])], [torch.tensor([[3.0]])])
    tensor([[45.]], dtype=torch.float64)
    """
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.lipcore.outer_norms_sq([a.detach() for a in x], [g.detach() for g in grad])
        return traced
    return _outer(x, grad, 1)[0]


def outer_and_bias_norms_sq(x: Sequence[Tensor], grad: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    r"""Compute the squared norms of weight and bias gradients of such layers: :func:`outer_norms_sq` and
    :math:`\|g_{lb}\|_2^2`, reading grad once.

    Args:
        x: the inputs of the layers, each [B, ...].
        grad: the gradients at their outputs, each [B, ...].

    Returns:
        Two float64 [layers, B], of the weights and of the biases, detached.

    Raises:
        TypeError, ValueError: as for outer_norms_sq.

    >>> outer_and_bias_norms_sq([torch.tensor([[1.0, 2.0]])], [torch.tensor([[3.0]])])[1]
    tensor([[9.]], dtype=torch.float64)
    """
    if torch.compiler.is_compiling():
        traced: tuple[Tensor, Tensor] = torch.ops.lipcore.outer_and_bias_norms_sq(
            [a.detach() for a in x], [g.detach() for g in grad]
        )
        return traced
    weight, bias = _outer(x, grad, 2).unbind()
    return weight, bias


def _outer(x: Sequence[Tensor], grad: Sequence[Tensor], parts: int) -> Tensor:
    first = x[0] if isinstance(x, (list, tuple)) and x else None
    if isinstance(first, Tensor):
        _core.check_storage(first, "x[0]")  # before its shape is asked for
        if not first.is_cpu:
            return _portable(x, grad, parts)
    samples = first.shape[0] if isinstance(first, Tensor) and first.dim() else 0
    out = torch.empty(parts, 0 if first is None else len(x), samples, dtype=torch.float64, device=_library.CPU)
    _core.outer_norms(x, grad, out)
    return out


def _portable(x: Sequence[Tensor], grad: Sequence[Tensor], parts: int) -> Tensor:
    if len(x) != len(grad):
        raise ValueError(f"grad: expected {len(x)} tensors, one per tensor of x, got {len(grad)}")
    for name, tensors in (("x", x), ("grad", grad)):
        for i, tensor in enumerate(tensors):
            if isinstance(tensor, Tensor):  # sample_norms refuses what is none
                same_place(tensor, f"{name}[{i}]", x[0], "x[0]")
    norms = torch.stack([*map(sample_norms, x), *map(sample_norms, grad)]).unflatten(0, (2, len(x)))
    norms[0].mul_(norms[1])  # in place, so that few operations serve all tensors
    squares: Tensor = norms[:parts].square_()
    return squares


def _fake(x: Sequence[Tensor], grad: Sequence[Tensor]) -> Tensor:
    return x[0].new_empty(len(x), x[0].shape[0], dtype=torch.float64)


_library.register("outer_norms_sq(Tensor[] x, Tensor[] grad) -> Tensor", lambda x, grad: outer_norms_sq(x, grad), _fake)
_library.register(
    "outer_and_bias_norms_sq(Tensor[] x, Tensor[] grad) -> (Tensor, Tensor)",
    # Two tensors of their own: the results of an operator must not share memory.
    lambda x, grad: tuple(part.clone() for part in outer_and_bias_norms_sq(x, grad)),
    lambda x, grad: (_fake(x, grad), _fake(x, grad)),
)
