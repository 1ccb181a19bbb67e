"""Values of several distributions on a device: observed there by one kernel, copied to the host at once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from lipcore import _core
from lipcore.models.capturing import is_capturing


class DeviceRows:
    """Bins and moments of `places` streams of values, by one kernel and without a synchronisation until they are
    fetched. Counts are integers, so deterministic."""

    def __init__(self, places: int, device: torch.device) -> None:
        self.places, self.device = places, device
        self._bins = torch.zeros(places, _core.BINS, dtype=torch.int64, device=device)
        self._rows = torch.zeros(places, _core.OBSERVED_COLUMNS, dtype=torch.float64, device=device)
        self._changed = False  # something is here that was not fetched
        self._captured = False  # a CUDA graph writes here, as often as it likes
        self._fetched: dict[int, Any] = {}  # compiled distributions by place

    def observe(
        self,
        values: Tensor,
        what: int = _core.OBSERVE_VALUES,
        gradient: Tensor | None = None,
        smallest: float = 0.0,
    ) -> None:
        """Add a row of values, [places, B], of their roots or of their ratios to a gradient, [B], to every place."""
        if is_capturing(values):
            self._captured = True  # a replay does what was captured, which nobody tells us
        else:
            self._changed |= bool(values.shape[1])
        if not values.is_floating_point():
            values = values.double()
        _core.observe_rows(values, what, gradient, smallest, self._rows, self._bins)

    def forget(self, places: Collection[int]) -> None:
        """Forget everything of some places, in place."""
        for place in places:
            self._fetched.pop(place, None)
        if len(places) == self.places:
            self._changed = False
            self._clear(slice(None))
            return
        for place in places:
            self._clear(slice(place, place + 1))

    def _clear(self, places: slice) -> None:
        self._bins[places].zero_()
        self._rows[places].zero_()

    def drain_into(self, core: Any, place: int) -> None:
        """Move what was fetched of a place to a compiled distribution."""
        fetched = self._fetched.pop(place, None)
        if fetched is not None:
            core.merge(fetched)

    # ---- to the host

    @property
    def is_changed(self) -> bool:
        """True when there may be something that was not fetched."""
        return self._changed or self._captured

    def packed(self) -> Tensor:
        """Return everything as int64 on the device, and forget it there."""
        packed = torch.cat([self._rows.view(torch.int64).reshape(-1), self._bins.view(-1)])
        self._changed = False
        self._clear(slice(None))
        return packed

    def take(self, packed: Tensor) -> None:
        """Take in on the host what :meth:`packed` has made."""
        split = self.places * _core.OBSERVED_COLUMNS
        rows = packed[:split].view(torch.float64).reshape(self.places, -1).tolist()
        bins = packed[split:].view(self.places, -1)
        for place, (count, mean, m2, low, high, missing, invalid) in enumerate(rows):
            if not count + missing + invalid:
                continue
            used = bins[place].nonzero().flatten()
            pairs = torch.stack([used, bins[place, used]], dim=1).flatten().tolist()
            fetched = _core.Distribution()
            fetched.set_state(count, mean, m2, low, high, int(missing), int(invalid), pairs)
            if place in self._fetched:
                self._fetched[place].merge(fetched)
            else:
                self._fetched[place] = fetched

    def release(self) -> None:
        """Do nothing: what was fetched is nowhere else."""
