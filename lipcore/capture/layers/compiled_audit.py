"""A compiled model's first pass under audit: run once more in eager mode, its graph shows every use of a parameter, and
its samples' gradients add up to the parameters'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.capture.gradient_sums import GradientSums
from lipcore.capture.graph.another_size import CannotRun, on_one_more
from lipcore.capture.identity import passed_on
from lipcore.capture.layers.audit import audit_graph
from lipcore.capture.layers.coverage import ParameterCoverage
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.layers import Batch
from lipcore.models.outputs import nodes_of, tensors_of
from lipcore.models.pause import paused
from lipcore.models.torch_internals import keeps_by_hooks

_OTHERWISE = (
    "in a pass of lipcore's own in eager mode its gradient is not the sum of the samples' gradients at its layer "
    "(functional_call with another weight, a hook that changes gradients, a weight that is exchanged in forward()); "
    "run the model in eager mode, or leave the parameter out with on_unsupported='skip'"
)


def audit_uncompiled(
    model: nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    batch: Batch,
    coverage: ParameterCoverage,
    sites: Sequence[LayerSite],
    *,
    skip: bool,
) -> None:
    """Uncover parameters that are used beside or otherwise than in their layers' calls; nothing is said of a model that
    cannot be run again.

    Raises:
        ValueError: there are some, and they are not to be left out.
    """
    seen = _Seen(Batch(batch.size + 1, batch.dim))
    handles = [site.module.register_forward_hook(_Note(site, seen), prepend=True, with_kwargs=True) for site in sites]
    try:
        with torch.compiler.set_stance("force_eager"):
            output = on_one_more(model, *call, batch.size, batch.dim)
    except CannotRun:
        return
    finally:
        for handle in handles:
            handle.remove()
    audit_graph(output, coverage, sites, seen.calls, skip=skip)
    names = seen.otherwise(output, coverage)
    for name in names:
        coverage.uncover(name, _OTHERWISE)
    if names and (not skip or not coverage.covered):
        coverage.check()


class _Seen:
    """The findings of the pass: how often each parameter's layers were called, and what their calls brought of it."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.calls: Counter[str] = Counter()
        self.unknown: set[str] = set()  # parameters of calls that did not fit their rule
        self.sums = GradientSums({}, lambda error: None)

    def otherwise(self, output: Any, coverage: ParameterCoverage) -> list[str]:
        """Return the parameters whose gradient is not what their layers' calls bring, from random gradients at the
        outputs; none where the graph allows no backward pass."""
        parameters = {n: p for n, p in coverage.measured().items() if n in self.calls and n not in self.unknown}
        outputs = [t for t in tensors_of(output) if t.requires_grad and t.is_floating_point()]
        # A checkpoint would run its layers again in the backward pass, without these hooks.
        if not parameters or not outputs or any(map(keeps_by_hooks, nodes_of(outputs))):
            return []
        generator = torch.Generator().manual_seed(0)
        seeds = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
        try:
            with paused():
                found = torch.autograd.grad(outputs, list(parameters.values()), seeds, allow_unused=True)
        except RuntimeError:
            return []
        came = {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}
        return self.sums.different({name: each for name, each in came.items() if name not in self.unknown})


class _Note:
    """The hook that notes a call of a site's layer, in the graph too."""

    def __init__(self, site: LayerSite, seen: _Seen) -> None:
        self._site, self._seen = site, seen

    def __call__(self, module: nn.Module, arguments: Any, keywords: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) and output else output
        site, seen = self._site, self._seen
        seen.calls.update(site.names.values())
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return None
        try:
            saved, extra = site.rule.save(module, arguments, keywords, seen.batch)
        except Exception:  # it is said of the compiled call
            saved, extra = (), None
            seen.unknown.update(site.names.values())
        if isinstance(output, tuple) and any(isinstance(each, Tensor) and each.requires_grad for each in output[1:]):
            # Attention weights that the model returns: whether they enter the loss, the user's own pass shows.
            seen.unknown.update(site.names.values())
        noted = _Noted.apply(tensor, site, seen, extra, *[t.detach() for t in saved])  # type: ignore[no-untyped-call]
        return (noted, *output[1:]) if isinstance(output, tuple) else noted


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, site: LayerSite, seen: _Seen, extra: Any, *saved: Tensor) -> Tensor:
        ctx.site, ctx.seen, ctx.extra, ctx.count = site, seen, extra, len(saved)
        ctx.save_for_backward(*saved)
        return passed_on(ctx, output, site.in_place_after)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        site, seen = ctx.site, ctx.seen
        if seen.unknown.isdisjoint(site.names.values()):
            try:
                factors = site.rule.factors(site.module, grad, ctx.extra, *ctx.saved_tensors)
                seen.sums.add_factors({site.names[key]: f for key, f in factors.items() if key in site.names})
            except Exception:
                seen.unknown.update(site.names.values())
        return (grad, None, None, None, *(None for _ in range(ctx.count)))
