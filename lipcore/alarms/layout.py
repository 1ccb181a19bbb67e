"""Which of a step's numbers the alarms look at."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lipcore.alarms.detector import Columns
from lipcore.alarms.signals import Signal
from lipcore.metric.columns import Where
from lipcore.metric.values import Level


class Layout:
    """Places of a step's numbers: those that are scored, groups of parameters, and single ones, whose values have to be
    finite. The total and the groups take their place where there are none."""

    def __init__(self, signals: Mapping[str, Signal], places: tuple[str, ...], levels: tuple[Level, ...]) -> None:
        self._key = places, levels
        single = _at(levels, "tensor" if "tensor" in levels else "group")
        groups = _at(levels, "group" if "group" in levels else "total")
        self.single, self.groups, self.total = _run(single), _run(groups), _run(_at(levels, "total"))
        self.names = [places[i] for i in single]
        scored = {name: signal for name, signal in signals.items() if not signal.exact}
        self.columns = Columns.of(scored, [places[i] for i in groups])

    def fits(self, places: tuple[str, ...], levels: tuple[Level, ...]) -> bool:
        """Return whether numbers of these places lie so."""
        return self._key == (places, levels)


def _at(levels: tuple[Level, ...], level: str) -> list[int]:
    return [i for i, one in enumerate(levels) if one == level]


def _run(where: list[int]) -> Where:
    """Return positions as a slice where they follow each other, which costs a tenth to look up."""
    if where and where == list(range(where[0], where[0] + len(where))):
        return slice(where[0], where[-1] + 1)
    return np.array(where, dtype=np.int64)
