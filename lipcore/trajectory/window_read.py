"""Rows and ring of a tracker on a device, brought to the host together with what others have there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lipcore.trajectory.table import Table


class WindowRead:
    """Rows and ring that a tracker's window is described from.

    Args:
        table: the tracker's.
        window_rows: makes the rows of the whole window.
        take_ring: gets the ring on the host, and at which step that was.

    Attributes:
        rows: of the whole window, on the host; None where they were not brought there.
    """

    is_changed = True

    def __init__(
        self, table: Table, window_rows: Callable[[], Tensor], take_ring: Callable[[Tensor, int], None]
    ) -> None:
        self._table, self._window_rows, self._take_ring = table, window_rows, take_ring
        self.rows: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device of the tracker's tables."""
        return self._table.rows.device

    def packed(self) -> Tensor:
        """Return rows, ring and cursor as one row."""
        parts = self._window_rows(), self._table.recent, self._table.cursor
        return torch.cat([part.view(torch.int64).reshape(-1) for part in parts])

    def take(self, packed: Tensor) -> None:
        """Keep the rows, and have the ring's steps join the quantiles."""
        table = self._table
        sizes = [part.numel() for part in (table.rows, table.recent, table.cursor)]
        rows, recent, cursor = packed.view(torch.float64).split(sizes)
        self.rows = rows.reshape(self._table.rows.shape)
        self._take_ring(recent.reshape(self._table.recent.shape), int(cursor[0]))

    def release(self) -> None:
        """Forget the rows."""
        self.rows = None
