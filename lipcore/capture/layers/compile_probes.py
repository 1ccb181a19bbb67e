"""Layer taps inside compiled regions: a probe per group of layers and forward pass takes the place of the pass itself.

Such a probe is a leaf inside a compiled region, and none of the fixed points that Monitor.probe follows. Layers are in
a group where they have parameters in common, whose uses the region joins (:mod:`.compiled_uses`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from lipcore.capture.compiled import armed
from lipcore.capture.layers import compiled_uses
from lipcore.capture.layers.layer_pass import OUTPUT, LayerPass
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.capture.layers.other_outputs import why_not

_REFUSED = (
    "{0}: a compiled region makes a call of other shapes than the rule is for (positions without the batch dimension, "
    "a flattened batch); name the layer in broadcast= or pass batch_dim= where that is it, or run the model in eager "
    "mode, where it is measured from the autograd graph"
)
_MAX_PENDING = 64  # forward passes whose probes may wait for their backward


class LayerProbes:
    """The probes of all layers: made outside the region for each forward pass, read when their gradients have come.

    Args:
        sites: every tapped layer.
        on_return: called in the backward pass when a probe gets its gradient.
    """

    def __init__(self, sites: list[LayerSite], on_return: Callable[[LayerPass], None]) -> None:
        self._groups = _groups(sites)
        self._on_return = weakref.WeakMethod(on_return)
        self._pending: list[LayerPass] = []  # whose probes may come back: a region keeps only the probes alive
        for group in self._groups:
            columns = [*dict.fromkeys(name for site in group for name in site.rows), "regions"]
            for site in group:
                site.columns = columns

    def allow(self) -> None:
        """Make the sites known to torch.compile."""
        compiled_uses.allow([site for group in self._groups for site in group])

    def arm(self, run: LayerPass, device: torch.device) -> None:
        """Make the probes of a forward pass that begins, and put them within the compiled region's reach."""
        for group in self._groups:
            columns = len(group[0].columns)
            probe = torch.empty(columns, run.batch.size, dtype=torch.float64, device=device, requires_grad=True)
            probe.register_post_accumulate_grad_hook(_ProbeHook(self._on_return, run))
            for site in group:
                run.probes[site.number] = armed[site.number] = probe
        self._pending.append(run)
        del self._pending[:-_MAX_PENDING]

    def disarm(self) -> None:
        """Take the probes out of the region's reach when the forward pass is over."""
        for group in self._groups:
            for site in group:
                armed.pop(site.number, None)
        compiled_uses.forget()

    def read(self, run: LayerPass) -> dict[str, str]:
        """Add the gradients of the probes to their pass, when its backward pass is over; return the parameters of
        layers that were called in a way their rule is not for, and what to do."""
        refused: dict[str, str] = {}
        for group in self._groups if run.probes else ():
            probe = run.probes[group[0].number]
            if probe.grad is None:
                continue
            *rows, regions = probe.grad.unbind()
            probe.grad = None
            named = " + ".join(f"'{site.name}' ({type(site.module).__name__})" for site in group)
            named = f"module{'s' * (len(group) > 1)} {named}"
            if bool(regions.isnan().any()):
                raise ValueError(f"{named}: {why_not(group[0].rule)}")
            if bool((regions < 0).any()):
                why = _REFUSED.format(named)
                refused |= dict.fromkeys((name for site in group for name in site.names.values()), why)
                continue
            if bool((regions > 1).any()):
                raise ValueError(
                    f"{named}: the same parameter is used more than once in a compiled forward pass, and not all of it "
                    "in one region, so that its squares cannot be joined. Compile the model with fullgraph=True, run "
                    "it in eager mode, or leave the parameter out with on_unsupported='skip'"
                )
            run.came.update(site.name for site in group)
            for name, row in zip(group[0].columns, rows, strict=False):
                run.calls[name] += 0
                run.add_row(name, row)
        if run.output_sq is not None:
            run.add_row(OUTPUT, run.output_sq)
        if run in self._pending:
            self._pending.remove(run)
        return refused


def _groups(sites: list[LayerSite]) -> list[list[LayerSite]]:
    """Return the sites in groups that have parameters in common, directly or through others."""
    group_of: dict[str, list[LayerSite]] = {}
    groups: dict[int, list[LayerSite]] = {}
    for site in sites:
        group = [site]
        for earlier in {id(found): found for name in site.names.values() if (found := group_of.get(name))}.values():
            group = [*earlier, *group]
            del groups[id(earlier)]
        groups[id(group)] = group
        group_of |= dict.fromkeys((name for each in group for name in each.names.values()), group)
    return list(groups.values())


class _ProbeHook:
    def __init__(self, on_return: Callable[[], Callable[[LayerPass], None] | None], run: LayerPass) -> None:
        self._on_return, self._run = on_return, weakref.ref(run)

    def __call__(self, probe: Tensor) -> None:
        run, on_return = self._run(), self._on_return()
        if run is not None and on_return is not None:
            on_return(run)
