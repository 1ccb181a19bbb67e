"""Pieces of HTML; every text that comes from a run is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

#: Characters of a name that are shown.
NAME = 60


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def html(text: object) -> Html:
    """Return a text as HTML, escaped if it is none yet."""
    return text if isinstance(text, Html) else Html(escape(str(text)))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """Return an element; attributes that are None are left out, an underscore at the end is dropped ("class_")."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{''.join(map(html, content))}</{name}>")


def joined(parts: Iterable[object], between: str = "") -> Html:
    """Return pieces one after the other."""
    return Html(between.join(map(html, parts)))


def name_of(place: str, most: int = NAME) -> Html:
    """Return the name of a place: kept apart from the writing direction around it, the middle left out where it is
    long; the whole name is its title."""
    short = shortened_name(place, most)
    return tag("bdi", short, class_="name", title=place if short != place else None)


def shortened_name(place: str, most: int = NAME) -> str:
    """Return a name of at most so many characters.

    >>> shortened_name("layers.0.attention.out", 12)
    'layer…on.out'
    """
    if len(place) <= most:
        return place
    front = (most - 1) // 2
    return f"{place[:front]}…{place[len(place) - (most - 1 - front) :]}"


def in_words(place: str) -> str:
    """Return a place as a sentence names it: a number alone, as Sequential names its parts, says nothing.

    >>> in_words("2"), in_words("layers.2")
    ('layer 2', 'layers.2')
    """
    return f"layer {place}" if place.isdigit() else place


def printable(text: str) -> str:
    """Return a text of as many characters for a terminal, which those that are not printable would command.

    >>> printable("layer\x1b[31m")
    'layer?[31m'
    """
    return "".join(one if one.isprintable() else "?" for one in text)


def number(value: float, digits: int = 3) -> str:
    """Return a number as people read it.

    >>> [number(x) for x in (0.01234, 48123.0, 3.2e-9, 0.0, float("nan"), 1e12)]
    ['0.0123', '48,123', '3.2e-09', '0', 'none', '1e+12']
    """
    if math.isnan(value):
        return "none"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    size = abs(value)
    if size and not 1e-4 <= size < 1e7:
        return f"{value:.{digits}g}"
    if size >= 1000 and digits <= 4:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def count(number_of: int, what: str, many: str = "") -> str:
    """Return a count with its noun.

    >>> count(1, "alarm"), count(4812, "step"), count(0, "loss", "losses")
    ('1 alarm', '4,812 steps', '0 losses')
    """
    return f"{number_of:,} {what if number_of == 1 else many or what + 's'}"


@dataclass
class Table:
    """A table: heads, rows of cells, and how many rows are seen before the rest is unfolded."""

    heads: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    most: int = 10
    limit: int = 300  #: rows that stand on the page at all
    of_numbers: bool = True  #: all columns but the first are numbers

    def html(self) -> Html:
        """Return it as HTML."""
        if not self.rows:
            return Html("")
        seen = self._table(self.rows[: self.most], self.caption)
        rest = self.rows[self.most : self.limit]
        if not rest:
            return seen
        beyond = len(self.rows) - self.most - len(rest)
        said = count(len(rest), "more row") + (f", of {len(rest) + beyond:,}" if beyond else "")
        return joined([seen, tag("details", tag("summary", said), self._table(rest, ""), class_="more")])

    def _table(self, rows: Sequence[Sequence[object]], caption: str) -> Html:
        heads = tag("tr", *(tag("th", head, scope="col") for head in self.heads))
        body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
        inside = ([tag("caption", caption)] if caption else []) + [tag("thead", heads), tag("tbody", *body)]
        kind = "numbers" if self.of_numbers else "words"
        return tag("div", tag("table", *inside, class_=kind), class_="wide", tabindex="0", role="group")
