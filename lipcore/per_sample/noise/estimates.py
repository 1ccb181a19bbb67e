"""From a window's sums of |G|^2 and tr(Sigma) to means, their ratio, and intervals, in all places at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lipcore.metric.columns import Column, Counts, Flags, Numbers, Words, one_if_same, rows_of
from lipcore.per_sample.noise.student_t import t_quantile

FEWEST = 8  # blocks that have a standard error worth stating
QUANTITIES = ("gradient_sq", "gradient_noise", "noise_scale")
_NOTES = (
    "",
    "nothing recorded",
    f"no interval below {FEWEST} steps",
    "the estimate of gradient_sq is not above 0: more steps, or a larger batch, are needed",
    "the interval of gradient_sq includes 0: more steps, or a larger batch, are needed for an upper bound",
    "the mean gradient is longer than the mean square of its samples' gradients: rounding, or the loss reduction or "
    "number of samples is not what was declared",
)
_FINE, _NOTHING, _FEW, _NOT_ABOVE, _INCLUDES, _LONGER = range(len(_NOTES))


@dataclass
class _Estimates:
    """Numbers of each quantity and reducer, and the error of each quantity's mean: [quantity, reducer, place]."""

    numbers: Numbers
    errors: Numbers  # [quantity, place]
    noise: Numbers  # [place], of the scaled sums: its sign counts
    signal: Numbers


def reduced(sums: Numbers, ema: Numbers, steps: int, skipped: int, confidence: float) -> dict[str, dict[str, Column]]:
    """Return the columns of all quantities, from blocks [blocks, 3, places] and exponential averages [4, places]."""
    used = sums[:, 0] > 0
    places = sums.shape[2]
    found = _Estimates(np.empty((3, 4, places)), np.empty((3, places)), np.empty(places), np.empty(places))
    with np.errstate(all="ignore"):
        for where in _alike(used):
            _estimate(np.take(sums[used[:, where[0]]], where, axis=2), ema[:, where], confidence, found, where)
    counts = sums[:, 0].sum(axis=0).astype(np.int64)
    out = _columns(found, counts, used.sum(axis=0), ema[3].astype(np.int64))
    dropped = (steps - counts + skipped).astype(np.float64)
    out["skipped_steps"] = {"sum": Column(rows_of(dropped[None])[0], steps + skipped)}
    return out


def _alike(used: Flags) -> list[Counts]:
    """Places that lack the same blocks, to be taken together; most often all lack none."""
    if used.all():
        return [np.arange(used.shape[1])] if used.shape[1] else []
    _, which = np.unique(used, axis=1, return_inverse=True)
    return [np.flatnonzero(which.reshape(-1) == k) for k in range(int(which.max()) + 1)]


def _estimate(sums: Numbers, ema: Numbers, confidence: float, out: _Estimates, where: Counts) -> None:
    """Of places that all have the same blocks, each of at least one step."""
    blocks, count = len(sums), sums[:, 0].sum(axis=0)
    weight, seen = ema[0], ema[3].astype(np.int64)
    # Fourth powers are taken below, and must neither underflow nor overflow.
    scale = np.ldexp(1.0, np.frexp(np.abs(sums[:, 1:]).max(axis=(0, 1), initial=0))[1] - 1)
    parts = np.ascontiguousarray((sums[:, 1:] / scale).transpose(2, 0, 1))  # [place, block, 2]
    nothing = np.full(len(where), math.nan)
    total = (sums[:, 1:] / scale).sum(axis=0)
    signal, noise = np.where(count > 0, total / count, math.nan)
    covariance, t = np.full((len(where), 2, 2), math.nan), math.nan
    if blocks >= FEWEST:
        means = np.stack([signal, noise], axis=-1)[:, None]
        residuals = parts - np.ascontiguousarray(sums[:, 0].T)[:, :, None] * means
        factor = blocks / (blocks - 1)
        covariance = np.matmul(residuals.transpose(0, 2, 1), residuals) * factor / (count**2)[:, None, None]
        t = t_quantile(confidence, blocks - 1)
    averages = np.where(seen > 0, ema[1:3] / weight, math.nan)
    for q, mean in enumerate((signal, noise)):
        error = np.sqrt(covariance[:, q, q])
        low, high = (mean - t * error) * scale, (mean + t * error) * scale
        out.numbers[q][:, where] = mean * scale, low, high, averages[q]
        out.errors[q, where] = error * scale
    ratio, average = _ratio(noise, signal), _ratio(averages[1], averages[0])
    error = nothing
    if blocks >= FEWEST:  # the delta method
        gradient = np.stack([-ratio, np.ones_like(ratio)], axis=-1)[:, None]
        variance = np.matmul(np.matmul(gradient, covariance), gradient.transpose(0, 2, 1))[:, 0, 0]
        error = np.where(np.isfinite(ratio), np.sqrt(np.maximum(0.0, variance)) / signal, math.nan)
    out.numbers[2][:, where] = ratio, *fieller(noise, signal, covariance, t), average
    out.errors[2, where] = error
    out.noise[where], out.signal[where] = noise, signal


