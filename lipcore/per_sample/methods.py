"""Which layers' norms can be computed in several ways, and what is known of the way before the first backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lipcore.capture.layers.layer_site import LayerSite

_EITHER = ("gram", "direct")
_CHOICE: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: (*_EITHER, "estimate"),
    nn.Bilinear: _EITHER,
    nn.MultiheadAttention: _EITHER,
    nn.modules.conv._ConvNd: _EITHER,
}
_ONE_WAY: dict[type[nn.Module], str] = {
    nn.LayerNorm: "sums over positions",
    nn.RMSNorm: "sums over positions",
    nn.GroupNorm: "sums over positions",
    nn.modules.batchnorm._NormBase: "sums over positions",
    nn.PReLU: "sums over positions",
    nn.Embedding: "sums over equal indices",
    nn.EmbeddingBag: "sums over equal indices",
}


def _of(site: LayerSite) -> tuple[str, ...] | None:
    """The methods that can be asked for; None where that is not known (a rule of the user's)."""
    if not type(site.rule).__module__.startswith("lipcore.layers."):
        return None
    weighs = any(key != "bias" for key in site.names)
    return next((ways for kind, ways in _CHOICE.items() if isinstance(site.module, kind) and weighs), ())


def check_methods(methods: Mapping[str, str], sites: Sequence[LayerSite], fused: bool) -> None:
    """ValueError for a method that is none, and for a layer that has no choice."""
    by_name = {site.name: site for site in sites}
    for layer, method in methods.items():
        site = by_name[layer]
        ways = _of(site)
        if ways == ():
            having = [repr(name) for name, other in by_name.items() if _of(other)]
            which = f"those that have are {', '.join(having[:8])}" if having else "no layer of this model has"
            raise ValueError(
                f"methods[{layer!r}]: {type(site.module).__name__} has one way to compute its norms and no choice; "
                f"{which}"
            )
        if fused and isinstance(site.module, nn.Linear):
            raise ValueError(
                f"methods[{layer!r}]: with fused=True a Linear's norms are taken inside its weight gradient; leave out "
                "one of the two"
            )
        allowed = ways or _EITHER
        if method not in allowed:
            expected = " or ".join(filter(None, [", ".join(map(repr, allowed[:-1])), repr(allowed[-1])]))
            raise ValueError(f"methods[{layer!r}]: expected {expected}, got {method!r}")


def how(site: LayerSite, methods: Mapping[str, str]) -> str:
    """In which way the norms of a layer are computed, as far as that is known; "" where there is nothing to say."""
    if site.how:
        return f"by {site.how}"
    if site.name in methods:
        return f"method '{methods[site.name]}'"
    if _of(site):
        return "Gram or direct: chosen at the first backward pass"
    one_way = next((text for kind, text in _ONE_WAY.items() if isinstance(site.module, kind)), "")
    return f"by {one_way}" if one_way else ""
