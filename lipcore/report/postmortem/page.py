"""The page about a step of a run in which something went wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lipcore.report.binned import Binned
from lipcore.report.facts import Facts, facts_of
from lipcore.report.glossary import glossary
from lipcore.report.html import Html, Table, count, html, joined, name_of, tag
from lipcore.report.page import document, footer
from lipcore.report.plots import Plots, check_installed
from lipcore.report.postmortem.account import Account
from lipcore.report.postmortem.around import Around
from lipcore.report.postmortem.causes import checks_of
from lipcore.report.postmortem.ranks import looked_into
from lipcore.report.postmortem.rates import RATES
from lipcore.report.postmortem.reading import account_from
from lipcore.report.postmortem.samples import Samples
from lipcore.report.postmortem.words import (
    IDS_ALONE,
    beside,
    cells,
    elsewhere,
    headline,
    of_ranking,
    over_rate,
    sentence,
    settings,
    spread,
    told_of,
)
from lipcore.report.ratio_map import RatioMap
from lipcore.report.section import Figure, Missing
from lipcore.report.sections.training import training
from lipcore.report.source import Source
from lipcore.report.stretch import stretch

_MOST_RATES = 5  # lines of one figure


def postmortem_page(run: Source, step: int | None = None, *, follow: bool | None = None) -> str:
    """Return the page about a step of a run as HTML.

    Args:
        run: as :func:`lipcore.open_run` returns it.
        step: default: that of the worst alarm, without alarms that of the exception that ended it.
        follow: look into the record of the rank that has the worst alarm, or ended first; default: from rank 0's.

    Raises:
        ValueError: the step is not in the record; there is no alarm, and no step was asked for.
        ImportError: bokeh is missing.
    """
    check_installed()
    with looked_into(run, step, follow=follow) as looked:
        return _page(looked.run, account_from(looked, step))


def _page(run: Source, account: Account) -> str:
    facts = facts_of(Around(run, account.first, account.last))
    marked = sorted({account.begin, account.step, *(event.step for event in facts.alarms)})
    plots = Plots(facts.first_step, facts.last_step, marked)
    ratios = RatioMap(facts.ratios, facts) if facts.ratios is not None and facts.ratios.places else None
    if ratios is not None and account.places:
        ratios.look_at(account.places[0].step, account.places[0].place)
    rates = _rates(run, account, plots)
    around, missing = training(facts, plots, ratios)
    around.key, around.title = "around", f"Steps {account.first:,} to {account.last:,}"
    around.figures = [*around.figures, *rates]
    shown = [
        _verdict(account),
        _spread(account),
        *map(_samples, account.samples),
        _named(account),
        _settings(account),
        around.html(),
        _near(account, facts),
        _missing(account, missing),
        glossary(),
    ]
    said = f"compared with the {count(account.compared, 'step')} before"
    body = joined([
        tag("header", tag("h1", "Post-mortem of ", tag("bdi", facts.name)), tag("p", said, class_="facts")),
        tag("main", *shown),
        tag("footer", footer()),
    ])  # fmt: skip
    data = {"plots": plots.script(), "map": None if ratios is None else ratios.json(), "reload": None}
    return document(f"Post-mortem of {facts.name}, step {account.step:,}", body, data)


def _verdict(account: Account) -> Html:
    state = "fired" if account.event is not None or account.changes else "quiet"
    mark = tag("span", {"fired": "▲", "quiet": "✓"}[state], class_="mark")
    checks = checks_of(account)
    return tag(
        "section",
        tag("p", mark, headline(account), class_="headline"),
        *(tag("p", sentence, class_="also") for sentence in told_of(account)),
        tag("h3", "What to check") if checks else "",
        tag("ol", *(tag("li", check) for check in checks)) if checks else "",
        class_=f"verdict {state}",
        id="verdict",
    )


def _spread(account: Account) -> Html:
    rows = [
        (step, name_of(place), what, times, most, name_of(parameter) if parameter else "")
        for step, place, what, times, most, parameter in spread(account)
    ]
    if not rows:
        return html("")
    heads = ("first in step", "layer", "what", "times the usual", "at the most", "most in parameter")
    said = "Layers in the order in which they changed; in one step those first whose numbers are least usual."
    said += " Update norms are over the learning rate." if over_rate(account) else ""
    table = Table(heads, rows, most=12, of_numbers=False)
    return tag("section", tag("h2", "How it spread"), tag("p", said), table.html(), id="spread")


def _samples(samples: Samples) -> Html:
    tables = []
    for ranking in samples.rankings:
        table = Table(("id", "gradient norm", "loss"), [cells(sample) for sample in ranking.top])
        tables.append(tag("div", tag("p", f"By {ranking.by}: {of_ranking(samples, ranking)}."), table.html()))
    said = f"The largest of {count(samples.count, 'sample')}; those that are not finite come first."
    said = said if tables else f"{count(samples.count, 'sample')}: {IDS_ALONE}."
    title = tag("h2", f"Samples of step {samples.step:,}")
    return tag("section", title, tag("p", said), tag("div", *tables, class_="beside"), id=f"samples-{samples.step}")


def _named(account: Account) -> Html:
    if not account.named:
        return html("")
    lines = (tag("li", sentence(said)) for said in account.named)
    return tag("section", tag("h2", "Samples in the steps after"), tag("ul", *lines), id="named")


def _settings(account: Account) -> Html:
    lines = settings(account)
    if not lines:
        return html("")
    title = tag("h2", f"Learning rate, clipping, and what was logged in step {account.begin:,}")
    return tag("section", title, tag("ul", *(tag("li", line) for line in lines)), id="settings")


def _rates(run: Source, account: Account, plots: Plots) -> list[Figure]:
    """Draw the learning rates of the groups of parameters: those that changed, where there are many."""
    if RATES not in run.step_quantities:
        return []
    found = stretch(run, RATES, account.first, account.last)
    if not found.places:
        return []
    with np.errstate(all="ignore"):
        moved = np.nanmax(found.values, axis=0) - np.nanmin(found.values, axis=0)
    order = [i for i in np.argsort(-np.nan_to_num(moved), kind="stable").tolist() if moved[i] > 0][:_MOST_RATES]
    if not order:
        return []
    binned = Binned(account.first, account.last, len(found.steps))
    binned.add(found.steps[found.there], [found.places[i] for i in order], found.values[found.there][:, order])
    plots.lines("rates", [(place, binned, i) for i, place in enumerate(binned.places)], "rate")
    left = len(found.places) - len(order)
    said = f"As the optimizer had it in each step{f'; {left} more changed less, or not' if left else ''}."
    return [Figure("rates", "Learning rate of the groups of parameters", said)]


def _near(account: Account, facts: Facts) -> Html:
    lines = [*(beside(event) for event in account.others), *elsewhere(account)]
    lines += [f"not readable: {what}" for what in facts.unread]
    if not lines:
        return html("")
    return tag("section", tag("h2", "Near by"), tag("ul", *(tag("li", line) for line in lines)), id="near")


def _missing(account: Account, missing: Sequence[Missing]) -> Html:
    lines = [Missing(what, how) for what, how in account.missing]
    lines += [one for one in missing if one.what not in ("Loss", "Updates of each layer")]
    if not lines:
        return html("")
    ways = tag("ul", *(tag("li", line.html()) for line in lines))
    return tag("section", tag("h2", "Not in this record"), ways, id="not-measured")
