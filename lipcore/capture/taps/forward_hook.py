"""The hook on a tapped module: asks for the gradient at its output, in one of two ways.

* In eager mode by a hook on the node that made the output: nothing is added to the graph (but an identity where the
  output does not require a gradient of its own), nothing kept alive, right behind in-place activations and activation
  checkpointing.
* Inside torch.compile by an identity with a probe, a fresh leaf of shape [columns, B] whose "gradient" is the
  per-sample numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.capture.compiled import armed
from lipcore.capture.own_nodes import counted, note_begun
from lipcore.capture.taps.collector import Collector, MicroBatch, inert_collector
from lipcore.capture.taps.identity import Anchored, Probed, Summed
from lipcore.capture.taps.site import Site
from lipcore.capture.taps.views import Part, behind_in_place
from lipcore.capture.training_pass import in_backward, is_plain_run


class ForwardHook:
    """The hook of one site, which brings its numbers to the collector."""

    def __init__(self, site: Site, collector: Collector) -> None:
        self.site = site
        self._collector = collector
        self._anchor = torch.empty(0, requires_grad=True, device="cpu")

    def __reduce__(self) -> tuple[Callable[[], ForwardHook], tuple[()]]:
        return inert_hook, ()

    def after_forward(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling():
            site = self.site
            probe = armed.get(site.number)
            if probe is None:
                return None
            saved, extra = site.save({}, module, arguments)
            return Probed.apply(output, probe, site, extra, *saved)  # type: ignore[no-untyped-call]
        if not torch.is_grad_enabled() or not is_plain_run():
            return None
        return self.tap(module, arguments, output)

    @counted
    def tap(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        """Tap the output of a forward pass that is known to be a plain run in grad mode; return the output to use in
        its place, or None."""
        site, collector = self.site, self._collector
        if not collector.tapping or site.lost:
            return None
        micro = collector.under_way.micro
        if micro is None or site in micro.entered or in_backward() != -1:
            again = in_backward() != -1 and output_is_anchored(collector, site, output)
            micro = collector.enter_again(site)
            if micro is None and again:  # a checkpoint must keep as many tensors as in the first run
                return Anchored.apply(output, self._anchor, site.in_place_after)  # type: ignore[no-untyped-call]
            if micro is None:
                return None
        given = output
        try:
            output = site.taps[0].pick(output)
            if getattr(output, "is_nested", False):
                raise ValueError(
                    f"module '{site.name}' ({type(module).__name__}): its output is a nested tensor, whose samples "
                    "have different shapes; pad them, or name another module"
                )
            if hasattr(output, "placements") or any(hasattr(a, "placements") for a in arguments):
                reason = (
                    f"module '{site.name}' ({type(module).__name__}): is called on a DTensor or returns one (tensor "
                    "parallel), of which a rank has a part"
                )
                if site.stays:
                    collector.lose(site, reason)
                    return None
                raise ValueError(f"{reason}; leave this metric out, metrics=[Trajectory()]")
            for tap in site.taps:
                tap.check(output)
            leaf = site.leaf(output)
        except Exception as error:
            collector.fail(error)
            return None
        if output.grad_fn is None and site.left_alone:
            if site.optional:
                collector.lose(site, site.left_alone)
            else:
                collector.fail(ValueError(f"module '{site.name}': {site.left_alone}"))
            return None
        if not micro.entered and micro.probes is None:
            collector.forwards += 1
        micro.entered.append(site)
        result = None
        if leaf is not None and given is output:
            output = result = Summed.apply(output, leaf, site.in_place_after)  # type: ignore[no-untyped-call]
        elif output.grad_fn is None:
            if given is not output:
                return None  # nothing trains it
            micro.anchored.add(site)
            note_begun()
            output = result = Anchored.apply(output, self._anchor, site.in_place_after)  # type: ignore[no-untyped-call]
        saved, extra = site.save(micro.sources, module, arguments)
        inner = in_backward() != -1
        made, part = behind_in_place(output) if site.in_place_after else (output, None)
        assert made.grad_fn is not None
        if micro.look is not None and not inner:
            micro.look.take(site, made, output, part, extra, saved)
        index = made.output_nr
        # On the node and not on the tensor: a fifth of the cost, and an in-place activation cannot get between.
        if micro.probed:
            micro.nodes[site] = made.grad_fn, index
        made.grad_fn.register_prehook(lambda grads: self._came_back(micro, grads[index], part, extra, saved, inner))
        return result

    def _came_back(
        self,
        micro: MicroBatch,
        grad: Tensor | None,
        part: Part | None,
        extra: Any,
        saved: tuple[Tensor, ...],
        inner: bool,
    ) -> None:
        site, collector = self.site, self._collector
        if grad is None or micro.delivered or not collector.recording or site.lost:
            return  # a second backward through the same graph brings the same ratios again
        if collector.under_way.checking:
            return
        # A checkpoint's inner backward belongs to the one around it; probes add up over several.
        if not inner and not collector.counts(micro):
            return
        if not inner and micro.probes is None and micro.task != in_backward():
            micro.task = in_backward()
            micro.columns.clear()  # left by a backward pass that did not reach every site
            collector.finish_later(micro)
        collector.returning = micro  # a checkpoint may run forward again while the check or the tap asks for gradients
        check = collector.check
        if check is not None and check.micro is micro and check.site is site and not inner:
            check.run(grad)
        columns = site.reduce(grad if part is None else part.of(grad), extra, saved)
        if columns is None:
            return
        before = micro.columns.get(site)
        micro.columns[site] = columns if before is None else before + columns
        collector.arrived(micro)


def output_is_anchored(collector: Collector, site: Site, output: Any) -> bool:
    """Return whether the first run of a pass that runs again has anchored this output."""
    micro = collector.run_again(lambda one: site in one.anchored and not one.delivered)
    plain = isinstance(output, Tensor) and output.grad_fn is None
    return plain and micro is not None and site in micro.anchored


def inert_hook() -> ForwardHook:
    """Return a hook that does nothing, which a copied model gets in the place of the original's."""
    collector = inert_collector()
    return ForwardHook(Site("", collector.fail), collector)
