"""What to do where a number is missing: a metric that was passed is not asked for again."""

from __future__ import annotations

from collections.abc import Sequence

from lipcore.report.facts import Facts


def remedy_of(facts: Facts, metric: str, quantities: Sequence[str], otherwise: str) -> str:
    """Return why numbers of a metric are not in a record that has others of it, and what to do; `otherwise` where it
    has none of it.

    Args:
        metric: its name in windows, "trajectory".
        quantities: those that are needed.
    """
    windows = facts.windows
    known = windows.metrics.get(metric)
    if known is None:
        found = windows.off.get(metric)
        return otherwise if found is None else f"{metric} was passed, and is off: {found.why}"
    lacking = [name for name in quantities if name not in known]
    if metric == "trajectory" and lacking:
        names = ", ".join(f'"{name}"' for name in lacking)
        return f"Trajectory was passed, without them: add {names} to its stats=[...], or leave stats= out"
    said = windows.details.get(metric, {})
    reasons = [str(said["noise_scale_off"])] if "noise_scale" in quantities and said.get("noise_scale_off") else []
    reasons += [note for (own, name, note) in windows.doubts if own == metric and name in quantities]
    return f"{metric} was passed, and has no valid one: {reasons[0]}" if reasons else otherwise
