"""Uses of parameters inside a compiled region: the region's own backward pass joins them, and then takes norms.

torch.compile keeps what a layer's Function does in its backward pass apart from that of every other layer. So the
region holds one call instead, :func:`used`, which is not looked into before autograd's graph is recorded: there the
Functions of all calls in a group of layers with parameters in common share a :class:`_Uses`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from lipcore.capture.training_pass import in_backward, is_plain_run
from lipcore.layers import Batch, Factor, norms_sq_of
from lipcore.models.torch_internals import as_compiling


class Site(Protocol):
    """The part of a tapped layer that is asked for here."""

    key: str  #: its name in graphs
    names: dict[str, str]  #: the parameter's key in the module -> its canonical name
    columns: list[str]  #: the rows of its group's probe

    @property
    def in_place_after(self) -> Any:
        """The way in which an in-place operation may follow."""

    def brought(
        self, grad: Tensor, samples: int, extra: Any, saved: tuple[Tensor, ...]
    ) -> tuple[dict[str, Factor], dict[str, Tensor]]:
        """Return the factors of one call, and the rows beside them."""


_BATCH = "lipcore.Batch"
_sites: weakref.WeakValueDictionary[str, Site] = weakref.WeakValueDictionary()
# Of the forward pass under way, by id of the probe, which is kept so that no other gets its id. Tensors of a compiler's
# own are among them while it records a graph.
_begun: dict[int, tuple[Tensor, Tensor]] = {}


def allow(sites: Iterable[Site]) -> None:
    """Make :func:`used` known to torch.compile, and these sites to it."""
    torch.compiler.allow_in_graph(used)
    _sites.update({site.key: site for site in sites})


def forget() -> None:
    """Drop what belongs to the forward pass that has ended."""
    _begun.clear()


def coded(extra: Any) -> Any:
    """Return what a rule saves beside tensors as a graph may hold it, in a tuple; None where it may not. Traced."""
    if isinstance(extra, Batch):
        return ((_BATCH, extra.size, extra.dim),) if extra.offsets is None else None
    if type(extra) is tuple:
        parts = [coded(part) for part in extra]
        return None if any(part is None for part in parts) else (tuple([part[0] for part in parts]),)
    return (extra,) if extra is None or isinstance(extra, (bool, int, float, str)) else None


def _decoded(value: Any) -> Any:
    if not isinstance(value, (tuple, list)):
        return value
    return Batch(*value[1:]) if len(value) == 3 and value[0] == _BATCH else tuple(map(_decoded, value))


def used(output: Tensor, probe: Tensor, key: str, extra: Any, *saved: Tensor) -> Tensor:
    """Return a layer's output, tapped inside a compiled region.

    Args:
        probe: of the layer's group, which gets the group's rows as its gradient.
        key: the site's.
        extra: what its rule saved, as :func:`coded` returned it.
        saved: and the tensors that it saved.
    """
    if not torch.is_grad_enabled() or not output.requires_grad:
        return output
    site = _sites[key]
    begun = _begun.get(id(probe))
    token = _Joined.apply(probe, site.columns) if begun is None else begun[1]  # type: ignore[no-untyped-call]
    _begun[id(probe)] = probe, token
    node: Any = token.grad_fn
    tapped: Tensor = _Use.apply(output, token, site, node.uses, _decoded(extra)[0], *saved)  # type: ignore[no-untyped-call]
    return tapped


class _Uses:
    """The calls of a group of layers in one region: what has come back from each in a backward pass."""

    def __init__(self, columns: list[str], samples: int) -> None:
        self.columns, self.samples = columns, samples
        self.calls: Counter[str] = Counter()  # uses, by parameter, and rows beside them
        self._came: dict[str, dict[int, tuple[int, Factor | Tensor]]] = {}  # by row and use, with the backward pass

    def add(self, name: str, use: int, what: Factor | Tensor) -> None:
        self._came.setdefault(name, {})[use] = in_backward(), what

    def rows(self, device: torch.device) -> Tensor:
        """Return the group's rows, and forget what has come. The last one counts how often a region had some."""
        nothing = torch.full((self.samples,), torch.nan, dtype=torch.float64, device=device)
        rows: dict[str, Tensor] = {}
        joined: dict[str, Factor] = {}
        for name, by_use in self._came.items():
            for task, what in by_use.values():
                if task != in_backward():  # left by a backward pass that broke off
                    continue
                if isinstance(what, Tensor):  # a layer's second call has no row beside the parameters'
                    rows[name] = nothing if name in rows else what
                else:
                    joined[name] = joined[name].join(what) if name in joined else what
        self._came = {}
        rows |= norms_sq_of(joined)
        return torch.stack([*(rows.get(name, nothing) for name in self.columns[:-1]), torch.ones_like(nothing)])


class _Joined(torch.autograd.Function):
    """The Function on a group's probe, whose backward follows that of all uses and brings the probe its gradient."""

    @staticmethod
    def forward(ctx: Any, probe: Tensor, columns: list[str]) -> Tensor:
        ctx.uses = _Uses(columns, probe.shape[1])
        return probe.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with _as_it_runs():
            return ctx.uses.rows(grad.device), None


class _Use(torch.autograd.Function):
    """The Function on a tapped output, which it passes on; its backward hands factors to those of the other uses."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, token: Tensor, site: Site, uses: _Uses, extra: Any, *saved: Tensor) -> Tensor:
        ctx.site, ctx.uses, ctx.extra = site, uses, extra
        uses.calls.update(site.names.values())
        ctx.use = uses.calls.total()
        ctx.save_for_backward(*saved)
        # As passed_on() inside a region.
        return output.clone() if site.in_place_after else output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        uses, site = ctx.uses, ctx.site
        with _as_it_runs():
            factors, beside = site.brought(grad, uses.samples, ctx.extra, ctx.saved_tensors)
            alone = {name: factor for name, factor in factors.items() if uses.calls[name] == 1}
            for name, what in (factors | norms_sq_of(alone) | beside).items():
                uses.add(name, ctx.use, what)
        return (grad, grad.new_zeros((), dtype=torch.float64), *(None for _ in ctx.needs_input_grad[2:]))


def _as_it_runs() -> Any:
    """Return a context in which operators know whether they run or are recorded."""
    return nullcontext() if is_plain_run() else as_compiling()
