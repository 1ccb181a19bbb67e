"""A check whether a window's steps were those of Corollaries 2 and 3: plain SGD on one sample, of the first layer's
bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lipcore.metric.results import Value, Window
from lipcore.theory.windows import NEEDS, one_place, quantity

_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class LiteralSteps:
    """Statement of a window about its steps; `against` names all that differs from what the corollaries assume."""

    side: Value  #: the side of the sandwich that the corollary is made from
    against: tuple[str, ...]
    unchecked: tuple[str, ...]  #: what the corollaries ask for and nothing recorded tells
    learning_rate: tuple[float, float] | None  #: lowest and highest of the bias' group; None where not recorded


def has_sides(window: Window) -> bool:
    """Say whether the window has a sandwich to state a corollary with."""
    return "sandwich" in window.results.get("lipschitz", ())


def own_bias(window: Window) -> str | None:
    """Return the name of the first layer's bias, whose steps were recorded."""
    facts: Mapping[str, Any] = window["lipschitz"].details.get("first_bias", _NOTHING)
    return facts.get("parameter")


def literal_steps(window: Window, parameter: str, side: str, place: str | None) -> LiteralSteps:
    r"""Check a window's steps. A step is :math:`\alpha\varepsilon_t r_t` long only for the first layer's own bias,
    on one row per sample, at batch 1, by SGD without momentum or weight decay; and the mean of lambda must be over
    every step."""
    result = window["lipschitz"]
    sides = quantity(window, "lipschitz", "sandwich", NEEDS)
    place = one_place(sides, place)
    value = sides[place][side]
    facts = result.details.get("first_bias", _NOTHING)
    measured = result["normalized_gradient_norm"][place]["mean"].count
    against = []
    own = facts.get("parameter")
    if parameter != own:
        against.append(f"{parameter!r} is not the first layer's own bias, " + (repr(own) if own else "which has none"))
    if facts.get("shared"):
        against.append("the first layer's bias is shared with another layer")
    if facts.get("layer") != "Linear":
        against.append(f"the first layer is a {facts.get('layer')}: its bias is shared by several rows of a sample")
    elif facts.get("rows_per_sample") not in (1, None):
        against.append(f"the first layer sees {facts['rows_per_sample']} rows per sample, which share its bias")
    if not facts.get("samples") == measured == value.count == window.steps:
        against.append(
            f"{facts.get('samples')} samples and {value.count} with a lambda in the {window.steps} steps of "
            "a window: it takes batch 1 and lambda_every=1, and no sample without a loss gradient"
        )
    if window.local:
        against.append("other ranks hold parts of the batches")
    unchecked = ["rows per sample"] if facts.get("rows_per_sample") is None and facts.get("layer") == "Linear" else []
    if facts.get("optimizer") is None:
        unchecked.append("the optimizer (no optimizer object)")
    else:
        against += _against_optimizer(facts)
    rates = facts.get("learning_rate")
    complete = rates is not None and facts["steps"] == window.steps
    return LiteralSteps(value, tuple(against), tuple(unchecked), (rates[0], rates[1]) if complete else None)


def _against_optimizer(facts: Mapping[str, Any]) -> list[str]:
    kind = facts["optimizer"]
    if not kind.startswith("torch.optim.") or kind.rpartition(".")[2] != "SGD":
        return [f"the bias is stepped by {kind}, not by torch.optim.SGD"]
    return [f"SGD has {name}={facts[name]!r}" for name in ("momentum", "weight_decay", "nesterov") if facts.get(name)]
