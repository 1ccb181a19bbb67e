"""Checks of a run: what the verdict at the top of the page is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lipcore.report.alarms_told import told, worst_first
from lipcore.report.facts import Facts
from lipcore.report.html import count, in_words, number
from lipcore.report.ratio_map import RatioMap
from lipcore.report.remedies import remedy_of
from lipcore.report.section import with_metric

State = Literal["fired", "quiet", "not measured"]


_TRAJECTORY = with_metric("Trajectory()", ", or no metrics at all")


@dataclass(frozen=True)
class Check:
    """One check and what came of it."""

    name: str
    state: State
    text: str  #: a sentence
    remedy: str = ""  #: what measures it, where it was not measured


def checks_of(facts: Facts, ratios: RatioMap | None) -> list[Check]:
    """Return all checks of a run, in the order of importance."""
    return [_alarms(facts), _not_finite(facts), _sudden(facts, ratios), *(check(facts) for check in _OTHERS)]


def _alarms(facts: Facts) -> Check:
    alarms = facts.alarms
    remedy = 'pass alarms="default" to watch()'
    if alarms:
        worst = worst_first(alarms)[0]
        place = str(worst.data.get("place", "total"))
        where = "" if place == "total" or worst.data.get("signal") == "nonfinite" else f", {in_words(place)}"
        more = "; the worst" if len(alarms) > 1 else ""
        said = f"{count(len(alarms), 'alarm')}{more} in step {worst.step:,}{where}: {told(worst)}"
        rank = worst.data.get("rank")
        of_rank = "" if rank is None else f"; what is below is not of that rank, --rank {rank} shows it"
        return Check("Alarms", "fired", said + of_rank)
    known = facts.config.get("alarms")
    if not known or known == "off":
        said = "were off" if known == "off" else "are not in this record"
        return Check("Alarms", "not measured", f"Alarms {said}.", remedy)
    return Check("Alarms", "quiet", f"No alarm in {count(facts.last_step, 'step')} ({', '.join(known)}).")


def _not_finite(facts: Facts) -> Check:
    lines = {name: line for name, line in facts.lines.items() if name.startswith("logged/")}
    bad = [(int(line.first_not_finite[0]), name) for name, line in lines.items() if line.not_finite[0]]
    steps = facts.windows.total("trajectory", "nonfinite_steps")
    name = "Values that are not finite"
    if bad:
        first, which = min(bad)
        lost = int(lines[which].not_finite[0])
        what = "The loss" if which == "logged/loss" else which.partition("/")[2]
        return Check(
            name, "fired", f"{what} is NaN or infinite in {count(lost, 'step')}, for the first time at step {first:,}."
        )
    if facts.left_out.first is not None:
        step, place = facts.left_out.first
        said = f"{in_words(place)}: a parameter is NaN or infinite in {count(facts.left_out.count, 'step')}"
        return Check(name, "fired", f"{said}, for the first time in step {step:,}.")
    if steps:
        return Check(name, "fired", f"Parameters were NaN or infinite after {count(int(steps), 'step')}.")
    if steps is None and not lines:
        remedy = remedy_of(facts, "trajectory", ["nonfinite_steps"], _TRAJECTORY)
        return Check(name, "not measured", "Nothing says whether all values were finite.", remedy)
    what = " and ".join(["the loss"] * ("logged/loss" in lines) + ["the parameters"] * (steps is not None))
    return Check(name, "quiet", f"No NaN and no infinite value in {what or 'what was logged'}.")


def _sudden(facts: Facts, ratios: RatioMap | None) -> Check:
    """Check that no layer's updates become ten times larger or smaller at once, beyond what they did before."""
    name = "Sudden changes"
    if ratios is None or not np.isfinite(ratios.high).any():
        return Check(name, "not measured", "Nothing says how updates changed.", _TRAJECTORY)
    found, looked = ratios.sudden, ratios.looked
    part = f" in {facts.covered.model}" if facts.covered.partial else ""
    if found is None and looked.first is None:
        said = f"Updates are compared with {looked.fewest:,} steps before them in which a layer moved: there are fewer."
        return Check(name, "not measured", said, f"train for more than {count(looked.fewest, 'step')}")
    if found is None:
        said = (
            f"From step {looked.first:,} on, no layer's update over weight norm{part} became ten times larger at once, "
            f"beyond the scatter and all of the {looked.before:,} steps before, or smaller for {looked.lasts:,} steps "
            "unlike the others."
        )
        some = f" {count(looked.never, 'layer')} moved in too few steps to be compared." if looked.never else ""
        return Check(name, "quiet", said + some)
    if np.isinf(found.times):
        still = "from here on" if found.still_to is None else f"from here to step {found.still_to:,}"
        return Check(name, "fired", f"Step {found.step:,}, {in_words(found.place)}: {still} it does not move{part}.")
    times = f"{number(found.times)} times {'larger' if found.larger else 'smaller'}"
    said = f"Step {found.step:,}, {in_words(found.place)}: the update over the weight norm{part} is {times} than before"
    shared = ", as in most layers: the batch, or a new learning rate?" if found.shared else "."
    return Check(name, "fired", said + shared)


