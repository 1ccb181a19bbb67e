"""The most recent steps one by one: a ring that the core writes, quantiles made from it, and histories for users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipcore import _core
from lipcore.metric.columns import Numbers
from lipcore.metric.distribution import Distribution, reset_all
from lipcore.metric.host_copy import HostCopy
from lipcore.metric.state import under_key
from lipcore.trajectory.describe import GRADIENTS
from lipcore.trajectory.kept_steps import KeptSteps
from lipcore.trajectory.table import Table


@dataclass(frozen=True)
class StepHistory:
    """Norms of single steps, oldest first; NaN where a step was left out because of non-finite values, or has none."""

    steps: Tensor  #: int64 [k], numbers of the observed steps, from 1
    places: list[str]
    update_norm: Tensor  #: float64 [k, places]: ||dw||
    weight_norm: Tensor  #: float64 [k, places]: ||w|| after the step
    grad_norm: Tensor  #: float64 [k, places]: of the batch's gradient as backward left it
    clipped_grad_norm: Tensor  #: float64 [k, places]: of the gradient as the optimizer got it
    lost: int  #: steps that were overwritten before they were drained; a longer `ring=` keeps them


class Recent:
    """Reader of a Table's ring: every step is read once into the distributions, and once for who drains the history."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._absorbed = 0  # steps in the distributions
        self._drained = 0
        self._pending: tuple[HostCopy, int, int] | None = None
        self._kept = KeptSteps(table.tensors)
        self.lost = 0  #: steps since restart() that were gone before they were read: those of replayed CUDA graphs
        self.distributions = [Distribution() for _ in range(2 * len(table.rows))]
        self._empty = True  # nothing is in the distributions

    @property
    def distributions(self) -> list[Distribution]:
        """Update norm and update/weight ratio of every row, as far as absorb() has come; who takes them may add to
        them."""
        self._empty = False
        return self._distributions

    @distributions.setter
    def distributions(self, distributions: list[Distribution]) -> None:
        self._distributions, self._empty = distributions, False
        self._cores = [distribution.core for distribution in distributions]

    @property
    def _ring(self) -> int:
        return self._table.recent.shape[0]

    def absorb(self, end: int) -> None:
        """Take in all steps up to number `end`. Nobody waits for a device: what is copied from it now is taken in by
        the next call."""
        begin, self._absorbed = self._absorbed, end
        if self._table.recent.is_cpu:
            self._observe(self._table.recent, begin, end)
            return
        self._take_pending()
        if end > begin:
            self._pending = HostCopy(self._table.recent), begin, end

    def restart(self, end: int) -> None:
        """Forget the steps up to `end`, taken in or not: a new window begins after it."""
        self._absorbed, self._pending, self.lost = end, None, 0
        self._kept.clear()
        if not self._empty:
            reset_all(self._distributions)
            self._empty = True

    def quantiles(self, end: int, q: Sequence[float]) -> Numbers | None:
        """Return quantiles of all steps since restart(), float64 [len(q), 2 * rows], straight from the ring where they
        are all in it; else None. The numbers are those of the distributions, which then need not be filled, read and
        emptied at every window's close."""
        if not self._empty or not self._table.recent.is_cpu or end - self._absorbed > self._ring:
            return None
        out = np.empty((len(self._distributions), len(q)))
        _core.recent_quantiles(self._table.recent, self._absorbed, end, list(q), torch.from_numpy(out))
        return np.ascontiguousarray(out.T)

    def flush(self, end: int) -> None:
        """Take in all steps so far, and wait for the device."""
        self.absorb(end)
        self._take_pending()

    def flush_from(self, recent: Tensor, end: int) -> None:
        """Take in all steps so far from a copy of the ring as it is now."""
        self._take_pending()
        begin, self._absorbed = self._absorbed, end
        self._observe(recent, begin, end)

    def skip_to(self, end: int) -> None:
        """Pass over the steps up to `end`, which are in the distributions already."""
        self._absorbed = end

    def _take_pending(self) -> None:
        if self._pending is not None:
            (copy, begin, end), self._pending = self._pending, None
            self._observe(copy.tensors()[0], begin, end)

    def _observe(self, recent: Tensor, begin: int, end: int) -> None:
        self.lost += max(0, end - begin - self._ring)
        begin = max(begin, end - self._ring)
        if end > begin:
            self._empty = False
            self._kept.add(recent, begin, end)
            _core.observe_recent(recent, begin, end, self._cores)

    def take_distributions(self) -> list[Distribution]:
        """Hand over the distributions and start new ones."""
        taken = self.distributions
        self.distributions = [Distribution() for _ in taken]
        self._empty = True
        return taken

    def steps(self, count: int) -> Tensor:
        """Return the last `count` steps as [count, rows, 2] on the CPU, oldest first."""
        end = int(self._table.cursor[0])
        index = torch.arange(end - count, end, device="cpu") % self._ring
        return self._table.recent.cpu()[index]

    def of_tensors(self, count: int) -> Tensor | None:
        """Return the last `count` steps of tensors as [count, tensors, 2] on the CPU, oldest first, also where the ring
        does not hold all of them; None where some are gone."""
        if count <= self._ring:
            return self.steps(count)[:, : self._table.tensors]
        end = int(self._table.cursor[0])
        self._take_pending()
        return self._kept.window(self._table.recent.cpu(), end - count, end)

    def drain(self, places: list[str], gradients: Mapping[str, Recent]) -> StepHistory:
        """Return all steps since the last call that are still in the ring, beside those of `gradients` by quantity."""
        end = int(self._table.cursor[0])
        kept = min(end - self._drained, self._ring)
        lost, self._drained = end - self._drained - kept, end
        norms = self.steps(kept)[:, -len(places) :].sqrt()
        numbers = torch.arange(end - kept + 1, end + 1, device="cpu")
        found = {stage: recent.steps(kept)[:, -len(places) :, 0].sqrt() for stage, recent in gradients.items()}
        missing = {stage: torch.full_like(norms[..., 0], torch.nan) for stage in GRADIENTS if stage not in found}
        return StepHistory(numbers, places, norms[..., 0], norms[..., 1], **found, **missing, lost=lost)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, the ring itself, and steps of the window before those in it, where they are kept."""
        before = self._kept.state(int(self._table.cursor[0]) - self._ring)
        counters = {"drained": self._drained, "absorbed": self._absorbed}
        return {**counters, "ring": self._table.recent.clone(), "before": before}

    def checked_before(self, state: Any) -> tuple[int, Tensor] | None:
        """Return the steps of a state before those in its ring; None where it has none. ValueError naming what is no
        such thing."""
        if not isinstance(state, dict) or "before" not in state:
            return None
        with under_key("recent.before"):
            return self._kept.checked(state["before"])

    def load(self, state: dict[str, Any], before: tuple[int, Tensor] | None) -> None:
        """Take over a state that was checked, and the steps before its ring."""
        self._drained, self._absorbed, self._pending = state["drained"], state["absorbed"], None
        self._kept.clear()
        if before is not None:
            self._kept.load(*before, self._table.recent.device)
        self._table.recent.copy_(state["ring"])
        # Those in the ring count as taken in, so that nobody would keep them when it goes over them.
        self._kept.add(self._table.recent, max(0, int(self._table.cursor[0]) - self._ring), self._absorbed)
