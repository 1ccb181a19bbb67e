"""The passes under way, and the numbers that have come back from them so far."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lipcore.capture.proof import is_proof
from lipcore.capture.self_calls import IN_ANOTHER_THREAD, OtherThreads, SelfCalls
from lipcore.capture.taps.input_alias import Source
from lipcore.capture.taps.site import Site
from lipcore.capture.taps.tap import InputTap, Record
from lipcore.capture.taps.views import Part
from lipcore.capture.training_pass import GRAPH_OF_GRADIENT, NOT_ACCUMULATED, accumulates_everything, in_backward
from lipcore.models.torch_internals import queue_callback


class Check(Protocol):
    """A check that looks at a backward pass when it enters the graph."""

    micro: MicroBatch
    site: Site | None  #: at whose output

    def run(self, grad_output: Tensor) -> None:
        """Look at the backward pass, given the gradient at the model's output."""


class Looks(Protocol):
    """A look at the outputs of sites in a pass."""

    def take(
        self, site: Site, made: Tensor, output: Tensor, part: Part | None, extra: Any, saved: tuple[Tensor, ...]
    ) -> None:
        """Take the output of a site; `made`: the tensor whose node made it, of which it is a part."""


class MicroBatch:
    """One forward pass: its sites and the numbers that have come back from them."""

    __slots__ = (
        *(
            "__weakref__",
            "aliased",
            "anchored",
            "checks",
            "columns",
            "delivered",
            "differentiated",
            "entered",
            "generation",
            "nodes",
        ),
        *("look", "probed", "probes", "sources", "spoiled", "task"),
    )

    def __init__(self) -> None:
        self.entered: list[Site] = []
        # While the forward pass lasts: what input taps are on, and the node of the graph that made a site's output.
        self.sources: dict[InputTap, Source] = {}
        self.nodes: dict[Site, tuple[Any, int]] = {}
        self.look: Looks | None = None  # at this pass, while the forward pass lasts
        self.probed: tuple[Site, ...] = ()  # inputs whose gradient is asked for in this pass
        self.aliased: dict[Site, Any] = {}  # for those, a weak reference to the user's tensor
        self.anchored: set[Site] = set()  # outputs that require a gradient by way of an anchor alone
        self.checks: dict[str, Tensor] = {}
        self.columns: dict[Site, Tensor] = {}
        self.probes: dict[Site, Tensor] | None = None
        self.generation = 0  # of the probes
        self.spoiled = False  # it has called the model in another thread, or was called so
        self.task = -1  # the backward pass that the columns came from
        self.delivered = False
        self.differentiated: int | None = None  # the first backward pass with create_graph=True


class _UnderWay(threading.local):
    """The forward pass under way in this thread."""

    micro: MicroBatch | None = None
    self_calls = SelfCalls()
    checking = False  # a backward pass of lipcore's own runs in this thread


