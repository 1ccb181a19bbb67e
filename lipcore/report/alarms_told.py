"""Alarms in the order in which a page tells them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lipcore.report.source import Happened

#: Exact alarms, the worst first; their scores are not those of the others.
_EXACT = ("nonfinite", "unexplained_movement")
_COUNTS = "sample_ids"  # whose score counts samples, and which says nothing of the model
#: Kind of the event that the alarms' warning light has gone on, which is no alarm.
LIGHT = "warning light"
#: Kind of the event that names samples after an alarm.
SAMPLES = "samples after an alarm"


def worst_first(alarms: Iterable[Happened]) -> list[Happened]:
    """Return alarms by kind: values that are not finite, what the optimizer did not move, others, the samples' order;
    then by score, the largest first, but those of samples by step; one without a score before those that have one. In
    one step a loss that is not finite comes before parameters, which are on every rank what it made of them."""

    def rank(event: Happened) -> tuple[int, float, int, bool]:
        score, signal = event.data.get("score"), event.data.get("signal")
        if signal == _COUNTS:
            return len(_EXACT) + 1, 0.0, event.step, False
        kind = _EXACT.index(signal) if signal in _EXACT else len(_EXACT)
        later = signal == _EXACT[0] and event.data.get("place") != "total"
        return kind, -math.inf if score is None else -abs(float(score)), event.step, later

    return sorted(alarms, key=rank)


def is_unexplained(event: Happened) -> bool:
    """Say whether an event is the alarm of a parameter that moved by what its optimizer did not do."""
    return event.kind == "alarm" and event.data.get("signal") == "unexplained_movement"


def told(event: Happened) -> str:
    """Return an alarm's message without step, place and score, which stand beside it, and with the rank that it was
    heard of from."""
    return (event.text.partition(": ")[2] or event.text).partition(" (score ")[0] + heard_from(event)


def heard_from(event: Happened) -> str:
    """Return the words by which an alarm is told to be another rank's than the record's; "" where it is not."""
    rank = event.data.get("rank")
    return "" if rank is None else f" (told by rank {rank})"
