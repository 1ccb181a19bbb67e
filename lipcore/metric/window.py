"""A window: what all metrics say about a stretch of steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lipcore.metric.metric_result import MetricResult
from lipcore.metric.show import LINES, Showable, Shown, shortened
from lipcore.metric.values import Level

Scope = Literal["rank", "shard", "global"]


@dataclass(frozen=True, repr=False)
class Window(Showable, Mapping[str, MetricResult]):
    """Results of all metrics over steps [first_step, last_step]; ``window["trajectory"]``."""

    index: int
    first_step: int  #: optimizer steps are counted from 1
    last_step: int
    closed: bool  #: False for the open window that compute() returns
    #: What is in these numbers: all there is ("global"), this rank's data and whole parameters ("rank"), or this rank's
    #: data and its parts of the parameters ("shard").
    scope: Scope
    results: dict[str, MetricResult]
    off: dict[str, str] = field(default_factory=dict, compare=False)  #: metrics that are turned off, and why

    @property
    def local(self) -> bool:
        """Answer to whether other ranks hold parts that are not in these numbers."""
        return self.scope != "global"

    @property
    def steps(self) -> int:
        """Number of optimizer steps in the window."""
        return self.last_step - self.first_step + 1

    def __getitem__(self, metric: str) -> MetricResult:
        try:
            return self.results[metric]
        except KeyError:
            if metric in self.off:
                raise KeyError(f"metric {metric!r} is off in this window: {self.off[metric]}") from None
            raise KeyError(f"no metric {metric!r} in this window; it has {', '.join(self.results) or 'none'}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def flat(self, level: Level = "group") -> dict[str, float]:
        """Return all metrics' numbers of one level and the totals: {"trajectory/update_norm.max/layers.0": 0.013}."""
        out: dict[str, float] = {}
        for result in self.results.values():
            out |= result.flat(level)
        return out

    def to_dict(self) -> dict[str, Any]:
        """Return it nested and JSON-ready."""
        header = {"index": self.index, "first_step": self.first_step, "last_step": self.last_step}
        return header | {
            "closed": self.closed,
            "scope": self.scope,
            "metrics": {name: result.to_dict() for name, result in self.results.items()},
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Window:
        """Restore what :meth:`to_dict` gave."""
        results = {name: MetricResult.from_dict(name, result) for name, result in state["metrics"].items()}
        header = {key: state[key] for key in ("index", "first_step", "last_step", "closed", "scope")}
        return cls(**header, results=results)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of all results, about."""
        return sum(result.nbytes for result in self.results.values())

    @property
    def title(self) -> str:
        """Name of the window, in words."""
        state = "closed" if self.closed else "open"
        rank = "; other ranks hold parts of it" if self.local else ""
        return f"Window {self.index} ({state}): steps {self.first_step} to {self.last_step}{rank}"

    def _shown(self) -> Shown:
        off = [(name, "off", why) for name, why in self.off.items()]
        share = max(3, (LINES - 1 - len(off)) // max(len(self.results), 1))
        rows: list[tuple[str, str, str]] = []
        for name, result in self.results.items():
            inner = ((f"  {row}", numbers, remark) for row, numbers, remark in result.shown_rows())
            rows += [(name, "", ""), *shortened(inner, share - 1)]
        return Shown(self.title, [*off, *rows])
