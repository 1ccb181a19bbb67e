"""Which output a run's numbers refer to: r of a probability and r of its logit differ by the factor p (1 - p)."""

from __future__ import annotations

from torch import nn

from lipcore.lipschitz.taps import last_kind
from lipcore.metric.results import Window
from lipcore.models.names import named_modules, unwrap
from lipcore.theory.windows import one_place, quantity


def refuse_other_head(windows: list[Window], model: nn.Module, place: str | None) -> None:
    """Raise a ValueError where the windows are of another kind of output than the model's last module, as far as
    that can be seen (a custom module shows its last operation only while it is watched)."""
    kind = last_kind(unwrap(model))
    for window in windows:
        found = place_of(window, "lipschitz", place)
        seen = _split(found)[1]
        if seen and seen != (kind or "Sigmoid"):
            last = f"ends in a {kind}" if kind else "is to return probabilities"
            raise ValueError(
                f"place: the windows' numbers are of {found!r}, but the model {last}; Theorem 3 needs those of the "
                "probability: give Lipschitz the model whose output it is, or output=<the sigmoid>"
            )


def other_output(place: str, model: nn.Module) -> str:
    """Say why numbers of this place and of the model's output cannot be compared; "" where they can, as far as that
    can be seen."""
    module = unwrap(model)
    kind, (name, seen) = last_kind(module), _split(place)
    inner = dict(named_modules(module)).get(name) if isinstance(module, nn.Sequential) else None
    other = f"ends in a {kind}" if seen and kind and seen != kind else ""
    if not other and inner is not None and inner is not module and inner not in _ends(module):
        other = "goes on behind that module"
    return other and f"not comparable: the windows' numbers are of {place!r}, but the model {other}"


def place_of(window: Window, metric: str, place: str | None) -> str:
    """Return the place that was asked for, or the only one, of a window's Lipschitz metric."""
    return one_place(quantity(window, metric, "normalized_gradient_norm", "nothing was recorded"), place)


def _split(place: str) -> tuple[str, str]:
    """Split a place into the name of the module whose output it is and the kind of that output; "" where it was not
    seen."""
    name, colon, kind = place.rpartition(":")
    return (name, kind) if colon else (kind, "")


def _ends(module: nn.Module) -> list[nn.Module]:
    """Return a (nested) nn.Sequential, its last module, the last module of that, and so on: all have the same
    output."""
    ends = [module]
    while isinstance(ends[-1], nn.Sequential) and len(ends[-1]):
        ends.append(unwrap(ends[-1][-1]))
    return ends
