"""Rows of tensors of any layout: bags of words are sparse."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_at(x: Tensor, dim: int, places: Tensor) -> Tensor:
    """Return the rows of a tensor at these places along a dimension, in its own layout."""
    if x.layout in (torch.strided, torch.sparse_coo):
        return x.index_select(dim, places)
    # Compressed layouts cannot be indexed.
    found = x.to_sparse_coo().index_select(dim, places).coalesce()
    block = tuple(x.values().shape[1:3]) if x.layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    again: Tensor = found.to_sparse(layout=x.layout, blocksize=block)
    return again


def bytes_of(x: Tensor) -> int:
    """Return how many bytes a tensor's numbers take, and their places where it is sparse."""
    if x.layout == torch.strided:
        return x.nbytes
    coo = x.to_sparse_coo()
    numbers: int = coo._values().nbytes + coo._indices().nbytes
    return numbers
