"""Two sums of single steps of which the quotient is asked for: a ring beside that of the updates."""

from __future__ import annotations

import torch
from torch import Tensor

from lipcore.trajectory.table import Table


class MeanRing:
    """Ring of a numerator and a denominator of each step, in the places of a table's own ring. What is not known of a
    tensor is not in its group's.

    Args:
        table: that of the updates, whose cursor says where a step is.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self.recent = torch.full_like(table.recent, torch.nan)

    def take(self, of_tensors: Tensor) -> None:
        """Take the step in that the table counts next, [tensors, 2]. Nothing waits for a device."""
        known = of_tensors.isfinite().all(dim=1, keepdim=True)
        sums = torch.where(known, of_tensors, 0)
        row = torch.stack([self._table.with_groups(sums[:, i]) for i in range(2)], dim=1)
        at = self._table.cursor[:1].long() % len(self.recent)
        self.recent.index_copy_(0, at, row.unsqueeze(0))
