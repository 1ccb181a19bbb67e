"""Runs at equal training loss: what their windows say where the loss first came down to a level."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lipcore.metric.results import Value, Window
from lipcore.metric.values import weakest
from lipcore.theory.arguments import positive
from lipcore.theory.falling import first_at, smoothed
from lipcore.theory.finding import Finding
from lipcore.theory.training import joined
from lipcore.theory.windows import checked, one_place, quantity, select, span


@dataclass(frozen=True, repr=False)
class AtLoss(Finding):
    """Result of :func:`at_loss`: the point of a run at which its training loss first came down to a level."""

    level: float
    #: Interpolated between the last steps of two windows: an estimate. Not valid where the level was not reached, or is
    #: above the loss of the first window.
    step: Value
    before: Window | None  #: the window before it; None where the loss was as low in the first one
    window: Window | None  #: the first window whose loss is at most the level; None where there is none
    share: float  #: how far from `before` to `window` the level lies, from 0 to 1

    def number(self, name: str, place: str | None = None) -> Value:
        """Return a number of the windows at this point, interpolated between the two around it.

        Args:
            name: "metric/quantity.reducer", as in a record: "trajectory/path_length.cumulative".
            place: default "total", or the only one.

        Returns:
            an estimate at best; not valid where the loss did not come down to the level, and then NaN, or where it was
            below it in the first window already, and then that of the window.

        Raises:
            ValueError: a window has no such number.
        """
        if self.window is None:
            return Value(math.nan, 0, "estimate", False, self.step.note)
        last = _number(self.window, name, place)
        if self.before is None:
            label, valid = weakest([last.label, "estimate"]), last.valid and self.step.valid
            return Value(last.value, last.count, label, valid, joined([last.note, self.step.note]))
        first = _number(self.before, name, place)
        return Value(
            first.value + self.share * (last.value - first.value),
            last.count,
            weakest([first.label, last.label, "estimate"]),
            first.valid and last.valid,
            joined([first.note, last.note]),
        )

    def __repr__(self) -> str:
        step = self.step
        worth = f"not valid: {step.note}" if not step.valid else f"estimate{step.note and f' ({step.note})'}"
        return f"{type(self).__name__}\n  level  {self.level:>12.6g}\n  step   {step.value:>12.6g}  {worth}"


def at_loss(history: Iterable[Window], level: float) -> AtLoss:
    r"""Find where the training loss of a run first came down to a level: the point at which runs of different speed can
    be compared.

    The loss is that of ``monitor.log(loss=...)``, as its mean over each window; of 200 windows or more, over a
    hundredth of them. Between the two windows around the level numbers are interpolated linearly in the loss.

    Args:
        history: windows of one Monitor, ``monitor.history`` or ``lipcore.open_run(...).windows``.
        level: of the loss, above 0.

    Raises:
        ValueError: no window has a loss, or the level is no positive number.

    >>> import torch, lipcore
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with lipcore.Monitor(model, optimizer, window_steps=5) as monitor:
    ...     for _ in range(50):
    ...         loss = (model(torch.ones(1, 1)) - 3).square().mean()
    ...         monitor.log(loss=loss)
    ...         loss.backward(); optimizer.step(); optimizer.zero_grad()
    >>> found = at_loss(monitor.history, 0.1)
    >>> found.window.first_step <= found.step.value <= found.window.last_step
    True
    >>> found.number("trajectory/distance.last").valid
    True
    """
    positive("level", level)
    windows = [window for window in checked(history) if "logged" in window and "loss" in window["logged"]]
    if not windows:
        raise ValueError(
            "history: no window has a training loss; call monitor.log(loss=loss) in the loop, before optimizer.step()"
        )
    windows = [window for window in select(windows, "logged", None, None) if _loss(window).valid]
    losses = smoothed(np.array([_loss(window).value for window in windows]))
    at = first_at(losses, level)
    if at is None:
        low = f"its lowest is {losses.min():.6g}" if len(losses) else "none is finite"
        missing = Value(math.nan, 0, "estimate", False, f"the loss did not come down to {float(level):g}: {low}")
        return AtLoss(float(level), missing, windows[-1] if windows else None, None, math.nan)
    last = windows[at]
    if at == 0:
        above = bool(losses[0] < level)
        how = f"below {float(level):g}" if above else "as low"
        note = f"the loss was {how} in {span(last)} already, the first that there is"
        return AtLoss(float(level), Value(float(last.last_step), 1, "estimate", not above, note), None, last, 1.0)
    share = float((losses[at - 1] - level) / (losses[at - 1] - losses[at]))
    first = windows[at - 1]
    step = first.last_step + share * (last.last_step - first.last_step)
    return AtLoss(float(level), Value(step, 2, "estimate"), first, last, share)


def _loss(window: Window) -> Value:
    return window["logged"]["loss"]["total"]["mean"]


def _number(window: Window, name: str, place: str | None) -> Value:
    metric, _, rest = name.partition("/") if isinstance(name, str) else ("", "", "")
    name_, _, reducer = rest.rpartition(".")
    if not name_:
        raise ValueError(f'name: expected "metric/quantity.reducer", such as "trajectory/distance.last", got {name!r}')
    if metric not in window:
        raise ValueError(f"name: there is no metric {metric!r} in {span(window)}; it has {', '.join(window)}")
    found = quantity(window, metric, name_, f"it has {', '.join(window[metric])}")
    row = found[one_place(found, place or ("total" if "total" in list(found) else None))]
    if reducer not in row:
        raise ValueError(f"name: {name_} has no {reducer!r}; expected one of {', '.join(row)}")
    return row[reducer]
