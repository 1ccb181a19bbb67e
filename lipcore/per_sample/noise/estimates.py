"""From a window's sums of |G|^2 and tr(Sigma) to means, their ratio, and intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lipcore.metric.results import Value
from lipcore.per_sample.noise.student_t import t_quantile

FEWEST = 8  # blocks that have a standard error worth stating

Numbers = np.ndarray[Any, np.dtype[np.float64]]


def reduced(sums: Numbers, ema: Numbers, steps: int, skipped: int, confidence: float) -> dict[str, dict[str, Value]]:
    """All quantities of one place, from its blocks [blocks, 3] and its exponential averages [4]."""
    sums = sums[sums[:, 0] > 0]
    count, blocks = int(sums[:, 0].sum()), len(sums)
    weight, seen = ema[0], int(ema[3])
    # Fourth powers are taken below, and must neither underflow nor overflow.
    scale = 2.0 ** (math.frexp(float(np.abs(sums[:, 1:]).max(initial=0)))[1] - 1)
    sums = sums / np.array([1.0, scale, scale])
    signal, noise = sums[:, 1:].sum(0) / count if count else (math.nan, math.nan)
    covariance, t = np.full((2, 2), math.nan), math.nan
    if blocks >= FEWEST:
        residuals = sums[:, 1:] - sums[:, :1] * np.array([signal, noise])
        covariance = residuals.T @ residuals * (blocks / (blocks - 1)) / count**2
        t = t_quantile(confidence, blocks - 1)
    ema_signal, ema_noise = ema[1:3] / weight if seen else (math.nan, math.nan)
    why = "" if blocks >= FEWEST else f"no interval below {FEWEST} steps"
    out = {}
    for name, i, mean, average in (("gradient_sq", 0, signal, ema_signal), ("gradient_noise", 1, noise, ema_noise)):
        error = math.sqrt(covariance[i, i])
        ends = (mean - t * error) * scale, (mean + t * error) * scale
        out[name] = _values(mean * scale, error * scale, ends, average, count, seen, why)
    ratio, average = (_ratio(*pair) for pair in ((noise, signal), (ema_noise, ema_signal)))
    error = math.nan
    if blocks >= FEWEST and math.isfinite(ratio):  # the delta method
        gradient = np.array([-ratio, 1.0])
        error = math.sqrt(max(0.0, gradient @ covariance @ gradient)) / signal
    interval = fieller(noise, signal, covariance, t)
    if signal <= 0:
        why = "the estimate of gradient_sq is not above 0: more steps, or a larger batch, are needed"
    elif interval[1] == math.inf:
        why = "the interval of gradient_sq includes 0: more steps, or a larger batch, are needed for an upper bound"
    out["noise_scale"] = _values(ratio, error, interval, average, count, seen, why)
    if noise < 0:
        why = (
            "the mean gradient is longer than the mean square of its samples' gradients: rounding, or the loss "
            "reduction or number of samples is not what was declared"
        )
        for name in ("gradient_noise", "noise_scale", "gradient_sq"):
            out[name] = {k: Value(v.value, v.count, v.label, False, why, v.error) for k, v in out[name].items()}
    dropped = steps - count
    out["skipped_steps"] = {"sum": Value(float(dropped + skipped), steps + skipped)}
    return out


def _ratio(noise: float, signal: float) -> float:
    """Infinite when the estimate of |G|^2 is not above 0: then |G|^2 is too small for it, and not negative."""
    if signal > 0:
        return float(noise / signal)
    return math.inf if signal <= 0 < noise else math.nan


def _values(
    mean: float,
    error: float,
    interval: tuple[float, float],
    ema: float,
    count: int,
    seen: int,
    note: str,
) -> dict[str, Value]:
    bounded = not math.isnan(interval[0])
    finite = math.isfinite(mean)
    why = note if count else "nothing recorded"
    return {
        "mean": Value(float(mean), count, "estimate", finite, why, float(error) if finite else math.nan),
        "lower": Value(float(interval[0]), count, "estimate", bounded, why),
        "upper": Value(float(interval[1]), count, "estimate", bounded, why),
        "ema": Value(float(ema), seen, "estimate", math.isfinite(ema), "" if seen else "nothing recorded"),
    }


def fieller(noise: float, signal: float, covariance: Numbers, t: float) -> tuple[float, float]:
    """The ratios R >= 0 for which noise - R signal is within t standard errors of 0 (Fieller 1954).

    They are where a R^2 - 2 b R + c <= 0.
    """
    if math.isnan(t):
        return math.nan, math.nan
    a = signal**2 - t**2 * covariance[0, 0]
    b = signal * noise - t**2 * covariance[0, 1]
    c = noise**2 - t**2 * covariance[1, 1]
    root = math.sqrt(max(0.0, b * b - a * c))
    if a > 0 and signal > 0:
        # c / (...) in place of a difference of nearly equal numbers; b < 0 leaves no R > 0 but those near 0.
        high = (b + root) / a
        low = c / (b + root) if b + root > 0 else 0.0
        return max(0.0, low), max(0.0, high)
    # |G|^2 may be 0, so R may be anything large. With c > 0 the smallest R is the only positive root.
    if c <= 0 or b * b - a * c < 0:
        return 0.0, math.inf
    return (c / (b + root) if b + root > 0 else math.inf), math.inf
