"""The path of a bias that the first layer does not have, in the place of one that Trajectory has followed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lipcore.lipschitz.virtual_bias import PREFIX, QUANTITIES
from lipcore.metric.results import MetricResult, Window


def with_virtual_bias(history: Iterable[Window], parameter: str) -> list[Window] | Iterable[Window]:
    """Return windows whose trajectory is that of the virtual bias of this name, where they have one
    (``Lipschitz(virtual_bias=True)``); others as they are.

    Raises:
        ValueError: that bias could not be followed, for the reason that is named.
    """
    if not isinstance(history, Iterable) or isinstance(history, Window):
        return [_with(history, parameter)] if isinstance(history, Window) else history
    return [_with(window, parameter) if isinstance(window, Window) else window for window in history]


def _with(window: Window, parameter: str) -> Window:
    lipschitz = window.results.get("lipschitz")
    if lipschitz is None or parameter not in lipschitz.get(f"{PREFIX}variance", ()):
        return window
    if f"{PREFIX}off" in lipschitz.details:
        trajectory = window.results.get("trajectory")
        if trajectory is not None and parameter in trajectory.get("variance", ()):
            return window
        raise ValueError(f"parameter: {parameter!r} was not followed: {lipschitz.details[f'{PREFIX}off']}")
    path = MetricResult("trajectory", every_steps=1)
    for name in QUANTITIES:
        path.add(name, parameter, "total", **lipschitz[f"{PREFIX}{name}"][parameter])
    return replace(window, results={**window.results, "trajectory": path})
