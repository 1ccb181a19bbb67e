"""A compiled model's first pass under audit: run once more in eager mode, its graph shows every use of a parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.capture.graph.another_size import CannotRun, on_one_more
from lipcore.capture.identity import passed_on
from lipcore.capture.layers.audit import audit_graph
from lipcore.capture.layers.coverage import ParameterCoverage
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.layers import Batch


def audit_uncompiled(
    model: nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    batch: Batch,
    coverage: ParameterCoverage,
    sites: Sequence[LayerSite],
    *,
    skip: bool,
) -> None:
    """Uncover parameters that are used beside their layers' calls; nothing is said of a model that cannot be run again.

    Raises:
        ValueError: there are some, and they are not to be left out.
    """
    calls: Counter[str] = Counter()
    handles = [site.module.register_forward_hook(_Note(site, calls), prepend=True) for site in sites]
    try:
        with torch.compiler.set_stance("force_eager"):
            output = on_one_more(model, *call, batch.size, batch.dim)
    except CannotRun:
        return
    finally:
        for handle in handles:
            handle.remove()
    audit_graph(output, coverage, sites, calls, skip=skip)


class _Note:
    """The hook that notes a call of a site's layer, in the graph too."""

    def __init__(self, site: LayerSite, calls: Counter[str]) -> None:
        self._site, self._calls = site, calls

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) and output else output
        self._calls.update(self._site.names.values())
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return None
        noted = _Noted.apply(tensor, self._site)  # type: ignore[no-untyped-call]
        return (noted, *output[1:]) if isinstance(output, tuple) else noted


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, site: LayerSite) -> Tensor:
        ctx.site = site
        return passed_on(ctx, output, site.in_place_after)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
