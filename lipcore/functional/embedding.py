"""Embeddings: squared norms of per-sample gradients, which are sparse, and their inner product with a tied head's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipcore import _core
from lipcore.functional import library as _library
from lipcore.functional import portable
from lipcore.functional.arguments import (
    flat_rows,
    integers,
    packed_offsets,
    readable,
    result_beside,
    rows,
    same_place,
    within_range,
)
from lipcore.models.arguments import is_integer


def embedding_norms_sq(
    indices: Tensor,
    grad: Tensor,
    *,
    weights: Tensor | None = None,
    padding_idx: int | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    r"""Compute squared norms of an embedding weight's per-sample gradients, repeated tokens added before squaring.

    .. math:: n_b^2 = \sum_v \|\sum_{t:\,i_{bt}=v} w_{bt}\,g_{bt}\|_2^2

    A hash per sample finds the repeated tokens, on a CUDA device one sort, so the cost is one read of grad. Sums are
    float64. The number is what grad is: under a mean-reduced loss it carries 1/B^2.

    Args:
        indices: int64 or int32 [B, ...] of T tokens per sample, or with offsets the packed tokens [N].
        grad: [B, ..., D], the gradient at the embedding's output, a row per token, or packed [N, D].
        weights: of the shape of indices, what each row is multiplied by (per_sample_weights of an embedding bag); 1
            without.
        padding_idx: the token that gets no gradient.
        offsets: int [B + 1], ascending from 0 to N: sample b has the tokens offsets[b] ... offsets[b + 1] - 1.

    Returns:
        float64 [B], detached.

    Raises:
        TypeError, ValueError: an argument lipcore cannot use, or shapes that do not fit; the message names it.

    Source: the sum that Li, Tramer, Liang, Hashimoto, "Large language models can be strong differentially private
    learners" (ICLR 2022), write with a T x T mask of equal tokens.

    >>> embedding_norms_sq(torch.tensor([[7, 7, 1]]), torch.tensor([[[1.0], [2.0], [4.0]]]))
    tensor([25.], dtype=torch.float64)
    """
    if torch.compiler.is_compiling():
        weights = None if weights is None else weights.detach()
        traced: Tensor = torch.ops.lipcore.embedding_norms_sq(indices, grad.detach(), weights, padding_idx, offsets)
        return traced
    _check_padding(padding_idx)
    grad, indices = readable(grad, "grad"), integers(indices, "indices")
    same_place(indices, "indices", grad, "grad")
    offsets = packed_offsets(offsets, grad)
    _check_tokens(indices, grad, "grad")
    if weights is not None:
        weights = readable(weights, "weights")
        same_place(weights, "weights", grad, "grad")
        if weights.shape != indices.shape:
            raise ValueError(
                f"weights: expected the shape of indices, {list(indices.shape)}, got {list(weights.shape)}"
            )
    g = rows(grad, "grad", offsets is not None)
    weights = None if weights is None else weights.to(torch.float64).contiguous()
    samples = len(g) if offsets is None else len(offsets) - 1
    order = None
    if not grad.is_cpu:
        # Stable: of equal tokens those of a sample stay behind each other.
        indices, order = indices.flatten().sort(stable=True)

    def compute(grad: Tensor, weights: Tensor | None = None) -> Tensor:
        out = result_beside(grad, samples)
        _core.embedding_norms(indices, order, grad, weights, padding_idx, offsets, out)
        return out

    if order is not None:  # a device's kernels see to the range themselves
        return compute(g, weights)
    tensors = (flat_rows(g),) if weights is None else (flat_rows(g), weights)
    return within_range(compute(*tensors), compute, tensors, 2)


def tied_cross(
    indices: Tensor, grad_embedding: Tensor, x: Tensor, grad_head: Tensor, *, padding_idx: int | None = None
) -> Tensor:
    r"""Compute the inner product of a tied weight's two gradients per sample, as an embedding and as the head.

    .. math:: \langle E_b, H_b\rangle = \sum_{s,t} G_{b,s,i_{bt}}\,\langle x_{bs}, e_{bt}\rangle

    The squared norm of the tied weight's gradient is then :math:`\|E_b\|^2 + \|H_b\|^2 + 2\langle E_b, H_b\rangle`.
    Sums are float64 and nothing of size S x T is written.

    Args:
        indices: int64 or int32 [B, ...] of T tokens per sample.
        grad_embedding: e, [B, ..., D], the gradient at the embedding's output, a row per token.
        x: [B, ..., D] of S rows per sample, the head's input.
        grad_head: G, [B, ..., V], the gradient at the head's output, a row per row of x.
        padding_idx: the token that gets no gradient as an embedding.

    Returns:
        float64 [B], detached. It may be negative.

    Raises:
        TypeError, ValueError: an argument lipcore cannot use, shapes that do not fit, or on the CPU a token outside
            [0, V); the message names it.

    >>> tied_cross(torch.tensor([[1]]), torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.tensor([[[5.0, 3.0]]]))
    tensor([6.], dtype=torch.float64)
    """
    if torch.compiler.is_compiling():
        detached = (t.detach() for t in (grad_embedding, x, grad_head))
        traced: Tensor = torch.ops.lipcore.tied_cross(indices, *detached, padding_idx)
        return traced
    _check_padding(padding_idx)
    indices = integers(indices, "indices")
    e, a, g = (
        readable(t, name) for t, name in ((grad_embedding, "grad_embedding"), (x, "x"), (grad_head, "grad_head"))
    )
    for tensor, name in ((e, "grad_embedding"), (a, "x"), (g, "grad_head")):
        same_place(tensor, name, indices, "indices")
    _check_tokens(indices, e, "grad_embedding")
    if not e.is_cpu:
        return portable.tied_cross(indices, e, a, g, padding_idx)
    e, a, g = rows(e, "grad_embedding", False), rows(a, "x", False), rows(g, "grad_head", False)
    ids = indices.reshape(e.shape[:2])

    def compute(e: Tensor, a: Tensor, g: Tensor) -> Tensor:
        out = torch.empty(len(e), dtype=torch.float64, device=_library.CPU)
        _core.tied_cross(ids, e, a, g, padding_idx, out)
        return out

    tensors = flat_rows(e), flat_rows(a), flat_rows(g)
    return within_range(compute(*tensors), compute, tensors, 1)


def _check_padding(padding_idx: int | None) -> None:
    whole = padding_idx is not None and is_integer(padding_idx) and -(2**63) <= padding_idx < 2**63
    if padding_idx is not None and not whole:
        raise TypeError(f"padding_idx: expected an integer of 64 bits or None, got {padding_idx!r}")


def _check_tokens(indices: Tensor, grad: Tensor, name: str) -> None:
    """Return the gradient with a row for every token; a sample may have lost or gained dimensions of size 1."""
    if not indices.dim():
        raise ValueError("indices: expected shape [B, ...], got a 0-dimensional tensor; use indices.reshape(1, 1)")
    if grad.dim() < 2 or grad.shape[0] != indices.shape[0] or math.prod(grad.shape[:-1]) != indices.numel():
        raise ValueError(f"{name}: expected a row per token, {[*indices.shape, 'D']}, got {list(grad.shape)}")


_library.register(
    "embedding_norms_sq(Tensor indices, Tensor grad, Tensor? weights=None, int? padding_idx=None, "
    "Tensor? offsets=None) -> Tensor",
    lambda indices, grad, weights=None, padding_idx=None, offsets=None: embedding_norms_sq(
        indices, grad, weights=weights, padding_idx=padding_idx, offsets=offsets
    ),
    lambda indices, grad, weights=None, padding_idx=None, offsets=None: grad.new_empty(
        indices.shape[0] if offsets is None else offsets.shape[0] - 1, dtype=torch.float64
    ),
)
_library.register(
    "tied_cross(Tensor indices, Tensor grad_embedding, Tensor x, Tensor grad_head, int? padding_idx=None) -> Tensor",
    lambda indices, grad_embedding, x, grad_head, padding_idx=None: tied_cross(
        indices, grad_embedding, x, grad_head, padding_idx=padding_idx
    ),
    lambda indices, grad_embedding, x, grad_head, padding_idx=None: x.new_empty(indices.shape[0], dtype=torch.float64),
)
