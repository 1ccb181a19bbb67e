"""Checks of a saved state against what is expected, before anything is taken over.

Every check raises a ValueError that begins with the path of the first key that does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

MOST = 2**53  #: Above, float64 counts no steps one by one.


def check_version(state: Any, version: int, whose: str) -> None:
    """Raise unless the state is a dict of this version; `whose`: "metric", "monitor", "one"."""
    if not isinstance(state, dict):
        raise ValueError(f"state: expected a dict, got {type(state).__name__}")
    found = state.get("version")
    if type(found) is not int or found != version:  # True is no version
        of = ""
        if type(found) is int:
            of = f"; a{' newer' if found > version else 'n older'} lipcore has saved it, and that one loads it"
        raise ValueError(f"version: the state has {found!r}, this {whose} has {version!r}{of}")


def is_count(value: Any) -> bool:
    """Return whether a value of a state is a count: an integer from 0 to 2^53, and no bool."""
    return type(value) is int and 0 <= value <= MOST


def checked_count(state: dict[str, Any], key: str) -> int:
    """Return the count under this key."""
    value = state.get(key)
    if not is_count(value):
        raise ValueError(f"{key}: expected a count from 0 to 2**53, got {value!r}")
    return int(value)  # type: ignore[arg-type]


def checked_tensor(path: str, value: Any, dtype: torch.dtype, shape: tuple[int | None, ...]) -> Tensor:
    """Return a tensor of this dtype and shape (None: any length) on the CPU; it must hold data and be no part of a
    graph."""
    expected = f"{dtype} [{', '.join('*' if size is None else str(size) for size in shape)}]"
    if not isinstance(value, Tensor):
        raise ValueError(f"{path}: expected {expected}, got {type(value).__name__}")
    trouble = trouble_of(value)
    if trouble:
        raise ValueError(f"{path}: expected {expected}, got a tensor that {trouble}")
    fits = value.dim() == len(shape) and all(want in (None, got) for want, got in zip(shape, value.shape, strict=True))
    if value.dtype != dtype or not fits:
        raise ValueError(f"{path}: expected {expected}, got {value.dtype} {list(value.shape)}")
    return value.cpu()


@contextmanager
def under_key(key: str) -> Iterator[None]:
    """Put the key of a part of a state before what that part's check raises."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from None


def trouble_of(tensor: Tensor) -> str:
    """Say why a tensor cannot be part of a state, "" where it can."""
    if tensor.layout != torch.strided:
        return f"is sparse ({tensor.layout})"
    if tensor.is_meta:
        return "is on the meta device and has no data"
    return "requires grad" if tensor.requires_grad else ""


def check_like(path: str, theirs: Any, mine: Any) -> None:
    """Raise ValueError naming the first key where `theirs` is of another shape, dtype, type or structure than
    `mine`."""
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
        trouble = trouble_of(theirs) if isinstance(theirs, Tensor) else ""
        if trouble:
            raise ValueError(f"{path}: expected {mine.dtype} {list(mine.shape)}, got a tensor that {trouble}")
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
        if not is_count(theirs):
            raise ValueError(f"{path}: expected a count >= 0, got {theirs!r}")
    elif type(theirs) is not type(mine):
        raise ValueError(f"{path}: expected {type(mine).__name__}, got {type(theirs).__name__}")


def check_same(state: Any, mine: dict[str, Any]) -> None:
    """Raise ValueError naming the first of these settings in which the state differs."""
    if not isinstance(state, dict):
        raise ValueError(f"state: expected a dict, got {type(state).__name__}")
    for key, value in mine.items():
        if key not in state:
            raise ValueError(f"{key}: missing from the metric's state")
        if key == "version":
            check_version(state, value, "metric")
        if state[key] != value or isinstance(state[key], bool) != isinstance(value, bool):  # True is not 1
            raise ValueError(f"{key}: the state has {_shorten(state[key])}, this metric has {_shorten(value)}")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def checked_steps(state: Any) -> list[tuple[int, int]]:
    """Return first and last steps of windows; ValueError where they are none."""
    found = state if isinstance(state, list) else [state]
    for each in found:
        if not isinstance(each, (list, tuple)) or len(each) != 2 or not all(map(is_count, each)):
            raise ValueError(f"waiting: expected the first and the last step of windows, got {state!r:.80}")
    return [(first, last) for first, last in found]


def checked_lacking(entries: list[dict[str, Any]]) -> dict[str, tuple[int, str]] | None:
    """Return which metrics lack samples up to which step, and why, as the ranks that one goes on from have saved it;
    None where none of them says so: an earlier lipcore has saved them. ValueError where a value is no such thing."""
    said = [entry["lacking"] for entry in entries if "lacking" in entry]
    found: dict[str, tuple[int, str]] = {}
    for each in said:
        if not isinstance(each, dict):
            raise ValueError(f"lacking: expected a step and a reason by metric, got {each!r:.80}")
        for name, value in each.items():
            fits = isinstance(value, (list, tuple)) and len(value) == 2
            if not fits or not is_count(value[0]) or not isinstance(value[1], str):
                raise ValueError(f"lacking.{name}: expected a step and a reason, got {value!r:.80}")
            if value[0] > found.get(str(name), (0, ""))[0]:
                found[str(name)] = value[0], value[1]
    return found if said else None


def checked_starts(state: Any, version: int, blocks: int) -> list[int]:
    """Return the step before every block of the open window; ValueError naming the first key that does not fit an
    engine of this version with at most so many blocks a window."""
    if not isinstance(state, dict):
        raise ValueError(f"state: expected a dict, got {type(state).__name__}")
    if "version" in state:  # another one may have other keys
        check_version(state, version, "monitor")
    for key in ("version", "step", "windows", "starts", "alike", "copies", "ranks"):
        if key not in state:
            raise ValueError(f"{key}: missing from the monitor's state")
    for key in ("step", "windows"):
        if not is_count(state[key]):
            raise ValueError(f"{key}: expected a count >= 0, got {state[key]!r}")
    starts = state["starts"]
    if not isinstance(starts, list) or not 1 <= len(starts) <= blocks or not all(map(_is_start, starts)):
        raise ValueError(f"starts: expected [step, unrecorded] of 1 to {blocks} blocks, got {starts!r}")
    steps = [step for step, _ in starts]
    if any(earlier > later for earlier, later in pairwise([*steps, state["step"]])):
        raise ValueError(f"starts: blocks begin after steps {steps}, but the state is of step {state['step']}")
    return steps


def _is_start(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and is_count(value[0])
