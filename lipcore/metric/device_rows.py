"""Values of several distributions on a device: kept as they come, binned many at a time, copied to the host at once."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from lipcore import _core
from lipcore.models.capturing import is_capturing

_WAITING = 8192  # values per place that are kept until they are binned; a quarter of the bins' bytes
_MOMENTS = 7  # count, mean, sum of squared deviations, min, max, missing, invalid


class DeviceRows:
    """Bins and moments of `places` streams of values, by torch's operations and without a synchronisation until they
    are fetched. Counts are integers, so deterministic."""

    def __init__(self, places: int, device: torch.device) -> None:
        self.places, self.device = places, device
        self._bins = torch.zeros(places, _core.BINS, dtype=torch.int64, device=device)
        self._begins = torch.arange(0, places * _core.BINS, _core.BINS, device=device).unsqueeze(1)
        # Merged per batch by Chan's formula. Filled on the device: a tensor of numbers would be copied there, for which
        # torch waits.
        self._moments = torch.zeros(places, _MOMENTS, dtype=torch.float64, device=device)
        self._waiting = torch.empty(places, _WAITING, dtype=torch.float64, device=device)
        self._filled = 0
        self._changed = False  # something is here that was not fetched
        self._captured = False  # a CUDA graph writes here, as often as it likes
        self._fetched: dict[int, Any] = {}  # compiled distributions by place
        self._clear(slice(None))

    def observe(self, values: Tensor) -> None:
        """Add a row of values to every place; [places, B]. One operation, but for a step in many."""
        size = values.shape[1]
        if not size:
            return
        if is_capturing(values):
            # A replay does what was captured, and no counter of the host goes on with it.
            self._captured = True
            self._add(values.double())
            return
        self._changed = True
        if size > _WAITING:
            self._add(values.double())
            return
        if self._filled + size > _WAITING:
            self._bin()
        self._waiting[:, self._filled : self._filled + size].copy_(values)
        self._filled += size

    def _bin(self) -> None:
        """Add the values that wait."""
        if self._filled:
            self._add(self._waiting[:, : self._filled])
            self._filled = 0

    def _add(self, values: Tensor) -> None:
        usable = values.isfinite() & (values >= 0)
        kept = torch.where(usable, values, 0.0)
        # As bin_of() in csrc/math/log_bins.h; adding 0.0 turns -0.0 into 0.0.
        in_range = torch.where(kept < 3.4028234663852886e38, kept + 0.0, math.inf)
        bits = in_range.float().view(torch.int32) >> 16
        self._bins.view(-1).index_add_(0, (bits + self._begins).view(-1), usable.long().view(-1))
        n = usable.sum(1).double()
        mean = kept.sum(1) / n.clamp(min=1)
        m2 = torch.where(usable, (values - mean.unsqueeze(1)) ** 2, 0.0).sum(1)
        old = self._moments.unbind(1)
        count = old[0] + n
        difference = mean - old[1]
        share = n / count.clamp(min=1)
        missing = values.isnan().sum(1)
        moments = [
            count,
            old[1] + difference * share,
            old[2] + m2 + difference**2 * old[0] * share,
            torch.minimum(old[3], torch.where(usable, values, math.inf).amin(1)),
            torch.maximum(old[4], torch.where(usable, values, -math.inf).amax(1)),
            old[5] + missing,
            old[6] + (values.shape[1] - missing) - n,
        ]
        # In place: a replayed CUDA graph would read the tensor that it was captured with, and lose all replays but one.
        self._moments.copy_(torch.stack(moments, dim=1))

    def forget(self, places: Collection[int]) -> None:
        """Forget everything of some places, in place."""
        for place in places:
            self._fetched.pop(place, None)
        if len(places) == self.places:
            self._filled, self._changed = 0, False
            self._clear(slice(None))
            return
        self._bin()
        for place in places:
            self._clear(slice(place, place + 1))

    def _clear(self, places: slice) -> None:
        self._bins[places].zero_()
        self._moments[places].zero_()
        self._moments[places, 3].fill_(math.inf)
        self._moments[places, 4].fill_(-math.inf)

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
        self._bin()
        packed = torch.cat([self._moments.view(torch.int64).reshape(-1), self._bins.view(-1)])
        self._changed = False
        self._clear(slice(None))
        return packed

    def take(self, packed: Tensor) -> None:
        """Take in on the host what :meth:`packed` has made."""
        split = self.places * _MOMENTS
        moments = packed[:split].view(torch.float64).reshape(self.places, _MOMENTS).tolist()
        bins = packed[split:].view(self.places, -1)
        for place, (count, mean, m2, low, high, missing, invalid) in enumerate(moments):
            if not count + missing + invalid:
                continue
            used = bins[place].nonzero().flatten()
            pairs = torch.stack([used, bins[place, used]], dim=1).flatten().tolist()
            if not count:
                low = high = 0.0
            fetched = _core.Distribution()
            fetched.set_state(count, mean, m2, low, high, int(missing), int(invalid), pairs)
            if place in self._fetched:
                self._fetched[place].merge(fetched)
            else:
                self._fetched[place] = fetched

    def release(self) -> None:
        """Do nothing: what was fetched is nowhere else."""
