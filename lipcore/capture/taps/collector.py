"""The passes under way, and the numbers that have come back from them so far."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from lipcore.capture.taps.bypass import BypassWatch
from lipcore.capture.taps.site import Site
from lipcore.capture.taps.tap import Record
from lipcore.capture.training_pass import GRAPH_OF_GRADIENT, NOT_ACCUMULATED, accumulates_everything, in_backward


class MicroBatch:
    """One forward pass: its sites and the numbers that have come back from them."""

    __slots__ = ("__weakref__", "columns", "delivered", "differentiated", "entered", "generation", "probes", "task")

    def __init__(self) -> None:
        self.entered: list[Site] = []
        self.columns: dict[Site, Tensor] = {}
        self.probes: dict[Site, Tensor] | None = None
        self.generation = 0  # of the probes
        self.task = -1  # the backward pass that the columns came from
        self.delivered = False
        self.differentiated: int | None = None  # the first backward pass with create_graph=True


class _UnderWay(threading.local):
    """The forward pass of this thread."""

    micro: MicroBatch | None = None
    watch: BypassWatch | None = None  # the input is followed through it


class Collector:
    """Hands each micro-batch's record to `on_record` once the numbers of all its sites are there.

    One per Capture; the hooks on its sites meet here.
    """

    def __init__(self, on_record: Callable[[Record], None], on_error: Callable[[Exception], None]) -> None:
        self.recording = True  # False after an error
        self.tapping = True  # False too during a forward pass that the shortcut serves
        self.size = 0  # number of sites
        self.under_way = _UnderWay()
        self._begun: weakref.WeakValueDictionary[int, MicroBatch] = weakref.WeakValueDictionary()
        self.returning: MicroBatch | None = None  # the backward pass under way
        self.forwards = 0  # tapped forward passes in grad mode
        self.records = 0  # how many of them came back
        self.refused: set[str] = set()  # why backward passes that came do not count
        self._on_record, self._on_error = on_record, on_error

    def fail(self, error: Exception) -> None:
        """Stop capturing and hand the error on; never raises."""
        if self.recording:
            self.recording = self.tapping = False
            self._on_error(error)

    def begin(self) -> MicroBatch:
        """A forward pass."""
        micro = self.under_way.micro = MicroBatch()
        self._begun[id(micro)] = micro
        return micro

    @property
    def waits(self) -> bool:
        """Whether a tapped forward pass has not come back yet, and still can."""
        alive = (reference() for reference in self._begun.valuerefs())
        return any(micro is not None and micro.entered and not micro.delivered for micro in alive)

    def enter_again(self, site: Site) -> MicroBatch | None:
        """The micro-batch of a call that is not the first of its site in a forward pass; None when it is not part of
        one."""
        if in_backward() != -1:
            # Activation checkpointing runs the forward again. Where the first run was recorded, this is not another
            # call; where it ran without grad (reentrant), this one belongs to the backward pass under way.
            micro = self.returning
            return None if micro is None or site in micro.entered else micro
        if self.under_way.micro is not None:
            self.fail(
                ValueError(
                    f"module '{site.name}' is called twice in one forward pass; per-sample numbers of a reused "
                    "module are not defined here: name another one with input= or output="
                )
            )
        return None

    def counts(self, micro: MicroBatch) -> bool:
        """Whether what comes back in this backward pass is the training's."""
        task = in_backward()
        if torch.is_grad_enabled() and micro.differentiated is None:
            micro.differentiated = task
        if not accumulates_everything():
            self.refused.add(NOT_ACCUMULATED)
            return False
        if micro.differentiated in (None, task):
            return True
        self.refused.add(GRAPH_OF_GRADIENT)
        return False

    def deliver(self, micro: MicroBatch) -> None:
        """All its numbers are there."""
        self.returning = None
        micro.delivered = True
        record: Record = {}
        for site, numbers in micro.columns.items():
            if len(site.taps) == 1:
                record[site.taps[0].key] = numbers
                continue
            start = 0
            for tap in site.taps:
                record[tap.key] = numbers[start : start + tap.columns]
                start += tap.columns
        self.records += 1
        try:
            self._on_record(record)
        except Exception as error:
            self.fail(error)


def inert_collector() -> Collector:
    """For the hooks of a copied model, which is not watched."""
    inert = Collector(lambda record: None, lambda error: None)
    inert.recording = inert.tapping = False
    return inert
