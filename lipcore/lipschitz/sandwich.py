"""The two sides of Theorem 1 for one window, and which of them is a theorem."""

from __future__ import annotations

import math

from lipcore.lipschitz.singular_values import SingularValues
from lipcore.metric.results import Label, Value, weakest


def sandwich_sides(
    sigma: SingularValues, shape: tuple[int, ...], average: float, middle: float, count: int, label: Label, note: str
) -> dict[str, Value]:
    r"""Return the lower side :math:`\bar\lambda/\sigma_1`, the middle :math:`\bar r` and the upper side
    :math:`\bar\lambda/\sigma_{\min}` of Theorem 1.

    The lower side divides by what sigma_1 is certainly not above, so where sigma_1 was iterated it is somewhat smaller
    than the theorem's and labelled one-sided.

    Args:
        shape: of W_1, outputs first.
        average, middle: mean of lambda and of r over the same `count` samples.
        label, note: what these two are worth.
    """
    if sigma.smallest is None:
        upper, valid, why = math.nan, False, "the smallest singular value is not known"
    elif shape[0] > shape[1]:
        upper, valid, why = math.nan, False, "W_1 has more outputs than inputs: Theorem 1's upper side is false then"
    elif sigma.smallest == 0:
        upper, valid, why = math.inf, False, "W_1 is rank-deficient"
    else:
        upper, valid, why = average / sigma.smallest, True, note
    notes = [note] if note else []
    lower_label = label
    if math.isnan(sigma.upper):
        notes.append(sigma.rule)
    elif not sigma.upper:
        notes.append("W_1 is zero")
    elif not sigma.exact:
        lower_label = weakest([label, "one-sided"])
        notes.append(f"sigma_1 from above ({sigma.rule}; estimate {sigma.largest:.6g}, bound {sigma.upper:.6g})")
    lower = average / sigma.upper if sigma.upper else math.nan
    return {
        "lower": Value(lower, count, lower_label, sigma.upper > 0 and math.isfinite(lower), "; ".join(notes)),
        "middle": Value(middle, count, label, True, note),
        "upper": Value(upper, count, label, valid, why if not math.isnan(sigma.largest) else sigma.rule),
    }


def no_sides(middle: float, count: int, label: Label, note: str, layer: str) -> dict[str, Value]:
    """Return lower, middle and upper without a value for the two sides: W_1 is not on the model's input, so no theorem
    speaks of them."""
    why = f"Theorem 1 does not hold: what runs on the model's input is not W_1 x + b_1 of '{layer}' alone"
    side = Value(math.nan, count, label, False, why)
    return {"lower": side, "middle": Value(middle, count, label, True, note), "upper": side}
