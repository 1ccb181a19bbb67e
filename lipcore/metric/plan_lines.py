"""The lines of a metric's plan as people read them."""

from __future__ import annotations

from lipcore.metric.protocol import PlanLine
from lipcore.metric.show import Shown


class PlanLines(list[PlanLine]):
    """List of lines that prints as a table: what, by which rule, for how many bytes."""

    def __repr__(self) -> str:
        width = max((len(line.what) for line in self), default=0)
        rows = (f"{line.what:<{width}}  {line.rule}{_cost(line, '  ')}".rstrip() for line in self)
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        return Shown("plan", self.rows()).html()

    def rows(self) -> list[tuple[str, str, str]]:
        """Return each line's three cells."""
        return [(line.what, line.rule, _cost(line)) for line in self]


def size_text(count: float) -> str:
    """Return so many bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _cost(line: PlanLine, before: str = "") -> str:
    return f"{before}{size_text(line.bytes)}" if line.bytes else ""
