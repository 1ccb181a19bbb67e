"""A section of the page: sentences, figures and tables of one thing; or the line that says how to record it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lipcore.report.facts import Facts
from lipcore.report.html import Html, Table, html, joined, tag
from lipcore.report.plots import Plots


@dataclass
class Figure:
    """A figure with the sentence and the table beside it."""

    key: str  #: its name in :class:`Plots`
    title: str
    sentence: object
    table: Table | None = None
    below: Html | None = None  #: what stands right under the picture

    def html(self) -> Html:
        """Return it as HTML."""
        parts: list[object] = [
            tag("h3", self.title, id=f"title-{self.key}"),
            tag("p", self.sentence),
            tag("div", id=f"plot-{self.key}", class_="plot", role="img", aria_labelledby=f"title-{self.key}"),
            self.below or "",
            tag("a", "CSV of this figure", href="#", class_="csv", data_figure=self.key, download=f"{self.key}.csv"),
        ]
        if self.table is not None and self.table.rows:
            parts.append(tag("details", tag("summary", "The numbers"), self.table.html()))
        return tag("figure", *parts)


@dataclass
class Section:
    """Part of a page about one thing."""

    key: str
    title: str
    sentences: Sequence[object] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    beside: Sequence[Table] = ()  #: tables that stand beside each other
    notes: Sequence[object] = field(default_factory=list)  #: small print

    def html(self) -> Html:
        """Return it as HTML."""
        return tag(
            "section",
            tag("h2", self.title),
            *(tag("p", sentence) for sentence in self.sentences),
            *(figure.html() for figure in self.figures),
            tag("div", *(table.html() for table in self.beside), class_="beside") if self.beside else "",
            *(table.html() for table in self.tables),
            *(tag("p", note, class_="note") for note in self.notes),
            id=self.key,
        )


@dataclass(frozen=True)
class Missing:
    """Line about what was not measured, and which argument measures it."""

    what: str
    remedy: str

    def html(self) -> Html:
        """Return it as HTML."""
        return joined([tag("strong", self.what), ": ", html(self.remedy)])


def with_metric(metric: str, more: str = "") -> str:
    """Say which metric measures something: a remedy of :class:`Missing`."""
    return f"pass metrics=[..., lipcore.{metric}] to watch(){more}"


Made = Section | Missing
Make = Callable[[Facts, Plots], Made]