def _unmoved(facts: Facts) -> Check:
    sums = facts.windows.sums.get(("trajectory", "unmoved_steps", "sum"))
    name = "Layers that do not move"
    if sums is None or not facts.windows.steps:
        remedy = remedy_of(facts, "trajectory", ["unmoved_steps"], _TRAJECTORY)
        return Check(name, "not measured", "Nothing says which layers moved.", remedy)
    steps = facts.windows.steps - int(facts.windows.total("trajectory", "nonfinite_steps") or 0)
    still = [place for place, unmoved in sums.items() if place != "total" and steps > 0 and unmoved >= steps]
    if still:
        more = f" and {len(still) - 3} more" if len(still) > 3 else ""
        return Check(name, "fired", f"{', '.join(map(in_words, still[:3]))}{more} did not move in any step.")
    part = max(((unmoved, place) for place, unmoved in sums.items() if place != "total"), default=(0.0, ""))
    if part[0] > 0.5 * steps:
        return Check(name, "fired", f"{in_words(part[1])} did not move in {int(part[0]):,} of {count(steps, 'step')}.")
    return Check(name, "quiet", "Every layer moved in most steps.")


def _loss(facts: Facts) -> Check:
    name, line = "The loss", facts.lines.get("logged/loss")
    if line is None:
        return Check(name, "not measured", "No loss was logged.", "call monitor.log(loss=loss) in the loop")
    means = line.mean[:, 0][line.count[:, 0] > 0]
    if not len(means):
        return Check(name, "fired", "The loss was never finite.")
    if len(means) == 1:
        said = f"The loss is {number(float(means[0]))} in all that was logged, which is too little to say more."
        return Check(name, "not measured", said, "call monitor.log(loss=loss) in more steps than one")
    loss = f"The loss that {facts.covered.whose} logged" if facts.covered.several else "The loss"
    part = max(1, len(means) // 10)
    begin, end = float(means[:part].mean()), float(means[-part:].mean())
    said = f"from {number(begin)} to {number(end)} (means of the first and the last tenth)"
    if end >= begin:
        return Check(name, "fired", f"{loss} did not fall: it went {said}.")
    fell = "hardly fell: it went" if number(begin) == number(end) else "fell"
    finite = ", while it was finite" if line.not_finite[0] else ""
    return Check(name, "quiet", f"{loss} {fell} {said}{finite}.")


def _metrics_off(facts: Facts) -> Check:
    name, off = "Metrics that stopped", facts.windows.off
    if not facts.windows.count:
        return Check(name, "not measured", "No window was recorded.", "a window closes after window_steps steps")
    stopped = [(metric, found) for metric, found in off.items() if facts.windows.is_off(metric)]
    if stopped:
        metric, found = stopped[0]
        more = f" ({', '.join(other for other, _ in stopped[1:])} too)" if len(stopped) > 1 else ""
        since = f"since step {found.first_step:,} or later"
        return Check(name, "fired", f"{metric} is off{more} {since}: {found.why}")
    known = ", ".join(facts.windows.metrics) or "none"
    if off:
        metric, found = next(iter(off.items()))
        steps = f"in the window over steps {found.first_step:,} to {found.last_step:,}"
        if found.windows > 1:
            steps = f"in {count(found.windows, 'window')}, the last time up to step {found.last_step:,}"
        return Check(name, "quiet", f"All metrics are on at the end: {known}. {metric} was off {steps}: {found.why}")
    return Check(name, "quiet", f"All metrics were on: {known}.")


def _record(facts: Facts) -> Check:
    name = "The record"
    if facts.unread:
        return Check(name, "fired", f"Parts of the record cannot be read: {facts.unread[0]}")
    if not facts.last_step:
        return Check(name, "not measured", "The record has no step.", "call optimizer.step() in the loop")
    rewinds = sum(start.kind == "rewind" for start in facts.starts)
    more = f"; {count(rewinds, 'rewind')} to a checkpoint" if rewinds else ""
    return Check(name, "quiet", f"The record can be read to its last step, {facts.last_step:,}{more}.")


_OTHERS: tuple[Callable[[Facts], Check], ...] = (_unmoved, _loss, _metrics_off, _record)
