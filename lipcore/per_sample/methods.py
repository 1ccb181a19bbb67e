"""Which layers' norms can be computed in several ways, and what is known of the way before the first backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from lipcore.capture.layers.fused_linear import INSIDE, LEAST_TOKENS
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.capture.layers.tapped import TappedLayers
from lipcore.functional.linear import METHODS, Method
from lipcore.metric.protocol import PlanLine
from lipcore.models.arguments import check_choice
from lipcore.models.names import listed

#: What a layer of lipcore's own can be told; a rule of one's own may have other names.
LayerMethod = Method | Literal["estimate"]


def _choice(site: LayerSite) -> tuple[str, ...] | None:
    """Return the methods that a layer's norms can be computed by, () for one way; None where its rule does not say."""
    methods = site.rule.methods
    return () if methods and set(site.names) == {"bias"} else methods


def check_methods(methods: Mapping[str, str], sites: Sequence[LayerSite], fused: bool) -> None:
    """Raise ValueError for a method that is none, and for a layer that has no choice."""
    by_name = {site.name: site for site in sites}
    for layer, method in methods.items():
        site = by_name[layer]
        ways = _choice(site)
        if ways == ():
            having = [name for name, other in by_name.items() if _choice(other)]
            which = f"those that have are {listed(having)}" if having else "no layer of this model has"
            raise ValueError(
                f"methods[{layer!r}]: {type(site.module).__name__} has one way to compute its norms and no choice; "
                f"{which}"
            )
        if fused and site.rule.fuses(site.module):
            raise ValueError(
                f"methods[{layer!r}]: with fused=True a Linear's norms are taken inside its weight gradient; leave out "
                "one of the two"
            )
        check_choice(f"methods[{layer!r}]", method, ways or METHODS)


def how(site: LayerSite, methods: Mapping[str, str], fused: bool) -> str:
    """Return in which way a layer's norms are computed, as far as that is known, or ""."""
    if site.how:
        return site.how if site.how == INSIDE else f"by {site.how}"
    if site.name in methods:
        return f"method '{methods[site.name]}'"
    if _choice(site):
        ways = site.rule.ways(site.module)
        if fused and site.rule.fuses(site.module):
            where = "" if next(site.module.parameters()).is_cpu else " where it fills the device"
            return f"{INSIDE} from {LEAST_TOKENS} positions on{where}, else {ways}"
        return ways
    return f"by {site.rule.how}" if site.rule.how else ""


def layer_lines(layers: TappedLayers, methods: Mapping[str, str]) -> Iterator[PlanLine]:
    """Return the lines of plan() on layers and parameters: by which rule, in which way, or why not."""
    coverage, by_graph = layers.coverage, layers.coverage.by_graph
    covered = coverage.covered.keys() - by_graph.keys()
    for site in layers.sites:
        keys = [key for key, name in site.names.items() if name in covered]
        way = how(site, methods, layers.fuses)
        if keys:
            yield PlanLine(site.name, f"{type(site.module).__name__}: {', '.join(keys)}" + (f", {way}" if way else ""))
    for name, why in by_graph.items():
        way = layers.graph.ways.get(name, "chosen at the first forward pass")
        yield PlanLine(name, f"graph: {way}; by no rule, since {why}")
    for name, why in coverage.uncovered.items():
        yield PlanLine(name, f"not covered: {why}")
