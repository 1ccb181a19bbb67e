"""Probes: how numbers leave a compiled region, which can neither make leaves nor keep what a hook tells it.

Such a probe is a leaf inside a compiled region, and none of the fixed points that Monitor.probe follows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lipcore.capture.compiled import armed
from lipcore.capture.taps.collector import Collector, MicroBatch
from lipcore.capture.taps.site import Site

_MAX_PENDING = 1024  # forward passes whose probes may wait for their backward


def batch_in(arguments: Iterable[Any]) -> Tensor | None:
    """Return the first tensor among a model's arguments that can have the batch dimension."""
    return next((a for a in arguments if isinstance(a, Tensor) and a.dim()), None)


class Probes:
    """The probes of all sites: made outside the region for each forward pass, from the batch size of the input, with
    their gradients read when the optimizer has stepped."""

    def __init__(self, sites: list[Site], collector: Collector) -> None:
        self.pending: list[MicroBatch] = []  # always this very list
        self._sites = sites
        self._collector = collector
        self._generation = 0
        self._armed: list[Site] = []

    def arm(self, micro: MicroBatch, arguments: list[Any]) -> None:
        first = batch_in(arguments)
        if first is None:
            self._collector.fail(
                ValueError("model: a compiled model's first tensor argument must have the batch dimension; found none")
            )
            return
        self._collector.forwards += 1
        size, device = len(first), first.device
        inside = [site for site in micro.probed if site not in micro.aliased]  # inputs of layers
        micro.probes = {
            site: torch.empty(site.columns, size, dtype=torch.float64, device=device, requires_grad=True)
            for site in (*self._sites, *inside)
            if not site.lost
        }
        self._armed = list(micro.probes)
        armed.update((site.number, probe) for site, probe in micro.probes.items())
        micro.generation = self._generation
        self.pending.append(micro)
        if len(self.pending) > _MAX_PENDING:
            del self.pending[0]

    def disarm(self) -> None:
        """Take the probes out of the region's reach when the forward pass is over."""
        for site in self._armed:
            armed.pop(site.number, None)

    def read(self, *, forget: bool) -> None:
        """Deliver the micro-batches whose probes have their gradients; with `forget`, drop those forward passes that
        began before the last time that probes were read so."""
        waiting = self.pending.copy()
        self.pending.clear()
        for micro in waiting:
            if micro.delivered:
                continue
            for site, probe in (micro.probes or {}).items():
                if probe.grad is not None:
                    micro.columns[site] = probe.grad
            if all(site in micro.columns for site in self._collector.sites):
                self._collector.deliver(micro)
            elif not forget or micro.generation == self._generation:
                # Its backward may still come: in a pipeline a step can lie between a forward pass and its backward.
                self.pending.append(micro)
        if forget:
            self._generation += 1
