"""The page of a run: one HTML file without an outside reference."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from lipcore.report.alarms_told import worst_first
from lipcore.report.checks import checks_of
from lipcore.report.facts import Facts, facts_of
from lipcore.report.glossary import glossary
from lipcore.report.head import doubts, run_facts, verdict
from lipcore.report.html import Html, joined, tag
from lipcore.report.output import write_whole
from lipcore.report.plots import Plots, check_installed, library
from lipcore.report.ratio_map import RatioMap
from lipcore.report.section import Missing
from lipcore.report.sections import SECTIONS
from lipcore.report.sections.training import training
from lipcore.report.source import Source

#: Nothing may be asked of a network, whatever a name in the record holds. Bokeh makes functions of texts.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "font-src data:; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Page:
    """The page about a run; a notebook shows it."""

    html: str = field(repr=False)  #: the whole file
    name: str = ""  #: of the run

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a file, whole or not at all; return its path.

        Raises:
            ReportError: the file cannot be written.
        """
        return write_whole(self.html, path)

    def _repr_html_(self) -> str:
        return framed(self.html, 800)


def page_of(run: Source, *, reload_seconds: float | None = None) -> str:
    """Return the page of a run as HTML.

    Args:
        run: as :func:`lipcore.open_run` returns it.
        reload_seconds: after so many seconds the page loads itself anew; None: it does not.

    Raises:
        ImportError: bokeh is missing.
        RecordError: the record cannot be read at all. Where parts of it cannot, the page says so.
    """
    check_installed()
    facts = facts_of(run)
    return made_page(facts, reload_seconds)


def made_page(facts: Facts, reload_seconds: float | None = None) -> str:
    """Return the page that says these facts."""
    plots = Plots(facts.first_step, facts.last_step, [event.step for event in worst_first(facts.alarms)])
    ratios = _ratios_of(facts)
    first, missing = training(facts, plots, ratios)
    made = [section(facts, plots) for section in SECTIONS]
    missing += [section for section in made if isinstance(section, Missing)]
    sections = [first] + [section for section in made if not isinstance(section, Missing)]
    checks = checks_of(facts, ratios)
    shown = [verdict(facts, checks, missing), *(section.html() for section in sections), doubts(facts), glossary()]
    body = joined([
        tag("header", tag("h1", "Run ", tag("bdi", facts.name)), run_facts(facts)),
        tag("main", *shown),
        tag("footer", footer()),
    ])  # fmt: skip
    data = {"plots": plots.script(), "map": None if ratios is None else ratios.json(), "reload": reload_seconds}
    return document(facts.name, body, data)


def _ratios_of(facts: Facts) -> RatioMap | None:
    return RatioMap(facts.ratios, facts) if facts.ratios is not None and facts.ratios.places else None


def head_of(run: Source) -> str:
    """Return the head of a run's page, as HTML: the verdict and the facts, without figures. It needs no bokeh.

    Raises:
        RecordError: the record cannot be read at all.
    """
    facts = facts_of(run)
    head = tag("header", tag("h1", "Run ", tag("bdi", facts.name)), run_facts(facts))
    return document(facts.name, joined([head, verdict(facts, checks_of(facts, _ratios_of(facts)), ())]))


def framed(page: str, height: int) -> str:
    """Return a whole page as an element of another one: its style and its scripts stay inside."""
    frame = f"width:100%;height:{height}px;border:1px solid #d4d4d4"
    return f'<iframe title="lipcore report" style="{frame}" srcdoc="{escape(page)}"></iframe>'


def footer() -> Html:
    """Return what stands at the end of a page."""
    from lipcore import __version__

    how = " Drag in a figure to zoom; the reset button of its toolbar undoes it."
    return joined([f"Made by lipcore {__version__}.", tag("span", how, class_="screen")])


def document(title: str, body: Html, data: dict[str, Any] | None = None) -> str:
    """Return a whole file: the style, the body, and where there are figures their data and the scripts."""
    return "".join((
        "<!DOCTYPE html>\n",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
        tag("title", title, " · lipcore report"),
        f"<style>{_own_file('page.css')}</style></head><body>",
        body,
        "" if data is None else _scripts(data),
        "</body></html>\n",
    ))  # fmt: skip


def _own_file(name: str) -> str:
    return files("lipcore.report").joinpath(name).read_text(encoding="utf-8")


def _scripts(data: dict[str, Any]) -> str:
    return "".join((
        "<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>",
        f'<script type="application/json" id="data">{_json(data)}</script>',
        f"<script>{_inside(library())}</script><script>{_own_file('page.js')}</script>",
    ))  # fmt: skip


def _json(data: Any) -> str:
    """Return JSON that ends no script element, whatever its texts hold."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _inside(script: str) -> str:
    """Return a script that ends no script element."""
    return script.replace("</script", "<\\/script")
