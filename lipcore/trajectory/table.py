"""The ledger: a row of scalars per tensor, per group and for the total; the compiled core writes them."""

from __future__ import annotations

import torch
from torch import Tensor

from lipcore import _core
from lipcore.functional.ordered_sums import sum_by_index

# In the order of struct TrajectoryRow (csrc/math/trajectory_row.h).
COLUMNS = (
    *("steps", "path", "points", "folded", "m2", "update_last", "update_max", "max_abs_last", "max_abs_max"),
    *("ratio_last", "ratio_sum", "ratio_max", "nonfinite_steps", "nonfinite_elements", "zero_steps"),
    *("total_steps", "total_path", "distance", "weight", "group"),
)
assert len(COLUMNS) == _core.LEDGER_COLUMNS
WINDOW_COLUMNS = COLUMNS.index("total_steps")  # those before it start anew with a window
COLUMN = {name: i for i, name in enumerate(COLUMNS)}
STEPS, POINTS, FOLDED, M2 = (COLUMN[name] for name in ("steps", "points", "folded", "m2"))

_ADDED = [COLUMN[name] for name in COLUMNS if name.endswith(("steps", "_sum", "elements")) and name != "total_steps"]
_ADDED += [COLUMN["path"], M2]
_LARGEST = [COLUMN[name] for name in COLUMNS if name.endswith("_max")]
_LATEST = [COLUMN[name] for name in COLUMNS if name.endswith("_last")]


class Table:
    """Rows, and a ring with the squared norms of the most recent steps; tensors that the compiled ledger writes to."""

    def __init__(self, group_of: list[int], groups: int, ring: int, device: torch.device) -> None:
        self.tensors, self.groups = len(group_of), groups
        count = self.tensors + groups + 1
        self.rows = torch.zeros(count, len(COLUMNS), dtype=torch.float64, device=device)
        self.rows[: self.tensors, COLUMN["group"]] = torch.tensor(group_of, dtype=torch.float64, device=device)
        self.recent = self.rows.new_zeros(ring, count, 2)
        self.cursor = self.rows.new_zeros(2)
        self.core = _core.Ledger(self.rows, self.recent, self.cursor, self.tensors)
        self.group_of_on_host = torch.tensor(group_of, dtype=torch.int64, device="cpu")
        self._group_of = self.group_of_on_host.to(device)

    def with_groups(self, of_tensors: Tensor) -> Tensor:
        """Append, to the tensors' own values, [tensors, ...], their sum over the members of every group and over all.
        The values may have been copied to the host."""
        group_of = self._group_of if of_tensors.device == self._group_of.device else self.group_of_on_host
        groups = sum_by_index(of_tensors, group_of, self.groups)
        return torch.cat([of_tensors, groups, of_tensors.sum(dim=0, keepdim=True)])

    @property
    def bytes(self) -> int:
        """Bytes of rows and ring."""
        return 8 * (self.rows.numel() + self.recent.numel())


def merge_rows(older: Tensor, newer: Tensor) -> Tensor:
    """Merge rows of two stretches of steps, the newer right after the older; what lies between their means is not in
    m2."""
    merged = newer.clone()
    merged[:, _ADDED] += older[:, _ADDED]
    merged[:, _LARGEST] = torch.maximum(older[:, _LARGEST], newer[:, _LARGEST])
    stood_still = newer[:, STEPS] == 0
    for column in _LATEST:
        merged[:, column] = torch.where(stood_still, older[:, column], newer[:, column])
    merged[:, FOLDED] = points_of(older) + points_of(newer)
    merged[:, POINTS] = 0
    return merged


def points_of(rows: Tensor) -> Tensor:
    """Return how many points of the trajectory are in M2."""
    return rows[:, FOLDED] + rows[:, POINTS].clamp(min=0)


def between(points: Tensor, other_points: Tensor, gap_sq: Tensor) -> Tensor:
    """Return what Chan's formula adds to M2 when two blocks are merged whose means lie sqrt(gap_sq) apart."""
    return points * other_points / (points + other_points).clamp(min=1) * gap_sq
