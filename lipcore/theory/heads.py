"""Which output a run's numbers refer to: r of a probability and r of its logit differ by the factor p (1 - p)."""

from __future__ import annotations

from torch import nn

from lipcore.lipschitz_taps import last_kind
from lipcore.names import unwrap
from lipcore.results import Window
from lipcore.theory.windows import one_place, quantity


def refuse_other_head(windows: list[Window], model: nn.Module, place: str | None) -> None:
    """ValueError where the windows are of another kind of output than the model's last module, as far as it can be seen
    (a custom module shows its last operation only while it is watched)."""
    kind = last_kind(unwrap(model))
    for window in windows:
        found = one_place(quantity(window["lipschitz"], "normalized_gradient_norm", "nothing was recorded"), place)
        seen = found.rpartition(":")[2] if ":" in found else ""
        if seen and seen != (kind or "Sigmoid"):
            last = f"ends in a {kind}" if kind else "is to return probabilities"
            raise ValueError(
                f"place: the windows' numbers are of {found!r}, but the model {last}; Theorem 3 needs those of the "
                "probability: give Lipschitz the model whose output it is, or output=<the sigmoid>"
            )
