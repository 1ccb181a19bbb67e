"""RMS_t of single steps: a ring beside that of the updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipcore.trajectory.table import Table


class RatioRing:
    """Ring of a step's sum of g^2 / max(v, eps^2), and of how many elements are in it, in the places of a table's own
    ring. What is not known of a tensor is not in its group's.

    Args:
        table: that of the updates, whose cursor says where a step is.
        elements: of each tensor.
    """

    def __init__(self, table: Table, elements: Sequence[int]) -> None:
        self._table = table
        self.recent = torch.full_like(table.recent, torch.nan)
        self._elements = torch.tensor(elements, dtype=torch.float64, device=table.rows.device)

    def take(self, mean_squares: Tensor) -> None:
        """Take the step in that the table counts next. Nothing waits for a device."""
        known = torch.where(mean_squares.isfinite(), self._elements, 0)
        sums = torch.where(mean_squares.isfinite(), mean_squares * self._elements, 0)
        row = torch.stack([self._table.with_groups(sums), self._table.with_groups(known)], dim=1)
        at = self._table.cursor[:1].long() % len(self.recent)
        self.recent.index_copy_(0, at, row.unsqueeze(0))
