"""The top of the page: the verdict, the alarms, what was not measured, and the facts of the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone

from lipcore.report.alarms_told import LIGHT, told, worst_first
from lipcore.report.checks import Check
from lipcore.report.facts import Facts
from lipcore.report.html import Html, Table, count, html, joined, name_of, number, tag
from lipcore.report.parts import SINGLE_STEPS
from lipcore.report.section import Missing
from lipcore.report.source import StepTime

_MOST_ALARMS = 5
_LONG = 130  # characters of an alarm's message
_FEWEST_TIMED = 64  # steps, of fewer a median says little
_STATES = {"fired": "▲", "quiet": "✓", "not measured": "–"}


def verdict(facts: Facts, checks: Sequence[Check], missing: Sequence[Missing]) -> Html:
    """Return the verdict: what fired, or that nothing did, and what was not measured."""
    fired = [check for check in checks if check.state == "fired"]
    made = [check for check in checks if check.state != "not measured"]
    if not facts.last_step:
        state, headline = "unknown", "Nothing was recorded yet: this run has no step."
    elif fired:
        state, headline = "fired", fired[0].text
    else:
        state, headline = "quiet", f"Nothing needs attention: none of {count(len(made), 'check')} fired."
    parts: list[object] = [tag("p", tag("span", _mark(state), class_="mark"), headline, class_="headline")]
    parts += [tag("p", f"{check.text}", class_="also") for check in fired[1:]]
    if not any(check.name == "The loss" and check.state == "fired" for check in checks):
        parts += [tag("p", check.text, class_="also") for check in checks if check.name == "The loss"]
    if len(facts.alarms) > 1:
        parts.append(_alarms(facts))
    parts += _light(facts)
    parts.append(_not_measured(checks, missing))
    rows = [(f"{_STATES[check.state]} {check.name}", check.text) for check in checks]
    table = Table(("check", "what came of it"), rows, of_numbers=False)
    parts.append(tag("details", tag("summary", f"All {len(checks)} checks"), table.html()))
    return tag("section", *parts, class_=f"verdict {state}", id="verdict")


def _mark(state: str) -> str:
    return {"fired": "▲", "quiet": "✓"}.get(state, "–")


def _alarms(facts: Facts) -> Html:
    worst = worst_first(facts.alarms)
    rows = [
        (
            f"{event.step:,}",
            name_of(str(event.data.get("place", "total"))),
            _cut(told(event)),
            _score(event.data.get("score")),
        )
        for event in worst
    ]
    return Table(("step", "place", "alarm, the worst first", "score"), rows, most=_MOST_ALARMS, of_numbers=False).html()


def _light(facts: Facts) -> list[Html]:
    lit = [event for event in facts.events if event.kind == LIGHT]
    if not lit:
        return []
    often = "once" if len(lit) == 1 else f"{len(lit):,} times, last"
    said = f"Warning light, no alarm: on {often} in step {lit[-1].step:,}: {told(lit[-1])}"
    return [tag("p", said, class_="also", id="warning-light")]


def _cut(text: str) -> Html:
    return html(text) if len(text) <= _LONG else tag("span", text[:_LONG] + "…", title=text)


def _score(score: object) -> str:
    return number(float(score)) if isinstance(score, (int, float)) else "exact"


def _not_measured(checks: Sequence[Check], missing: Sequence[Missing]) -> Html:
    lines = [Missing(check.text.rstrip("."), check.remedy) for check in checks if check.state == "not measured"]
    lines += [one for one in missing if not (one.what == "Loss" and any("loss" in line.what for line in lines))]
    if not lines:
        return tag("p", "Everything that this page can show was measured.", class_="also")
    names = "; ".join(line.what[:1].lower() + line.what[1:] for line in lines)
    ways = tag("ul", *(tag("li", line.html()) for line in lines))
    return tag("details", tag("summary", f"Not measured: {names}"), ways, id="not-measured")


def run_facts(facts: Facts) -> Html:
    """Return the line of facts under the title, and the details."""
    config = facts.config
    said = [str(config[key]) for key in ("about", "model") if key in config]
    said += [count(facts.last_step, "step"), count(facts.windows.count, "window")]
    said += [f"single steps of {facts.covered.whose}"] if facts.covered.several else []
    if facts.starts:
        begin, end = facts.starts[0].wall, max(facts.last_wall, facts.starts[-1].wall)
        said.append(f"{_time(begin)} to {_time(end, day=_time(begin)[:10] != _time(end)[:10])} UTC")
    if len(facts.ranks) > 1 and facts.rank is not None:
        said.append(f"loss, samples and single steps of rank {facts.rank} alone (--rank N: another's)")
    again = [start.kind for start in facts.starts[1:]]
    said += [count(again.count(kind), kind) for kind in dict.fromkeys(again)]
    said += ["being written now"] if facts.being_written else []
    timed = None
    if facts.step_time.usual > 0 and facts.step_time.steps >= _FEWEST_TIMED:
        short, timed = _time_of_a_step(facts.step_time)
        said += short
    elif len(facts.starts) == 1 and facts.last_wall > facts.starts[0].wall:
        rate = facts.last_step / (facts.last_wall - facts.starts[0].wall)
        said.append(f"about {number(rate)} steps a second")
    rows: list[tuple[object, object]] = [("file", tag("bdi", facts.path))]
    rows += [] if timed is None else [("time of a step", timed)]
    rows += [(tag("bdi", key), tag("bdi", _plain(value))) for key, value in config.items() if key != SINGLE_STEPS]
    rows += [(f"{start.kind} at step {start.step:,}", f"{_time(start.wall)} UTC") for start in facts.starts]
    if facts.windows.scopes:
        scopes = sorted(facts.windows.scopes.items(), key=lambda pair: -pair[1])
        each = [_SCOPES[scope] + f" ({count(many, 'window')})" * (len(scopes) > 1) for scope, many in scopes]
        rows.append(("numbers of windows are of", ", ".join(each)))
    if facts.covered.several:
        rows.append(("numbers of single steps", facts.covered.sentence()))
    rows += [(metric, ", ".join(quantities)) for metric, quantities in facts.windows.metrics.items()]
    rows += [(f"{metric}, last window", _plain(said)) for metric, said in facts.windows.details.items() if said]
    others = [event for event in facts.events if event.kind not in ("alarm", LIGHT)]
    rows += [(f"step {event.step:,}: {event.kind}", event.text) for event in others]
    table = Table(("fact", ""), rows, most=30, of_numbers=False)
    return joined([
        tag("p", " · ".join(said), class_="facts"),
        tag("details", tag("summary", "Configuration, starts and what was recorded"), table.html(), class_="facts"),
    ])  # fmt: skip


def _time_of_a_step(time: StepTime) -> tuple[list[str], str]:
    """Return the time from step to step and what of it is lipcore's, in few words and in full."""
    step, own = (number(1000 * seconds / time.steps) for seconds in (time.usual, time.inside))
    short = [f"{number(time.steps / time.usual)} steps a second", f"lipcore's call: {own} of {step} ms a step"]
    return short, (
        f"{step} ms from step to step (medians of each 64 of {count(time.steps, 'step')}), of which {own} ms "
        f"({number(100 * time.inside / time.usual, 2)} %) inside lipcore's call at its end. Not in this: steps that "
        "close a window or prove something, where they are fewer than half; lipcore's hooks in the forward and "
        "backward pass, log(), its threads, work on a device. docs/benchmarks.md compares whole steps with and "
        "without lipcore."
    )


_SCOPES = {"rank": "this rank", "shard": "this rank's shards", "global": "all ranks"}


def doubts(facts: Facts) -> Html:
    """Return the numbers that are not valid, with their reasons."""
    found = sorted(facts.windows.doubts.items(), key=lambda item: -item[1].windows)
    if not found:
        return html("")
    rows = [
        (f"{metric}: {quantity}", note, f"{doubt.windows:,}", f"{len(doubt.places):,}")
        for (metric, quantity, note), doubt in found
    ]
    heads = ("number", "why it is not valid", "windows", "places")
    return tag(
        "section",
        tag("h2", "Numbers that are not valid"),
        tag("p", "They are left out above: what cannot be measured is said, never guessed."),
        tag("div", Table(heads, rows, of_numbers=False).html(), class_="greyed"),
        id="doubts",
    )


def _time(wall: float, *, day: bool = True) -> str:
    return datetime.fromtimestamp(wall, timezone.utc).strftime("%Y-%m-%d %H:%M" if day else "%H:%M")


def _plain(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 2000 else text[:2000] + " …"
