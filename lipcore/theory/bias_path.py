"""Corollary 3: how far the first bias went, and what bounds that by the Lipschitz constants."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lipcore.metric.results import Value, Window, weakest
from lipcore.theory.arguments import per_step, positive
from lipcore.theory.finding import Finding
from lipcore.theory.literal_steps import LiteralSteps, has_sides, literal_steps, own_bias
from lipcore.theory.recorded_motion import CONTRADICTED, LITERAL, apart, known, unchecked
from lipcore.theory.training import joined
from lipcore.theory.virtual_bias import with_virtual_bias
from lipcore.theory.windows import NEEDS, missing_steps, select, span

_ROUNDING = 1 - 1e-4  # of float32 parameters, whose motion is recorded as they are
_NO_METRIC = "needs a Lipschitz metric in every window"
_NO_SIDES = f"needs the sides of Theorem 1, which a window lacks: {NEEDS}"
_NO_EPS = "needs eps_max"


@dataclass(frozen=True, repr=False)
class BiasDistance(Finding):
    """Result of :func:`bias_distance`: how far a parameter went from its reference, and how straight (Corollary 3)."""

    distance: Value  #: ||b - b_0||
    length: Value  #: sum of ||b_t - b_{t-1}||
    directness: Value  #: distance / length, 1 for a straight line
    bound: Value  #: sum over steps of lr eps_max mean(lambda) / sigma_min; not valid without both, or for n_1 > n


def bias_distance(
    history: Iterable[Window],
    parameter: str,
    *,
    learning_rate: float | Sequence[float] | Tensor | None = None,
    eps_max: float | None = None,
    last_step: int | None = None,
    place: str | None = None,
) -> BiasDistance:
    r"""Evaluate Corollary 3 of Loukas et al.: :math:`\|b_\tau - b_0\| \le \sum_t
    \alpha_t\,\varepsilon_{\max}\,\bar\lambda_t / \sigma_{\min}(W_1)`.

    For plain SGD at batch 1 and squared error, the first layer's own bias and all windows from step 1 on; the same
    condition as the upper side of Theorem 1 (n_1 <= n, full rank). The bound is not valid, and its note says why, where
    the windows show something else, and heuristic where W_1 moved. Where the learning rate changed within a window, its
    largest counts for all of the window's steps. Distance, length and directness hold for any training; bound and
    directness are not valid where the distance is not along the path (another reference, weights loaded since).

    Args:
        history: windows with a Trajectory metric (and a Lipschitz metric for the bound), from the start of training on.
        parameter: canonical name, "0.bias" say. Of a first layer without a bias: the name that it would have, in
            windows of ``Lipschitz(virtual_bias=True)``.
        learning_rate: a number, or one for each step; default what was recorded for the first layer's bias.
        eps_max: largest |dl/dyhat| of all steps.

    Raises:
        ValueError: no window; the parameter is not in it; learning_rate or eps_max is not positive, or there are more
            or fewer rates than steps; the rates are not the recorded ones.
    """
    windows = select(with_virtual_bias(history, parameter), "trajectory", None, last_step)
    last = windows[-1]
    distance = known(last, "distance", parameter)[parameter]["last"]
    length = known(last, "path_length", parameter)[parameter]["cumulative"]
    directness = known(last, "directness", parameter)[parameter]["last"]
    elsewhere = apart(last)
    if elsewhere:
        directness = replace(directness, valid=False, note=elsewhere)
    given = _given_rates(learning_rate, windows)
    largest = None if eps_max is None else positive("eps_max", eps_max)
    bound, missing = None, [] if largest is not None else [_NO_EPS]
    if all(has_sides(window) for window in windows):
        found = [literal_steps(window, parameter, "upper", place) for window in windows]
        rates = [_rate(*row, parameter) for row in zip(windows, found, given, strict=True)]
        if None in rates:
            missing.append(f"needs learning_rate: that of {parameter} was not recorded in every step")
            missing += [reason for row in found for reason in row.against]
        elif largest is not None:
            total = math.fsum(
                (rate or 0.0) * row.side.value * window.steps
                for rate, row, window in zip(rates, found, windows, strict=True)
            )
            bound = _bound(largest * total, found, windows, length, elsewhere)
    else:
        missing.append(_NO_SIDES if all("lipschitz" in window.results for window in windows) else _NO_METRIC)
    if bound is None:
        bound = Value(math.nan, 0, "one-sided", False, joined(missing))
    return BiasDistance(distance, length, directness, bound)


def _bound(number: float, found: list[LiteralSteps], windows: list[Window], length: Value, elsewhere: str) -> Value:
    """Make the bound a Value with its label and note. It bounds the path's length too, so a longer path says that
    the steps were not as the corollary assumes."""
    sides = [row.side for row in found]
    against = [reason for row in found for reason in row.against]
    against += [side.note or "Theorem 1's upper side is not valid" for side in sides if not side.valid]
    against += [missing_steps(windows, start=1), elsewhere]
    if length.valid and number < length.value * _ROUNDING:
        against.append(CONTRADICTED)
    label = weakest([*(side.label for side in sides), "one-sided"])
    count, reasons = sum(side.count for side in sides), joined(against)
    if reasons or not math.isfinite(number):
        return Value(number, count, label, False, reasons or "not finite")
    notes = [f"squared error; {LITERAL}", *(note for row in found for note in unchecked(row))]
    return Value(number, count, label, True, joined([*notes, *(side.note for side in sides)]))


def _given_rates(given: float | Sequence[float] | Tensor | None, windows: list[Window]) -> list[list[float] | None]:
    """Return for each window the rates of its steps, one rate that holds for all of them, or None."""
    if given is None:
        return [None] * len(windows)
    single = isinstance(given, Tensor) and not given.dim()
    if isinstance(given, (str, bool)) or single or not hasattr(given, "__len__"):
        return [[positive("learning_rate", given)]] * len(windows)
    steps = sum(window.steps for window in windows)
    values, start, out = per_step("learning_rate", given, steps, "the history", zero=True), 0, []
    for window in windows:
        out.append(values[start : start + window.steps])
        start += window.steps
    return list(out)


def _rate(window: Window, found: LiteralSteps, given: list[float] | None, parameter: str) -> float | None:
    """Return the largest learning rate of the window; a record is of the first layer's bias alone."""
    recorded = found.learning_rate
    if parameter != own_bias(window):
        recorded = None
    if given is None:
        return None if recorded is None else recorded[1]
    low, high = min(given), max(given)
    if recorded is not None and not all(
        math.isclose(mine, theirs, rel_tol=1e-6) for mine, theirs in zip((low, high), recorded, strict=True)
    ):
        theirs = f"{recorded[0]:.6g}" if recorded[0] == recorded[1] else f"{recorded[0]:.6g} to {recorded[1]:.6g}"
        mine = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
        raise ValueError(
            f"learning_rate: got {mine}, but the optimizer's was {theirs} in {span(window)}; pass one value per step, "
            "or leave it out to take what was recorded"
        )
    return high
