"""Corollary 2: how unsteadily the first bias moved, and what that says about the Lipschitz constants."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lipcore.metric.results import Value, Window, weakest
from lipcore.theory.arguments import per_step, positive
from lipcore.theory.finding import Finding
from lipcore.theory.literal_steps import LiteralSteps, has_sides, literal_steps, own_bias
from lipcore.theory.recorded_motion import CONTRADICTED, LITERAL, every_steps, known, unchecked
from lipcore.theory.training import joined
from lipcore.theory.virtual_bias import with_virtual_bias
from lipcore.theory.windows import select, span

_ZERO = "a loss gradient of 0 says nothing about lambda"
_ROUNDING = 1 + 1e-4  # of float32 parameters, whose motion is recorded as they are


@dataclass(frozen=True, repr=False)
class BiasVariance(Finding):
    """Result of :func:`bias_variance`: Corollary 2 over one window of n steps."""

    variance: Value  #: (1/(n+1)) sum ||b_t - mean||^2 over b_0 ... b_n; its note says where it is over fewer points
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
    r"""Evaluate Corollary 2 of Loukas et al. on the last of the windows: the variance of a parameter's trajectory, and
    its lower bounds by the parameter's steps and by Lipschitz constants.

    .. math:: \mathrm{Var} \ge \frac{n}{4(n+1)}\Big(\frac1n\sum_t\|b_t - b_{t-1}\|\Big)^2
              \ge \frac{n}{4(n+1)} \frac{(\alpha \bar\lambda / \sigma_1(W_1))^2}{\mathrm{avg}(1/\varepsilon_t^2)}

    The first bound holds for any optimizer. The second is for plain SGD at batch 1 with a constant rate, where a step
    of the first layer's own bias is :math:`\alpha\varepsilon_t r_t`; it needs eps. It is not valid, and its note says
    why, where the window shows another kind of step, and as heuristic as the lower side of Theorem 1 where W_1 moved.
    Both are 2 to 5 orders of magnitude loose. The printed form lacks the mean of :math:`1/\varepsilon^2`: no bound.

    Args:
        history: windows with a Trajectory metric (and a Lipschitz metric for the second bound). Both bounds are not
            valid for a sliding window that has lost its first block, nor with every_steps > 1, nor where weights were
            loaded between its steps.
        parameter: canonical name, "0.bias" say. Of a first layer without a bias: the name that it would have, in
            windows of ``Lipschitz(virtual_bias=True)``.
        learning_rate: constant over the window; default the one that was recorded for the first layer's bias.
        eps: |dl/dyhat| at each of the window's steps.

    Raises:
        ValueError: no window; the parameter is not in it; learning_rate or an eps is not positive (at eps = 0 a step
            says nothing about lambda: leave it out), or eps has another length than the window has steps; learning_rate
            is not the recorded one, or that was not constant within the window (and a rate or eps was given).
    """
    window = select(with_virtual_bias(history, parameter), "trajectory", first_step, last_step)[-1]
    moved, measured = known(window, "update_norm", parameter), known(window, "variance", parameter)
    step, variance = moved[parameter]["mean"], measured[parameter]["last"]
    if every_steps(window) > 1:
        variance = replace(variance, label="heuristic")
    steps, uneven = step.count, _other_points(window, step, variance)
    inverse = None if eps is None else _mean_inverse_square(eps, steps)
    rate = None if learning_rate is None else positive("learning_rate", learning_rate)
    found = literal_steps(window, parameter, "lower", place) if has_sides(window) else None
    why = "needs learning_rate"
    if found is not None and _changes(found, parameter, window) and rate is None and inverse is None:
        why = "the learning rate changed within the window"
    elif found is not None:
        rate = _constant_rate(rate, found, parameter, window)
    shrink = steps / (4 * (steps + 1))
    empty = "" if steps else "no step in the window"
    lower = Value(
        shrink * step.value**2,
        steps,
        weakest([step.label, "one-sided"]),
        step.valid and steps > 0 and not uneven,
        joined([uneven, step.note or empty]),
    )
    missing = Value(math.nan, 0, "one-sided", False, "needs learning_rate, eps and a Lipschitz metric")
    second = printed = missing
    if rate is not None and found is not None:
        number = shrink * (rate * found.side.value) ** 2
        printed = Value(number, found.side.count, "heuristic", found.side.valid, "lacks the mean of 1/eps^2; no bound")
        if inverse is not None:
            second = _second(number / inverse, lower, found, uneven, window.steps)
    scaled = Value(math.nan, 0, "exact", False, why)
    if rate is not None:
        scaled = Value(variance.value / rate**2, variance.count, variance.label, variance.valid, variance.note)
    return BiasVariance(variance, lower, second, printed, scaled, window.first_step, window.last_step)


def _other_points(window: Window, step: Value, variance: Value) -> str:
    """Say why the variance is not over b_0 ... b_n, the points before and after the window's n steps; "" where it
    is."""
    if every_steps(window) > 1:
        return f"the trajectory was looked at in {step.count} of {window.steps} steps: it takes every_steps=1"
    if step.count and variance.count != step.count + 1:
        return (
            f"the variance is over {variance.count} points, not the {step.count + 1} between which the steps lie: a "
            "sliding window's start is not among them; it takes windows that do not slide (window_blocks=1)"
        )
    if window["trajectory"].details.get("jumped"):
        return (
            "weights were changed between the window's steps by something else than a step (load_state_dict(), "
            "rebase()), so steps do not lie between the variance's points"
        )
    return ""


def _second(number: float, lower: Value, found: LiteralSteps, uneven: str, steps: int) -> Value:
    """Compute the bound by lambda. It cannot be above the one by the motion itself where the steps were as it
    assumes."""
    against = [*found.against, uneven]
    if not uneven and lower.count != steps:
        against.append(f"the parameter was finite in {lower.count} of {steps} steps only")
    if lower.valid and number > lower.value * _ROUNDING:
        against.append(CONTRADICTED)
    if not found.side.valid:
        against.append(found.side.note or "Theorem 1's lower side is not valid")
    label, reasons = weakest([found.side.label, "one-sided"]), joined(against)
    if reasons or not math.isfinite(number):
        return Value(number, found.side.count, label, False, reasons or "not finite")
    return Value(number, found.side.count, label, True, joined([LITERAL, *unchecked(found), found.side.note]))


def _changes(found: LiteralSteps, parameter: str, window: Window) -> bool:
    """Say whether the recorded rate changed within the window; it is the rate of the first layer's bias alone."""
    return own_bias(window) == parameter and found.learning_rate is not None and len(set(found.learning_rate)) > 1


def _constant_rate(given: float | None, found: LiteralSteps, parameter: str, window: Window) -> float | None:
    """Return the learning rate that was given or recorded; a record is of the first layer's bias alone."""
    if found.learning_rate is None or own_bias(window) != parameter:
        return given
    low, high = found.learning_rate
    if _changes(found, parameter, window):
        raise ValueError(
            f"learning_rate: Corollary 2 needs a constant one, but in {span(window)} it went from {low:.6g} to "
            f"{high:.6g}; choose a window in which it stays"
        )
    if given is not None and not math.isclose(given, low, rel_tol=1e-6):
        raise ValueError(
            f"learning_rate: got {given:.6g}, but the optimizer's was {low:.6g} in {span(window)}; leave it out to "
            "take that"
        )
    return low if low > 0 else given


def _mean_inverse_square(eps: Sequence[float] | Tensor, steps: int) -> float | None:
    """Return the mean of 1/eps^2, None for a window without steps."""
    values = per_step("eps", eps, steps, "the window", f"{_ZERO}; choose a window without it")
    return math.fsum(value**-2 for value in values) / len(values) if values else None
