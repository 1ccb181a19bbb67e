"""The page that compares runs: where they part, how their settings differ, and their curves over a common axis."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lipcore.report.binned import Binned
from lipcore.report.compare.aligned import LOSS, Curve, curve
from lipcore.report.compare.parting import Parting, parting
from lipcore.report.facts import Facts, facts_of
from lipcore.report.html import Html, Table, count, joined, name_of, number, shortened_name, tag
from lipcore.report.page import document, footer
from lipcore.report.plots import Plots, check_installed
from lipcore.report.section import Figure
from lipcore.report.source import Source

#: What is drawn: full name or (metric, quantity, reducer), words, the vertical axis, and the other axis where none is
#: asked for.
_LINES = (
    (LOSS, "loss", "loss", "step"),
    ("trajectory/grad_norm", "gradient norm", "norm", "step"),
    ("trajectory/update_norm", "update norm", "norm", "step"),
)
_WINDOWS = (
    (("trajectory", "distance", "last"), "distance from the start", "norm", "loss"),
    (("trajectory", "path_length", "cumulative"), "path length", "norm", "loss"),
    (("lipschitz", "local_lipschitz", "mean"), "mean local Lipschitz constant", "slope", "loss"),
    (("lipschitz", "normalized_gradient_norm", "sum"), "normalised gradient length of a window", "length", "loss"),
    (("per_sample_grad_norm", "noise_scale", "mean"), "gradient noise scale", "samples", "loss"),
)


_WORDS = {
    "trajectory/weight_norm": "weight norm",
    "trajectory/not_finite": "number of parameters that are not finite",
    "optimizer/group_lr": "learning rate",
}


@dataclass
class Compared:
    """Curves of one quantity, one per run; None where a run does not have it."""

    words: str
    label: str
    axis: str
    curves: list[Curve | None]


def compare_page(runs: Sequence[Source], by: str | None = None) -> str:
    """Return the page that compares runs as HTML; the first is what the others are compared with.

    Args:
        runs: at least two, as :func:`lipcore.open_run` returns them.
        by: the axis of all curves: "step", "loss", or a name that was logged and only grows ("tokens"); None: steps,
            and the training loss for numbers of theory and for distances.

    Raises:
        ValueError: fewer than two runs, or none has such an axis.
        ImportError: bokeh is missing.
    """
    check_installed()
    if len(runs) < 2:
        raise ValueError(f"runs: expected at least 2, got {len(runs)}")
    facts = [facts_of(run) for run in runs]
    names = _names(facts)
    plots = Plots(min(one.first_step for one in facts), max(one.last_step for one in facts))
    curves = _curves(facts, by)
    if by is not None and not curves:
        raise ValueError(f"by: no run has logged {by!r}; choose step, or call monitor.log({by}=...) in the loop")
    figures = [_figure(plots, i, names, one) for i, one in enumerate(curves)]
    parted = [parting(runs[0], run) for run in runs[1:]]
    shown = [
        _verdict(names, facts, parted),
        _settings(names, facts),
        tag("section", tag("h2", "Curves"), *(figure.html() for figure in figures), id="curves"),
        _at_equal_loss(names, facts),
        _layers(names, facts),
    ]
    title = " against ".join(names)
    body = joined([
        tag("header", tag("h1", "Runs ", joined([tag("bdi", name) for name in names], " · "))),
        tag("main", *shown),
        tag("footer", footer()),
    ])  # fmt: skip
    return document(title, body, {"plots": plots.script(), "map": None, "reload": None})


def _names(facts: Sequence[Facts]) -> list[str]:
    names = [one.name for one in facts]
    return [one.path if names.count(one.name) > 1 else one.name for one in facts]


def _curves(facts: Sequence[Facts], by: str | None) -> list[Compared]:
    """Return the curves of all quantities that a run has."""
    found: list[Compared] = []
    for name, words, label, usual in _LINES:
        axis = by or usual
        if not (name == LOSS and axis == "loss"):
            curves = [curve(one, one.lines[name], 0, axis) if name in one.lines else None for one in facts]
            found.append(Compared(words, label, axis, curves))
    for key, words, label, usual in _WINDOWS:
        axis = by or (usual if all(LOSS in one.lines for one in facts) else "step")
        found.append(Compared(words, label, axis, [_of_windows(one, key, axis) for one in facts]))
    return [one for one in found if any(each is not None for each in one.curves)]


def _of_windows(facts: Facts, key: tuple[str, str, str], axis: str) -> Curve | None:
    numbers = facts.windows.get(*key)
    column = None if numbers is None else _column(numbers)
    return None if numbers is None or column is None else curve(facts, numbers, column, axis)


def _column(numbers: Binned) -> int | None:
    """Return the column of all places together, or of the only output."""
    if "total" in numbers.places:
        return numbers.places.index("total")
    return 0 if numbers.places and numbers.levels[0] == "total" else None


def _figure(plots: Plots, i: int, names: Sequence[str], one: Compared) -> Figure:
    key = f"compared-{i}"
    label = {"loss": "training loss (falls from left to right)"}.get(one.axis, one.axis)
    pairs = list(zip(names, one.curves, strict=True))
    lines = [(shortened_name(name, 30), c.x, c.y, c.steps) for name, c in pairs if c is not None]
    plots.against(key, lines, one.label, label, falls=one.axis == "loss")
    over = {"step": "by step", "loss": "at equal training loss"}.get(one.axis, f"by {one.axis}")
    without = [name for name, c in pairs if c is None]
    said = [f"At the end: {'; '.join(f'{name} {number(float(y[-1]))}' for name, _, y, _ in lines)}."]
    said += [f" Not recorded in {', '.join(without)}."] if without else []
    return Figure(key, f"{one.words[:1].upper()}{one.words[1:]}, {over}", "".join(said))


def _verdict(names: Sequence[str], facts: Sequence[Facts], parted: Sequence[Parting]) -> Html:
    said: list[object] = []
    for name, one in zip(names[1:], parted, strict=True):
        said.append(tag("p", _parted(names[0], name, one), class_="headline" if not said else "also"))
    differ = sum(one.step is not None for one in parted)
    state = "fired" if differ else "quiet" if all(one.steps for one in parted) else "unknown"
    rows = []
    for name, one in zip(names[1:], parted, strict=True):
        rows += [
            (name_of(name), _words(each.quantity), name_of(each.place), *_apart(each.one, each.other))
            for each in one.differences
        ]
    heads = ("run", "quantity", "place", f"in {shortened_name(names[0], 20)}", "in that run")
    table = Table(heads, rows, "What differs in the first step in which anything does", most=5, of_numbers=False)
    losses = [_loss(name, one) for name, one in zip(names, facts, strict=True)]
    return tag(
        "section",
        *said,
        tag("p", f"Losses: {'; '.join(losses)}.", class_="also"),
        *(
            tag("p", name_of(name), ": ", one.covered.sentence(), class_="also")
            for name, one in zip(names, facts, strict=True)
            if one.covered.several
        ),
        table.html(),
        class_=f"verdict {state}",
        id="verdict",
    )


def _parted(one: str, other: str, found: Parting) -> Html:
    if found.step is None:
        if not found.steps:
            return joined([name_of(one), " and ", name_of(other), " have no step in common."])
        return joined(
            [name_of(one), " and ", name_of(other), f" are the same in all {count(found.steps, 'common step')}."]
        )
    worst = found.differences[0]
    what = _words(worst.quantity)
    where = Html("") if worst.quantity.startswith("logged/") else joined([" of ", name_of(worst.place)])
    same = f"are the same up to step {found.step - 1:,}, and " if found.steps else ""
    numbers = f": {' against '.join(_apart(worst.one, worst.other))}."
    return joined(
        [name_of(one), " and ", name_of(other), f" {same}part in step {found.step:,}: {what}", where, numbers]
    )


def _apart(one: float, other: float) -> tuple[str, str]:
    """Return two numbers with as few digits as tell them apart, 4 at least."""
    digits = next((n for n in (4, 6) if number(one, n) != number(other, n)), 9)
    return number(one, digits), number(other, digits)


def _words(quantity: str) -> str:
    known = {name: words for name, words, _, _ in _LINES} | _WORDS
    return known.get(quantity, quantity.partition("/")[2])


def _loss(name: str, facts: Facts) -> str:
    line = facts.lines.get(LOSS)
    if line is None:
        return f"{name} has no loss"
    first, last = line.first_and_last(0)
    return f"{name} {number(first)} to {number(last)} in {count(facts.last_step, 'step')}"


def _settings(names: Sequence[str], facts: Sequence[Facts]) -> Html:
    keys = list(dict.fromkeys(key for one in facts for key in one.config))
    rows: list[tuple[object, ...]] = []
    for key in keys:
        values = [json.dumps(one.config[key], default=str) if key in one.config else "" for one in facts]
        if len(set(values)) > 1:
            rows.append((tag("bdi", key), *(tag("bdi", value or "not there") for value in values)))
    steps = [f"{one.last_step:,}" for one in facts]
    rows += [("steps", *steps)] if len(set(steps)) > 1 else []
    differ = f"{count(len(rows), 'setting')} differ{'s' if len(rows) == 1 else ''}" if rows else "No setting differs"
    said = f"{differ}; {len(keys)} were recorded."
    table = Table(("", *(shortened_name(name, 40) for name in names)), rows, of_numbers=False, most=30)
    return tag("section", tag("h2", "Configuration and versions"), tag("p", said), table.html(), id="settings")


def _at_equal_loss(names: Sequence[str], facts: Sequence[Facts]) -> Html:
    """Show every quantity where each run's loss first came down to the worst run's least."""
    reached = [curve(one, one.lines[LOSS], 0, "loss") if LOSS in one.lines else None for one in facts]
    if any(one is None or not len(one.x) for one in reached):
        return tag("section", tag("p", "Not compared at equal loss: a run has no loss; call monitor.log(loss=loss)."))
    compared = [one for one in _curves(facts, "loss") if one.axis == "loss"]
    every = [one for one in [*reached, *(each for one in compared for each in one.curves)] if one is not None]
    loss = max(float(one.x[-1]) for one in every if len(one.x))
    rows: list[tuple[object, ...]] = [("step", *(_step(one, loss) for one in reached))]
    rows += [(one.words, *("" if each is None else number(each.at(loss)) for each in one.curves)) for one in compared]
    table = Table(("", *(shortened_name(name, 40) for name in names)), rows)
    said = f"Where the mean loss of a hundredth of the run first came down to {number(loss)}, as in every run."
    return tag("section", tag("h2", "At equal training loss"), tag("p", said), table.html(), id="equal-loss")


def _step(one: Curve | None, loss: float) -> str:
    step = None if one is None else one.step_at(loss)
    return "" if step is None else f"{step:,}"


def _layers(names: Sequence[str], facts: Sequence[Facts]) -> Html:
    """Show layers whose median update over weight norm differs most between the first run and the others."""
    first = facts[0].ratios
    if first is None or any(one.ratios is None for one in facts):
        return Html("")
    rows: list[tuple[float, tuple[object, ...]]] = []
    for column, place in enumerate(first.places):
        usual = [first.usual(column)]
        for one in facts[1:]:
            assert one.ratios is not None
            usual.append(one.ratios.usual(one.ratios.places.index(place)) if place in one.ratios.places else np.nan)
        times = [value / usual[0] if usual[0] > 0 else np.nan for value in usual[1:]]
        known = [abs(np.log(each)) for each in times if np.isfinite(each) and each > 0]
        rows.append((max(known, default=-1.0), (name_of(place), *map(number, usual), *map(number, times))))
    rows.sort(key=lambda row: -row[0])
    short = [shortened_name(name, 30) for name in names]
    heads = ("layer", *short, *(f"{name} over {short[0]}" for name in short[1:]))
    table = Table(heads, [cells for _, cells in rows])
    said = "Median of update over weight norm; the layers that differ most come first."
    return tag("section", tag("h2", "Layers"), tag("p", said), table.html(), id="layers")
