"""Selection of those windows of a run that a statement is about."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from lipcore.metric.results import Quantity, Window

NEEDS = "it needs a Linear or convolution as first layer, a scalar output, and recorded samples with a lambda"


def select(history: Iterable[Window], metric: str, first_step: int | None, last_step: int | None) -> list[Window]:
    """Select the windows within [first_step, last_step], oldest first and without overlap: each step counts once.

    Of overlapping (sliding) windows the last one is kept and, going back from it, the next that ends before it began.
    ValueError when there is none, one stands there twice, or one has no such metric.
    """
    for name, step in (("first_step", first_step), ("last_step", last_step)):
        if step is not None and (not hasattr(step, "__index__") or isinstance(step, bool)):
            raise ValueError(f"{name}: expected a step (an integer) or None, got {step!r}")
    windows = sorted(checked(history), key=lambda window: (window.first_step, window.last_step))
    chosen = [
        window
        for window in windows
        if (first_step is None or window.first_step >= first_step)
        and (last_step is None or window.last_step <= last_step)
    ]
    if not chosen:
        seen = f"{windows[0].first_step} to {windows[-1].last_step}" if windows else "none: no window was closed yet"
        start = "the start" if first_step is None else first_step
        end = "the end" if last_step is None else last_step
        raise ValueError(
            f"history: no window lies within steps {start} to {end}; steps in it: {seen}. Close one with "
            "monitor.close_window()"
        )
    for window, following in pairwise(chosen):
        same = (window.first_step, window.last_step) == (following.first_step, following.last_step)
        if same:
            raise ValueError(
                f"history: {span(window)} stands in it twice; pass every window once, of one run (monitor.history)"
            )
    kept: list[Window] = []
    for window in reversed(chosen):
        if not kept or window.last_step < kept[-1].first_step:
            kept.append(window)
    for window in kept:
        if metric not in window:
            raise ValueError(f"history: {span(window)} has no metric {metric!r}; give the Monitor one (metrics=[...])")
    return kept[::-1]


def checked(history: Any) -> list[Window]:
    """Return windows as a list, or raise a TypeError that says what was given."""
    if isinstance(history, Window):
        return [history]
    expected = "history: expected windows of a Monitor (monitor.history)"
    if not isinstance(history, Iterable):
        hint = "; pass its history: monitor.history" if hasattr(history, "history") else ""
        raise TypeError(f"{expected}, got {history if history is None else f'a {type(history).__name__}'}{hint}")
    windows = list(history)
    for window in windows:
        if not isinstance(window, Window):
            raise TypeError(f"{expected}, got a {type(window).__name__} in it")
    return windows


def has_samples(window: Window, metric: str) -> bool:
    """Say whether a Lipschitz metric recorded a sample in the window, be it one whose r was infinite."""
    if metric not in window or "normalized_gradient_norm" not in window[metric]:
        return False
    counts = [row["mean"].count for row in window[metric]["normalized_gradient_norm"].values()]
    return any(counts) or window[metric].details.get("infinite_ratios", 0) > 0


def with_samples(windows: list[Window], metric: str) -> list[Window]:
    """Select the windows in which a Lipschitz metric recorded a sample; return all of them where none did, for an
    error to name."""
    return [window for window in windows if has_samples(window, metric)] or windows


def span(window: Window) -> str:
    """Name a window, in messages."""
    return f"the window of steps {window.first_step} to {window.last_step}"


def missing_steps(windows: list[Window], start: int | None = None) -> str:
    """List the steps that lie between the windows (and, from `start` on, before the first one) but in none of them;
    "" if there are none."""
    ends = [window.last_step for window in windows]
    starts = [window.first_step for window in windows]
    before = [*ends[:-1]] if start is None else [start - 1, *ends[:-1]]
    gaps = [
        f"{end + 1} to {first - 1}"
        for end, first in zip(before, starts[1:] if start is None else starts, strict=True)
        if first > end + 1
    ]
    return f"steps {', '.join(gaps)} are in no window" if gaps else ""


def one_place(quantity: Quantity, place: str | None) -> str:
    """Return the place that was asked for, or the only one."""
    places = list(quantity)
    if place is None:
        if len(places) == 1:
            return places[0]
        raise ValueError(f"place: {quantity.name} has several; choose one of {places}")
    if place not in places:
        raise ValueError(f"place: {quantity.name} has no place {place!r}; expected one of {places}")
    return place


def quantity(window: Window, metric: str, name: str, why: str) -> Quantity:
    """Return a quantity that a statement needs, or raise a ValueError that says why it may be missing."""
    if name not in window[metric]:
        raise ValueError(f"history: {metric} has no {name} in {span(window)}: {why}")
    return window[metric][name]
