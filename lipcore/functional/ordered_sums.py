"""Sums of the rows that belong together, in the order of the rows on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_by_index(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """Return the sums of the rows, [N, ...], of every index in [0, count), int64 [N]; 0 where there is none."""
    return add_by_index(rows.new_zeros(count, *rows.shape[1:]), rows, index)


def add_by_index(out: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Add to every row of `out` the rows, [N, ...], of its index, int64 [N]; return it.

    On a GPU `index_add_` adds in the order in which threads come, so that the last bits of floating-point sums change
    from run to run; here rows are sorted, and each sum is made by one thread. Nothing waits for a device.
    """
    # What is compiled is the compiler's: it has no shapes for sums of runs.
    if out.is_cpu or torch.compiler.is_compiling():
        return out.index_add_(0, index, rows)
    ordered, order = index.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(len(out) + 1, device=out.device))
    return out.add_(sum_of_runs(rows.index_select(0, order), offsets))


def sum_of_runs(rows: Tensor, offsets: Tensor) -> Tensor:
    """Return the sums of runs of rows, which begin at all `offsets` but the last, where they end."""
    sums: Tensor = torch.segment_reduce(rows, "sum", offsets=offsets, initial=0, unsafe=True)
    return sums
