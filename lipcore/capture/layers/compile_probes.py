"""Layer taps inside compiled regions: a probe per layer and forward pass takes the place of the pass itself.

Such a probe is a leaf inside a compiled region, and none of the fixed points that Monitor.probe follows.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lipcore.capture.compiled import armed
from lipcore.capture.layers.layer_pass import OUTPUT, LayerPass
from lipcore.capture.layers.layer_site import OTHER_OUTPUT, LayerSite
from lipcore.capture.layers.region_factors import register

_REFUSED = (
    "module '{0}' ({1}): a compiled region calls it on other shapes than its rule is for (positions without the batch "
    "dimension, a flattened batch); name it in broadcast= or pass batch_dim= where that is it, or run the model in "
    "eager mode, where it is measured from the autograd graph"
)
_MAX_PENDING = 64  # forward passes whose probes may wait for their backward


class LayerProbes:
    """The probes of all layers: made outside the region for each forward pass, read when their gradients have come.

    Args:
        model: the module that is called.
        sites: every tapped layer.
        on_return: called in the backward pass when a probe gets its gradient.
        compiled: a part of the model is compiled.
    """

    def __init__(
        self, model: nn.Module, sites: list[LayerSite], on_return: Callable[[LayerPass], None], *, compiled: bool
    ) -> None:
        self._sites = sites
        self._on_return = weakref.WeakMethod(on_return)
        self._pending: list[LayerPass] = []  # whose probes may come back: a region keeps only the probes alive
        for site in sites if compiled else ():
            site.shared, site.pending = shared_keys(site, sites, model), self._pending
            if site.shared:
                register(site)

    def arm(self, run: LayerPass, device: torch.device) -> None:
        """Make the probes of a forward pass that begins, and put them within the compiled region's reach."""
        for site in self._sites:
            probe = torch.empty(
                len(site.columns), run.batch.size, dtype=torch.float64, device=device, requires_grad=True
            )
            probe.register_post_accumulate_grad_hook(_ProbeHook(self._on_return, run))
            run.probes[site.number] = probe
            armed[site.number] = probe
            for key in site.shared:  # to be held until all of them are there
                run.calls[site.names[key]] += 2
        self._pending.append(run)
        del self._pending[:-_MAX_PENDING]

    def disarm(self) -> None:
        """Take the probes out of the region's reach when the forward pass is over."""
        for site in self._sites:
            armed.pop(site.number, None)

    def read(self, run: LayerPass) -> dict[str, str]:
        """Add the gradients of the probes to their pass, when its backward pass is over; return the parameters of
        layers that were called in a way their rule is not for, and what to do."""
        refused: dict[str, str] = {}
        for site in self._sites if run.probes else ():
            probe = run.probes[site.number]
            if probe.grad is None:
                continue
            *rows, calls = probe.grad.unbind()
            probe.grad = None
            if bool(calls.isnan().any()):
                raise ValueError(f"module '{site.name}' ({type(site.module).__name__}): {OTHER_OUTPUT}")
            if bool((calls < 1).any()):
                refused |= dict.fromkeys(site.names.values(), _REFUSED.format(site.name, type(site.module).__name__))
                continue
            if bool((calls > 1).any()) and not site.joins_calls:
                raise ValueError(
                    f"module '{site.name}' is called more than once in a compiled forward pass; its squares cannot be "
                    "joined there. Run it in eager mode, or leave it out with on_unsupported='skip'"
                )
            run.came.add(site.name)
            joined = {site.names[key] for key in site.shared}
            for name, row in zip(site.columns, rows, strict=False):
                if name in joined:
                    continue
                run.calls[name] += 0
                run.add_row(name, row)
        if run.output_sq is not None:
            run.add_row(OUTPUT, run.output_sq)
        if run in self._pending:
            self._pending.remove(run)
        return refused


def shared_keys(site: LayerSite, sites: Iterable[LayerSite], model: nn.Module) -> tuple[str, ...]:
    """Return the keys of a layer's parameters that may be used more than once: other layers have them too, or the layer
    itself stands in several places of the model."""
    if not site.rule.needs_only_batch:
        return ()
    places = sum(module is site.module for _, module in model.named_modules(remove_duplicate=False))
    users = Counter(name for one in sites for name in one.names.values())
    return tuple(key for key, name in site.names.items() if users[name] > 1 or places > 1)


class _ProbeHook:
    def __init__(self, on_return: Callable[[], Callable[[LayerPass], None] | None], run: LayerPass) -> None:
        self._on_return, self._run = on_return, weakref.ref(run)

    def __call__(self, probe: Tensor) -> None:
        run, on_return = self._run(), self._on_return()
        if run is not None and on_return is not None:
            on_return(run)
