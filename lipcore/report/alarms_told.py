"""Alarms in the order in which a page tells them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lipcore.report.source import Happened


def worst_first(alarms: Iterable[Happened]) -> list[Happened]:
    """Return alarms by score, the largest first; one without (a value that is not finite) before all, by step."""

    def rank(event: Happened) -> tuple[float, int]:
        score = event.data.get("score")
        return (-math.inf if score is None else -abs(float(score)), event.step)

    return sorted(alarms, key=rank)


def told(event: Happened) -> str:
    """Return an alarm's message without step, place and score, which stand beside it."""
    return (event.text.partition(": ")[2] or event.text).partition(" (score ")[0]
