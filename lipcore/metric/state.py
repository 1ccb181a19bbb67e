"""Checks of a saved state against what is expected, before anything is taken over."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor


def check_like(path: str, theirs: Any, mine: Any) -> None:
    """ValueError naming the first place where `theirs` is of another shape, dtype, type or structure than `mine`."""
    if isinstance(mine, dict):
        if not isinstance(theirs, dict):
            raise ValueError(f"{path}: expected a dict, got {type(theirs).__name__}")
        for key in mine:
            if key not in theirs:
                raise ValueError(f"{path}: {key!r} is missing")
        for key in theirs:
            if key not in mine:
                raise ValueError(f"{path}: {key!r} is not known here")
        for key in mine:
            check_like(f"{path}.{key}" if path else str(key), theirs[key], mine[key])
    elif isinstance(mine, Tensor):
        if not isinstance(theirs, Tensor) or theirs.shape != mine.shape or theirs.dtype != mine.dtype:
            what = f"{theirs.dtype} {list(theirs.shape)}" if isinstance(theirs, Tensor) else type(theirs).__name__
            raise ValueError(f"{path}: expected {mine.dtype} {list(mine.shape)}, got {what}")
    elif isinstance(mine, list):
        if not isinstance(theirs, list) or len(theirs) != len(mine):
            what = f"{len(theirs)}" if isinstance(theirs, list) else type(theirs).__name__
            raise ValueError(f"{path}: expected a list of {len(mine)}, got {what}")
        for i, (their, my) in enumerate(zip(theirs, mine, strict=True)):
            check_like(f"{path}[{i}]", their, my)
    elif isinstance(mine, int) and not isinstance(mine, bool):
        if not isinstance(theirs, int) or isinstance(theirs, bool) or theirs < 0:
            raise ValueError(f"{path}: expected a count >= 0, got {theirs!r}")
    elif type(theirs) is not type(mine):
        raise ValueError(f"{path}: expected {type(mine).__name__}, got {type(theirs).__name__}")


def check_same(state: Any, mine: dict[str, Any]) -> None:
    """ValueError naming the first of these settings in which the state differs."""
    if not isinstance(state, dict):
        raise ValueError(f"state: expected a dict, got {type(state).__name__}")
    for key, value in mine.items():
        if key not in state:
            raise ValueError(f"{key}: missing from the trajectory state")
        if state[key] != value:
            raise ValueError(f"{key}: the state has {_shorten(state[key])}, this trajectory has {_shorten(value)}")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def checked_starts(state: Any, version: int, metrics: list[str], blocks: int) -> list[int]:
    """Return the step before every block of the open window; ValueError naming the first key that does not fit an
    engine of this version with these metrics and at most so many blocks a window."""
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
