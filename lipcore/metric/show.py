"""Results as people read them: a few lines of text, or a plain HTML table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape

from lipcore.metric.values import Value

LINES = 25


@dataclass
class Shown:
    """A title and rows of (name, numbers, what is to be said of them)."""

    title: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def text(self) -> str:
        """Return at most 25 lines."""
        rows = self.rows if len(self.rows) < LINES else [*self.rows[: LINES - 2], ("...", "", "")]
        width = max((len(name) for name, _, _ in rows), default=0)
        lines = [f"  {name:<{width}}  {'; '.join(part for part in parts if part)}".rstrip() for name, *parts in rows]
        return "\n".join([self.title, *lines])

    def html(self) -> str:
        """Return a table of all rows."""
        cells = (f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        return f"<table><caption>{escape(self.title)}</caption>{''.join(cells)}</table>"


class Showable(ABC):
    """Base of what prints as :class:`Shown`."""

    @abstractmethod
    def _shown(self) -> Shown: ...

    def __repr__(self) -> str:
        return self._shown().text()

    def _repr_html_(self) -> str:
        return self._shown().html()


def reducers_text(values: Mapping[str, Value]) -> tuple[str, str]:
    """Return the numbers of one place as text, and the labels and notes of those that are not simply exact."""
    numbers = "  ".join(f"{reducer} {value.value:.4g}" for reducer, value in values.items())
    remarks: dict[str, list[str]] = {}
    for reducer, value in values.items():
        worth = value.label if value.valid else f"{value.label}, not valid"
        remark = f"{worth}: {value.note}" if value.note else worth
        if remark != "exact":
            remarks.setdefault(remark, []).append(reducer)
    said = (f"{'/'.join(names)} {remark}" if len(names) < len(values) else remark for remark, names in remarks.items())
    return numbers, "; ".join(said)


def shortened(rows: Iterable[tuple[str, str, str]], most: int) -> list[tuple[str, str, str]]:
    """Return at most so many rows, the last of which says how many are missing."""
    rows = list(rows)
    return rows if len(rows) <= most else [*rows[: most - 1], ("...", f"{len(rows) - most + 1} more", "")]
