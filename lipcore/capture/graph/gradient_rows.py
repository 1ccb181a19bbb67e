"""The rows of a gradient, each of one sample: those of some samples alone, their sums, whether they are touched."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lipcore.capture.graph.frontier import EVERYTHING
from lipcore.capture.proof import NOTHING
from lipcore.functional.ordered_sums import sum_by_index


def only_rows(grad: Tensor, dim: int, mine: Tensor) -> Tensor:
    """Return a gradient whose rows along a dimension are zero but for those of a mask."""
    if dim < 0:
        return grad
    shape = [1] * grad.dim()
    shape[dim] = -1
    return torch.where(mine.to(grad.device).reshape(shape), grad, torch.zeros((), dtype=grad.dtype, device=grad.device))


def with_rows(grads: tuple[Tensor | None, ...], at: tuple[int | None, ...]) -> Iterator[tuple[Tensor, int]]:
    """Return those of a node's gradients that have rows, each with the dimension of these."""
    return ((g, d) for g, d in zip(grads, at, strict=True) if g is not None and d is not None and d != EVERYTHING)


def touches(grad: Tensor, dim: int, rows: Tensor) -> tuple[bool, bool]:
    """Return whether these rows have a gradient, and whether a whole row of them is finite and has one."""
    rest = grad.index_select(dim, rows.nonzero().flatten().to(grad.device))
    rest = rest.movedim(dim, 0).flatten(1) if rest.dim() > 1 else rest[:, None]
    there = (~(rest.abs().double() ** 2 < NOTHING)).any(1)
    return bool(there.any()), bool((there & rest.isfinite().all(1)).any())


def sums_of_samples(out: Tensor, dim: int, whose: Tensor, samples: int, shape: tuple[int, ...]) -> Tensor:
    """Return for each sample the sum of its rows, with what broadcasting has added to this shape summed up:
    [B, *shape]."""
    out = out.float() if out.dtype in (torch.float16, torch.bfloat16) else out
    if dim < 0:
        return out.sum_to_size(shape)[None]
    padded = (1,) * (out.dim() - len(shape)) + shape
    if padded[dim] != 1:  # what is behind has these rows too
        return torch.stack([only_rows(out, dim, whose == b).sum_to_size(shape) for b in range(samples)])
    over = [i for i in range(out.dim()) if i != dim and padded[i] == 1 and out.shape[i] != 1]
    rows = (out.sum(over, keepdim=True) if over else out).movedim(dim, 0)
    found = sum_by_index(rows, whose % (samples + 1), samples + 1)  # nobody's are last
    return found[:samples].reshape(samples, *shape)
