"""Two sums of single steps of which the quotient is asked for: a ring beside that of the updates."""

from __future__ import annotations

import torch
from torch import Tensor

from lipcore import _core
from lipcore.trajectory.table import Table


class MeanRing:
    """Ring of a numerator and a denominator of each tensor and step, in the places of a table's own ring.

    Args:
        table: that of the updates, whose cursor says where a step is.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        ring = len(table.recent)
        self.recent = table.recent.new_full((ring, table.tensors, 2), torch.nan)

    def take(self, of_tensors: Tensor) -> None:
        """Take the step in that the table counts next, [tensors, 2]. Nothing waits for a device, and groups are summed
        up where the ring is read: a training step pays for one copy."""
        at = self._table.cursor[:1].long() % len(self.recent)
        self.recent.index_copy_(0, at, of_tensors.unsqueeze(0))


def quotients(recent: Tensor, begin: int, end: int, table: Table) -> Tensor:
    """Return, [steps, places], the root of numerator over denominator of the steps [begin, end) in a copy of a ring on
    the host. What is not known of a tensor is not in its group's; NaN where nothing is."""
    out = torch.empty(end - begin, table.tensors + table.groups + 1, dtype=torch.float64, device="cpu")
    _core.step_quotients(recent, begin, end, table.group_of_on_host, table.groups, out)
    return out
