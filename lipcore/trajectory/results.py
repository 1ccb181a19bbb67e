"""What the trackers of a Trajectory say: the results of a window, and the lines of a plan."""

from __future__ import annotations

from collections.abc import Iterable

from lipcore.metric.protocol import PlanLine
from lipcore.metric.results import MetricResult
from lipcore.trajectory.building import Built
from lipcore.trajectory.parameters import WatchedParameter


def add_quantities(result: MetricResult, built: Built, wanted: Iterable[str], every_steps: int) -> None:
    """Add the wanted quantities, each from the first tracker that has it."""
    left = set(wanted)
    for kind, tracker in built.trackers.items():
        of_tracker = left & set(tracker.quantities)
        if kind == "updates" and every_steps > 1:
            of_tracker.discard("path_length")  # single steps out of many make neither a path nor a chord
        length = "path_length" if every_steps == 1 else "chord_length"
        tracker.describe(result, frozenset(of_tracker), length=length)
        left -= of_tracker
    if built.gradients:
        built.gradients.describe(result, frozenset(left))


def plan_lines(built: Built, watched: list[WatchedParameter], held: list[WatchedParameter]) -> list[PlanLine]:
    """Return what was chosen, the groups, and the bytes of every kind of state; `held`: what is watched on this rank
    and on those that share it."""
    lines = [PlanLine("mode", built.choice.why)]
    if len(watched) < len(held):
        mine, all_of_them = (sum(one.tensor.numel() for one in each) for each in (watched, held))
        said = f"{len(watched)} of {len(held)} parameters, {mine:,} of {all_of_them:,} elements"
        lines.append(PlanLine("split_replicas", f"{said}; other ranks keep the others"))
    groups: dict[str, list[WatchedParameter]] = {}
    for parameter in watched:
        groups.setdefault(parameter.group, []).append(parameter)
    for group, members in groups.items():
        elements = sum(parameter.tensor.numel() for parameter in members)
        lines.append(PlanLine(group, f"{len(members)} parameters, {elements:,} elements"))
    for tracker in built.trackers.values():
        lines += [PlanLine(kind, "", size) for kind, size in tracker.bytes().items()]
    if built.unexplained is not None:
        check = built.unexplained
        lines.append(PlanLine("unexplained movement", check.rule, check.bytes))
        lines += [PlanLine(name, f"not checked for unexplained movement: {why}") for name, why in check.why_not.items()]
    if built.gradients:
        size = sum(tracker.table.bytes for tracker in built.gradients.trackers.values())
        lines.append(PlanLine("gradient norms", "read after backward and before the step", size))
    return lines
