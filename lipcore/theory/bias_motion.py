"""Corollaries 2 and 3: how far and how unsteadily the first bias moved, against the Lipschitz constants."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lipcore.results import Value, Window
from lipcore.theory.finding import Finding
from lipcore.theory.windows import quantity, select

_LITERAL = "literal for plain SGD at batch 1 with this constant learning rate"


@dataclass(frozen=True, repr=False)
class BiasVariance(Finding):
    """Corollary 2 over one window of n steps."""

    variance: Value  #: (1/(n+1)) sum ||b_t - mean||^2 over the points b_0 ... b_n
    lower: Value  #: n/(4(n+1)) (mean ||b_t - b_{t-1}||)^2: always a lower bound
    lower_lipschitz: Value  #: n/(4(n+1)) (lr mean(lambda)/sigma_1)^2 / mean(1/eps^2); not valid without eps
    printed: Value  #: the same without the mean of 1/eps^2, as printed in the paper; not a bound
    variance_over_lr_sq: Value  #: variance / lr^2, the form of the paper's figures; not valid without learning_rate
    first_step: int
    last_step: int


def bias_variance(
    history: Iterable[Window],
    parameter: str,
    *,
    learning_rate: float | None = None,
    eps: Sequence[float] | Tensor | None = None,
    first_step: int | None = None,
    last_step: int | None = None,
    place: str | None = None,
) -> BiasVariance:
    r"""Corollary 2 of Loukas et al., over the last of the windows: the variance of a parameter's trajectory and what it
    says about Lipschitz constants.

    .. math:: \mathrm{Var} \ge \frac{n}{4(n+1)}\Big(\frac1n\sum_t\|b_t - b_{t-1}\|\Big)^2
              \ge \frac{n}{4(n+1)} \frac{(\alpha \bar\lambda / \sigma_1(W_1))^2}{\mathrm{avg}(1/\varepsilon_t^2)}

    The first bound holds for any optimizer. The second is for plain SGD at batch 1, where a step is
    :math:`\alpha\varepsilon_t r_t`; it needs learning_rate and eps. Both are 2 to 5 orders of magnitude loose. The
    printed form lacks the mean of :math:`1/\varepsilon^2` and is no bound.

    Args:
        history: windows with a Trajectory metric (and a Lipschitz metric for the second bound); resetting windows.
        parameter: canonical name, "0.bias" say.
        learning_rate: constant over the window.
        eps: |dl/dyhat| at each of the window's steps.

    Raises:
        ValueError: no window; the parameter is not in it; learning_rate or an eps is not positive (at eps = 0 a step
            says nothing about lambda: leave it out), or eps has another length than the window has steps.
    """
    window = select(history, "trajectory", first_step, last_step)[-1]
    result = window["trajectory"]
    why = "Trajectory takes it in mode='exact' by default (stats=)"
    moved, measured = quantity(result, "update_norm", why), quantity(result, "variance", why)
    for known in (moved, measured):
        if parameter not in known:
            raise ValueError(f"parameter: {known.name} has no {parameter!r}; expected one of {list(known)[:12]}")
    steps, variance = moved[parameter]["mean"].count, measured[parameter]["last"]
    if learning_rate is not None and not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate: expected a positive number, got {learning_rate!r}")
    shrink = steps / (4 * (steps + 1))
    lower = Value(shrink * moved[parameter]["mean"].value ** 2, steps, "one-sided")
    missing = Value(math.nan, 0, "one-sided", False, "needs learning_rate, eps and a Lipschitz metric")
    second = printed = missing
    side = _lower_side(window, place)
    if learning_rate is not None and side is not None:
        number = shrink * (learning_rate * side.value) ** 2
        printed = Value(number, side.count, "heuristic", True, "lacks the mean of 1/eps^2; no bound")
        if eps is not None:
            second = Value(number / _mean_inverse_square(eps, steps), side.count, "one-sided", True, _LITERAL)
    scaled = Value(math.nan, 0, "exact", False, "needs learning_rate")
    if learning_rate is not None:
        scaled = Value(variance.value / learning_rate**2, variance.count, variance.label, variance.valid)
    return BiasVariance(variance, lower, second, printed, scaled, window.first_step, window.last_step)


def _lower_side(window: Window, place: str | None) -> Value | None:
    if "lipschitz" not in window or "sandwich" not in window["lipschitz"]:
        return None
    sides = window["lipschitz"]["sandwich"]
    return sides[place if place is not None else next(iter(sides))]["lower"]


def _mean_inverse_square(eps: Sequence[float] | Tensor, steps: int) -> float:
    values = [float(value) for value in eps]
    if len(values) != steps:
        raise ValueError(f"eps: expected one value for each of the window's {steps} steps, got {len(values)}")
    bad = [i for i, value in enumerate(values) if not (value > 0 and math.isfinite(value))]
    if bad:
        raise ValueError(
            f"eps: expected positive numbers, got {values[bad[0]]} at step {bad[0]} of the window (a loss gradient "
            "of 0 says nothing about lambda; choose a window without it)"
        )
    return math.fsum(value**-2 for value in values) / len(values)


@dataclass(frozen=True, repr=False)
class BiasDistance(Finding):
    """Corollary 3: how far a parameter went from its reference."""

    distance: Value  #: ||b - b_0||
    length: Value  #: sum of ||b_t - b_{t-1}||
    directness: Value  #: distance / length, 1 for a straight line
    bound: Value  #: sum over steps of lr eps_max mean(lambda) / sigma_min; not valid without both, or for n_1 > n


def bias_distance(
    history: Iterable[Window],
    parameter: str,
    *,
    learning_rate: float | None = None,
    eps_max: float | None = None,
    last_step: int | None = None,
    place: str | None = None,
) -> BiasDistance:
    r"""Corollary 3 of Loukas et al.:
    :math:`\|b_\tau - b_0\| \le \sum_t \alpha_t\,\varepsilon_{\max}\,\bar\lambda_t / \sigma_{\min}(W_1)`.

    For plain SGD at batch 1 and squared error, all windows from the start; the same condition as the upper side of
    Theorem 1 (n_1 <= n, full rank). Distance, length and directness hold for any training.

    Raises:
        ValueError: no window; the parameter is not in it; learning_rate or eps_max is not positive.
    """
    windows = select(history, "trajectory", None, last_step)
    result = windows[-1]["trajectory"]
    why = "Trajectory takes it in mode='exact' by default (stats=)"
    distance = quantity(result, "distance", why)
    if parameter not in distance:
        raise ValueError(f"parameter: distance has no {parameter!r}; expected one of {list(distance)[:12]}")
    for name, number in (("learning_rate", learning_rate), ("eps_max", eps_max)):
        if number is not None and not (number > 0 and math.isfinite(number)):
            raise ValueError(f"{name}: expected a positive number, got {number!r}")
    length = quantity(result, "path_length", why)[parameter]["cumulative"]
    directness = quantity(result, "directness", why)[parameter]["last"]
    bound = Value(math.nan, 0, "one-sided", False, "needs learning_rate, eps_max and a Lipschitz metric")
    sides = [window["lipschitz"]["sandwich"] for window in windows if "sandwich" in window.results.get("lipschitz", ())]
    if learning_rate is not None and eps_max is not None and len(sides) == len(windows):
        uppers = [side[place if place is not None else next(iter(side))]["upper"] for side in sides]
        total = math.fsum(upper.value * window.steps for upper, window in zip(uppers, windows, strict=True))
        complete = windows[0].first_step == 1
        notes = {upper.note for upper in uppers if not upper.valid}
        notes |= set() if complete else {"windows before the first one kept are missing (history_limit)"}
        valid = complete and all(upper.valid for upper in uppers)
        note = "; ".join(sorted(notes)) if notes else f"squared error; {_LITERAL}"
        bound = Value(learning_rate * eps_max * total, sum(u.count for u in uppers), "one-sided", valid, note)
    return BiasDistance(distance[parameter]["last"], length, directness, bound)