class Collector:
    """The meeting place of one Capture's hooks, which hands each micro-batch's record to `on_record` once the numbers
    of all its sites are there.

    One per Capture; the hooks on its sites meet here.
    """

    def __init__(self, on_record: Callable[[Record], None], on_error: Callable[[Exception], None]) -> None:
        self.recording = True  # False after an error
        self.tapping = True  # False too during a forward pass that the shortcut serves
        self.sites: list[Site] = []  # those that a record is complete with
        self.unresolved: Site | None = None  # the first layer, as long as it has not run
        self.check: Check | None = None  # of the last forward pass, until its backward pass has come
        self.compares = False  # the shortcut compares this pass with its own numbers, so the record must not wait
        self.under_way = _UnderWay()
        self.threads = OtherThreads[MicroBatch]()
        self._begun: weakref.WeakValueDictionary[int, MicroBatch] = weakref.WeakValueDictionary()
        self.returning: MicroBatch | None = None  # the backward pass under way
        self.aliases = False  # an input was aliased in some pass
        self.forwards = 0  # tapped forward passes in grad mode
        self.records = 0  # how many of them came back
        self.refused: set[str] = set()  # why backward passes that came do not count
        self._on_record, self._on_error = on_record, on_error

    def fail(self, error: Exception) -> None:
        """Stop capturing and hand the error on; raise nothing."""
        if self.recording:
            self.recording = self.tapping = False
            self._on_error(error)

    def begin(self) -> MicroBatch:
        """Return a new micro-batch for the forward pass that begins."""
        self.check = self.returning = None
        micro = self.under_way.micro = MicroBatch()
        self.under_way.self_calls = SelfCalls()
        self.threads.begin(micro)
        self._begun[id(micro)] = micro
        return micro

    @property
    def waits(self) -> bool:
        """True where the backward pass of a tapped forward pass has not come yet, and still can."""
        alive = (reference() for reference in self._begun.valuerefs())
        return any(micro is not None and micro.entered and not micro.delivered for micro in alive)

    def enter_again(self, site: Site) -> MicroBatch | None:
        """Return the micro-batch of a call that is not its site's first in a forward pass; None where the call is not
        to be tapped. A site that is called twice in one forward pass is given up, or fails."""
        if in_backward() != -1:
            # Activation checkpointing runs the forward again. Where the first run was recorded, this is not another
            # call; where it ran without grad (reentrant), this one belongs to the backward pass under way.
            micro = self.returning
            return None if micro is None or site in micro.entered else micro
        if self.under_way.micro is not None:
            reason = (
                f"module '{site.name}' is called twice in one forward pass; per-sample numbers of a reused module are "
                "not defined here: name another one with input= or output="
            )
            if site.optional:
                self.under_way.micro.columns.pop(site, None)
                self.lose(site, reason)
            else:
                self.fail(ValueError(reason))
        return None

    def run_again(self, is_it: Callable[[MicroBatch], bool]) -> MicroBatch | None:
        """Return the pass that a checkpoint runs again now: the one whose gradients are coming back, or, where none
        have come yet (the checkpoint is around the loss too), one that waits and of which `is_it` is true."""
        if self.returning is not None:
            return self.returning
        alive = (reference() for reference in self._begun.valuerefs())
        return next((m for m in alive if m is not None and is_it(m)), None)

    def lose(self, site: Site, reason: str) -> None:
        """Give a site up and go on with the others."""
        if site in self.sites:
            self.sites.remove(site)
        if self.unresolved is site:
            self.unresolved = None
        site.lose(reason)

    def counts(self, micro: MicroBatch) -> bool:
        """Return whether gradients of this backward pass are the training's."""
        task = in_backward()
        if torch.is_grad_enabled() and micro.differentiated is None:
            micro.differentiated = task
        if not accumulates_everything():
            if not is_proof():  # lipcore's own are nothing to tell the user of
                self.refused.add(NOT_ACCUMULATED)
            return False
        if micro.spoiled:
            self.refused.add(IN_ANOTHER_THREAD)
            return False
        if micro.differentiated in (None, task):
            return True
        self.refused.add(GRAPH_OF_GRADIENT)
        return False

    def arrived(self, micro: MicroBatch) -> None:
        """Note that a site's numbers have come back, and deliver the micro-batch when all have."""
        self.returning = micro
        if self.is_complete(micro):
            self.deliver(micro)

    def is_complete(self, micro: MicroBatch) -> bool:
        """Return whether all sites of a micro-batch have brought their numbers."""
        return all(site in micro.columns for site in (*self.sites, *micro.probed))

    def finish_later(self, micro: MicroBatch) -> None:
        """Deliver a micro-batch at the end of the backward pass where some numbers may be missing then: the model may
        not use its input, or not have a first layer."""
        if (micro.probed or self.unresolved is not None) and not micro.delivered:
            task = micro.task
            queue_callback(lambda: self._finish(micro, task))

    def _finish(self, micro: MicroBatch, task: int) -> None:
        if micro.delivered or micro.task != task or not self.recording:
            return
        missing = [site for site in self.sites if site not in micro.columns and site is not self.unresolved]
        if not missing:
            self.deliver(micro)

    def deliver(self, micro: MicroBatch) -> None:
        """Hand on the record of a micro-batch whose numbers are all there."""
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
        record |= micro.checks
        self.records += 1
        try:
            self._on_record(record)
        except Exception as error:
            self.fail(error)


def inert_collector() -> Collector:
    """Return a collector that records nothing, for the hooks of a copied model."""
    inert = Collector(lambda record: None, lambda error: None)
    inert.recording = inert.tapping = False
    return inert
