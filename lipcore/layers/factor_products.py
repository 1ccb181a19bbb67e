"""What weighted sums, inner products and Gram matrices of factored gradients have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lipcore.functional.ordered_sums import add_by_index, sum_by_index
from lipcore.layers.factor_rows import number_of_samples

#: Elements of slices of gradients, and of products of pairs of rows, that are held at a time.
CHUNK = 1 << 20


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, detached, in the type that they are multiplied in: one for all, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.detach().to(dtype) for tensor in tensors)


def owners(x: Tensor, offsets: Tensor | None) -> Tensor:
    """Return the sample of every row of x [B, T, ...], or packed [N, ...] with offsets: int64 [B T] or [N]. Rows
    outside all samples have the number B."""
    if offsets is None:
        samples, length = x.shape[:2]
        return torch.arange(samples, device=x.device).repeat_interleave(length)
    rows = torch.arange(x.shape[0], device=x.device)
    return torch.bucketize(rows, offsets.to(x.device), right=True) - 1


def spread(values: Tensor, x: Tensor, offsets: Tensor | None) -> Tensor:
    """Return the value of every row's sample, [B, 1] or packed [N], 0 for rows outside all samples; float32 at least,
    as x."""
    values = values.to(x.device, torch.promote_types(x.dtype, torch.float32))
    if offsets is None:
        return values[:, None]
    return torch.cat([values, values.new_zeros(1)])[owners(x, offsets)]


def collected(terms: Tensor, x: Tensor, offsets: Tensor | None) -> Tensor:
    """Return the sum per sample of terms per row of x, [B, T] or packed [N]: float64 [B]."""
    if offsets is None:
        return terms.sum(1, dtype=torch.float64)
    return sum_by_index(terms.double(), owners(x, offsets), number_of_samples(x, offsets) + 1)[:-1]


def gram_of_slices(slices: Iterable[Tensor], samples: int, device: torch.device) -> Tensor:
    """Return the Gram matrix of vectors that come in slices [B, n]: float64 [B, B]."""
    gram = torch.zeros(samples, samples, dtype=torch.float64, device=device)
    for part in slices:
        part = part.double()
        gram += part @ part.T
    return gram


def gram_of_pairs(product: Callable[[slice], Tensor], left: Tensor, right: Tensor, samples: int) -> Tensor:
    """Return sums over pairs of rows as a matrix of samples: float64 [B, B].

    Args:
        product: takes a slice of the left rows to its products with all right rows, [n, rows].
        left, right: the samples of the rows.
    """
    sums = torch.zeros(samples + 1, samples + 1, dtype=torch.float64, device=left.device)
    step = max(1, CHUNK // max(1, len(right)))
    for first in range(0, len(left), step):
        some = slice(first, first + step)
        terms = product(some).double()
        columns = terms.new_zeros(len(terms), samples + 1)
        add_by_index(columns.T, terms.T, right)
        add_by_index(sums, columns, left[some])
    return sums[:-1, :-1]


def product(grad: Tensor, x: Tensor | None) -> Tensor:
    """Return grad * x, or grad where there is no x, in float32 at least."""
    if x is None:
        return alike(grad)[0]
    grad, x = alike(grad, x)
    return grad * x


def vector_sum(vectors: Tensor, coefficients: Tensor, shape: torch.Size) -> Tensor:
    """Return the sum of gradients [B, n] with coefficients [B], in the parameter's shape."""
    return (coefficients.to(vectors.device, vectors.dtype) @ vectors).reshape(shape)


def vector_dots(vectors: Tensor, references: Tensor) -> Tensor:
    """Return the inner products of gradients [B, n] with references [K, ...]: float64 [K, B]."""
    gradients, others = alike(vectors, references.reshape(len(references), -1))
    return (others @ gradients.T).double()


def vector_gram(vectors: Tensor) -> Tensor:
    """Return the inner products of gradients [B, n] with each other: float64 [B, B]."""
    vectors = vectors.double()
    return vectors @ vectors.T
