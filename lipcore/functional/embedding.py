"""Embeddings: squared norms of per-sample gradients, which are sparse, and their inner product with a tied head's."""

from __future__ import annotations

import torch
from torch import Tensor

from lipcore import _library
from lipcore.functional import portable


def embedding_norms_sq(
    indices: Tensor,
    grad: Tensor,
    *,
    weights: Tensor | None = None,
    padding_idx: int | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    r"""Sum over tokens v of :math:`\|\sum_{t: i_{bt} = v} w_{bt} g_{bt}\|^2`; indices [B, T], grad [B, T, D]."""
    if torch.compiler.is_compiling():
        weights = None if weights is None else weights.detach()
        traced: Tensor = torch.ops.lipcore.embedding_norms_sq(indices, grad.detach(), weights, padding_idx, offsets)
        return traced
    return portable.embedding_norms_sq(indices, grad, weights, padding_idx, offsets)


def tied_cross(
    indices: Tensor, grad_embedding: Tensor, x: Tensor, grad_head: Tensor, *, padding_idx: int | None = None
) -> Tensor:
    r"""Inner product of the gradients that a weight gets as an embedding (indices [B, T], gradient [B, T, D]) and as a
    head (x [B, S, D], gradient [B, S, V])."""
    if torch.compiler.is_compiling():
        tensors = (t.detach() for t in (grad_embedding, x, grad_head))
        traced: Tensor = torch.ops.lipcore.tied_cross(indices, *tensors, padding_idx)
        return traced
    return portable.tied_cross(indices, grad_embedding, x, grad_head, padding_idx)


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
