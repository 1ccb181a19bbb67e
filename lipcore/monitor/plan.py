"""What a Monitor measures, by which rule, for how many bytes."""

from __future__ import annotations

from lipcore.metric.protocol import PlanLine


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

    def __str__(self) -> str:
        out = [f"lipcore plan: {_size(self.bytes)} of state; {self.window}; clock: {self.clock}"]
        for metric, lines in self.lines.items():
            out.append(f"  {metric}")
            width = max((len(line.what) for line in lines), default=0)
            for line in lines:
                cost = f"  {_size(line.bytes)}" if line.bytes else ""
                out.append(f"    {line.what:<{width}}  {line.rule}{cost}")
        if self.history_bytes is not None:
            out += ["  history", f"    at most {self.history_limit} windows, {_size(self.history_bytes)}"]
        return "\n".join(out)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
