"""Checks of a Monitor's own part of a saved state, before anything is taken over."""

from __future__ import annotations

from itertools import pairwise
from typing import Any


def checked_starts(state: Any, version: int, metrics: list[str], blocks: int) -> list[int]:
    """The step before every block of the open window; ValueError naming the first key that does not fit a Monitor of
    this version with these metrics and at most so many blocks a window."""
    if not isinstance(state, dict):
        raise ValueError(f"state: expected a dict, got {type(state).__name__}")
    for key in ("version", "step", "windows", "starts", "metrics"):
        if key not in state:
            raise ValueError(f"{key}: missing from the monitor's state")
    if state["version"] != version:
        raise ValueError(f"version: the state has {state['version']!r}, this monitor has {version}")
    for key in ("step", "windows"):
        if not _is_count(state[key]):
            raise ValueError(f"{key}: expected a count >= 0, got {state[key]!r}")
    theirs = state["metrics"]
    if not isinstance(theirs, dict) or sorted(map(str, theirs)) != metrics:
        what = sorted(map(str, theirs)) if isinstance(theirs, dict) else type(theirs).__name__
        raise ValueError(f"metrics: the state has {what}, this monitor has {metrics}")
    starts = state["starts"]
    if not isinstance(starts, list) or not 1 <= len(starts) <= blocks or not all(map(_is_start, starts)):
        raise ValueError(f"starts: expected [step, unrecorded] of 1 to {blocks} blocks, got {starts!r}")
    steps = [step for step, _ in starts]
    if any(earlier > later for earlier, later in pairwise([*steps, state["step"]])):
        raise ValueError(f"starts: blocks begin after steps {steps}, but the state is of step {state['step']}")
    return steps


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_start(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and _is_count(value[0])
