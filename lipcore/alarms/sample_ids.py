"""Samples that come twice in an epoch, or do not come: an exact check of the data's order, outside the budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from lipcore.alarms.event import AlarmEvent
from lipcore.alarms.id_set import Ids, IdSet
from lipcore.metric.host_copy import HostCopy
from lipcore.models.ranks import world_size

SIGNAL = "sample_ids"
_SHOWN = 5  # ids in a message


class SampleIds:
    """Finder of samples that come more than once in an epoch, and of those that came in an earlier one and not in the
    one that has ended. No device is waited for: its ids are looked at when they are on the host."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, int, Tensor | HostCopy]] = deque()  # step, epoch, ids
        self._epoch: int | None = None
        self._now, self._ever = IdSet(), IdSet()
        self._largest = 0  # batch of this epoch
        self._told = False  # of this epoch's repeated samples

    def add(self, step: int, epoch: int, ids: Tensor) -> None:
        """Take the samples of a micro-batch."""
        self._waiting.append((step, epoch, ids if ids.is_cpu else HostCopy(ids)))

    def events(self, *, wait: bool = False) -> Iterator[AlarmEvent]:
        """Yield the alarms of all micro-batches whose ids are there; with `wait`, of all."""
        while self._waiting:
            step, epoch, ids = self._waiting[0]
            if isinstance(ids, HostCopy):
                if not (wait or ids.is_there):
                    return
                (ids,) = ids.tensors()
            self._waiting.popleft()
            yield from self._look(step, epoch, ids.numpy().astype(np.int64))

    def _look(self, step: int, epoch: int, ids: Ids) -> Iterator[AlarmEvent]:
        if epoch != self._epoch:
            yield from self._end(step)
            self._epoch, self._now, self._largest, self._told = epoch, IdSet(), 0, False
        self._largest = max(self._largest, len(ids))
        again = self._now.add(ids)
        if len(again) and not self._told:
            self._told = True
            yield _event(step, again, f"came more than once in epoch {epoch}")

    def _end(self, step: int) -> Iterator[AlarmEvent]:
        """Yield an alarm where samples have not come in the epoch that has ended. Fewer than a batch are what a loader
        leaves out that drops its last one; on several ranks samples move from rank to rank."""
        missing = self._ever.without(self._now)
        if len(missing) >= max(1, self._largest) and world_size() == 1:
            yield _event(step, missing, f"came in an earlier epoch, and not in epoch {self._epoch}")
        self._ever.join(self._now)


def _event(step: int, ids: Ids, what: str) -> AlarmEvent:
    shown = ", ".join(map(str, ids[:_SHOWN].tolist())) + ", ..." * (len(ids) > _SHOWN)
    who = f"sample {shown}" if len(ids) == 1 else f"{len(ids)} samples ({shown})"
    return AlarmEvent(step, SIGNAL, "total", float(len(ids)), f"alarm in step {step}: {who} {what}")
