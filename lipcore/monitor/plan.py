"""What a Monitor measures, by which rule, for how many bytes."""

from __future__ import annotations

from textwrap import indent

from lipcore.metric.plan_lines import PlanLines, size_text
from lipcore.metric.protocol import PlanLine
from lipcore.metric.show import Shown


class Plan:
    """Plan of a Monitor: what it measures, by which rule, and what that costs; print it before step 0."""

    def __init__(
        self,
        lines: dict[str, list[PlanLine]],
        window: str,
        clock: str,
        history: tuple[int | None, int | None] = (None, None),
    ) -> None:
        self.lines = lines  #: per metric
        self.history_limit, self.history_bytes = history  #: most windows that are kept, and bytes of them
        self.window = window
        self.clock = clock

    @property
    def bytes(self) -> int:
        """Persistent state of all metrics; the history of windows comes on top."""
        return sum(line.bytes for lines in self.lines.values() for line in lines)

    @property
    def _title(self) -> str:
        return f"lipcore plan: {size_text(self.bytes)} of state; {self.window}; clock: {self.clock}"

    @property
    def _history(self) -> str:
        if self.history_bytes is None:
            return ""
        return f"at most {self.history_limit} windows, {size_text(self.history_bytes)}"

    def __repr__(self) -> str:
        out = [self._title]
        for metric, lines in self.lines.items():
            out.append(f"  {metric}")
            if lines:
                out.append(indent(repr(PlanLines(lines)), "    "))
        if self._history:
            out += ["  history", f"    {self._history}"]
        return "\n".join(out)

    def _repr_html_(self) -> str:
        rows = []
        for metric, lines in self.lines.items():
            rows += [(f"{metric}: {what}", rule, cost) for what, rule, cost in PlanLines(lines).rows()]
        rows += [("history", self._history, "")] * bool(self._history)
        return Shown(self._title, rows).html()
