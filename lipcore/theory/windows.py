"""The windows of a run that a statement is about."""

from __future__ import annotations

from collections.abc import Iterable

from lipcore.results import MetricResult, Quantity, Window


def select(history: Iterable[Window], metric: str, first_step: int | None, last_step: int | None) -> list[Window]:
    """The windows within [first_step, last_step], oldest first; ValueError when there is none, or not this metric."""
    if isinstance(history, Window):
        history = [history]
    windows = list(history)
    for window in windows:
        if not isinstance(window, Window):
            raise TypeError(
                f"history: expected windows of a Monitor (monitor.history), got a {type(window).__name__} in it"
            )
    chosen = [
        window
        for window in windows
        if (first_step is None or window.first_step >= first_step)
        and (last_step is None or window.last_step <= last_step)
    ]
    if not chosen:
        seen = f"{windows[0].first_step} to {windows[-1].last_step}" if windows else "none: no window was closed yet"
        raise ValueError(
            f"history: no window lies within steps {first_step or 'the start'} to {last_step or 'the end'}; steps in "
            f"it: {seen}. Close one with monitor.close_window()"
        )
    for window in chosen:
        if metric not in window:
            raise ValueError(
                f"history: the window of steps {window.first_step} to {window.last_step} has no metric {metric!r}; "
                "give the Monitor one (metrics=[...])"
            )
    return chosen


def one_place(quantity: Quantity, place: str | None) -> str:
    """The place that was asked for, or the only one."""
    places = list(quantity)
    if place is None:
        if len(places) == 1:
            return places[0]
        raise ValueError(f"place: {quantity.name} has several; choose one of {places}")
    if place not in quantity:
        raise ValueError(f"place: {quantity.name} has no place {place!r}; expected one of {places}")
    return place


def quantity(result: MetricResult, name: str, why: str) -> Quantity:
    """A quantity that a statement needs; ValueError saying why it may be missing."""
    if name not in result:
        raise ValueError(f"history: {result.metric} has no {name}: {why}")
    return result[name]