def _columns(found: _Estimates, counts: Counts, blocks: Counts, seen: Counts) -> dict[str, dict[str, Column]]:
    """Each number with what it is worth."""
    wrong = found.noise < 0
    few = np.where(blocks < FEWEST, _FEW, _FINE)
    wide = np.where(found.signal <= 0, _NOT_ABOVE, np.where(found.numbers[2, 2] == math.inf, _INCLUDES, few))
    count, ema_count = one_if_same(counts), one_if_same(seen)
    ema_notes = Words.of(np.where(wrong, _LONGER, np.where(seen > 0, _FINE, _NOTHING)), _NOTES)
    out = {}
    for name, why, (mean, lower, upper, ema), error in zip(
        QUANTITIES, (few, few, wide), found.numbers, found.errors, strict=True
    ):
        notes = Words.of(np.where(wrong, _LONGER, np.where(counts > 0, why, _NOTHING)), _NOTES)
        finite, bounded = np.isfinite(mean), one_if_same(~np.isnan(lower) & ~wrong)
        *rows, errors = rows_of(np.stack([mean, lower, upper, ema, np.where(finite, error, math.nan)]))
        out[name] = {
            "mean": Column(rows[0], count, "estimate", one_if_same(finite & ~wrong), notes, errors),
            "lower": Column(rows[1], count, "estimate", bounded, notes),
            "upper": Column(rows[2], count, "estimate", bounded, notes),
            "ema": Column(rows[3], ema_count, "estimate", one_if_same(np.isfinite(ema) & ~wrong), ema_notes),
        }
    return out


def _ratio(noise: Numbers, signal: Numbers) -> Numbers:
    """Infinite when the estimate of |G|^2 is not above 0: then |G|^2 is too small for it, and not negative."""
    otherwise = np.where((signal <= 0) & (noise > 0), math.inf, math.nan)
    return np.where(signal > 0, noise / signal, otherwise)


def fieller(noise: Numbers, signal: Numbers, covariance: Numbers, t: float) -> tuple[Numbers, Numbers]:
    """Return the ratios R >= 0 for which noise - R signal is within t standard errors of 0 (Fieller 1954).

    They are where a R^2 - 2 b R + c <= 0.
    """
    if math.isnan(t):
        return np.full_like(noise, math.nan), np.full_like(noise, math.nan)
    a = signal**2 - t**2 * covariance[..., 0, 0]
    b = signal * noise - t**2 * covariance[..., 0, 1]
    c = noise**2 - t**2 * covariance[..., 1, 1]
    root = np.sqrt(np.fmax(0.0, b * b - a * c))
    # c / (...) in place of a difference of nearly equal numbers; b < 0 leaves no R > 0 but those near 0.
    smallest = c / (b + root)
    bounded = (a > 0) & (signal > 0)
    low = np.fmax(0.0, np.where(b + root > 0, smallest, 0.0))
    # |G|^2 may be 0, so R may be anything large. With c > 0 the smallest R is the only positive root.
    anything = (c <= 0) | (b * b - a * c < 0)
    unbounded = np.where(anything, 0.0, np.where(b + root > 0, smallest, math.inf))
    return np.where(bounded, low, unbounded), np.where(bounded, np.fmax(0.0, (b + root) / a), math.inf)
