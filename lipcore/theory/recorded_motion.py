"""What Corollaries 2 and 3 both need from the Trajectory metric, and the sentences they share."""

from __future__ import annotations

from lipcore.metric.results import Quantity, Window
from lipcore.theory.literal_steps import LiteralSteps
from lipcore.theory.windows import quantity

LITERAL = "literal for plain SGD at batch 1"
CONTRADICTED = "the recorded motion contradicts it: a step was not alpha eps r (clipped or kept gradients? wrong eps?)"

_APART = {
    "set_reference": "the distance is from another point than the one the path starts at (set_reference())",
    "rebase": "weights were changed by something else than a step (load_state_dict(), rebase()): that counts in the "
    "distance and not in the length",
}


def known(window: Window, name: str, parameter: str) -> Quantity:
    """Return a quantity of the trajectory that has this parameter, or raise a ValueError."""
    every = every_steps(window)
    why = "Trajectory takes it in mode='exact' by default (stats=)"
    if name == "path_length" and every > 1:
        why = f"with every_steps={every} single steps are not known, only chords; it takes every_steps=1"
    found = quantity(window, "trajectory", name, why)
    if parameter not in list(found):
        raise ValueError(f"parameter: {name} has no {parameter!r}; expected one of {list(found)[:12]}")
    return found


def every_steps(window: Window) -> int:
    """Return k where the trajectory was looked at in every k-th step."""
    return int(window["trajectory"].details["every_steps"])


def apart(window: Window) -> str:
    """Say why the distance is not between the ends of the path; "" where it is."""
    return _APART.get(window["trajectory"].details.get("distance_apart_by", ""), "")


def unchecked(found: LiteralSteps) -> list[str]:
    """List as notes what the corollaries assume of the steps and nothing recorded tells."""
    return [f"not checked: {', '.join(found.unchecked)}"] if found.unchecked else []
