"""From a window's sums of |G|^2 and tr(Sigma) to means, their ratio, and intervals, in all places at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
    "no step of this window had two samples or more, without which their scatter is not known",
    "no step of this window counts here: its numbers were NaN or infinite, or it was left out, for what "
    "details['noise_scale_skipped'] of the metric's result says",
)
_FINE, _NOTHING, _FEW, _NOT_ABOVE, _INCLUDES, _LONGER, _ONE, _LEFT_OUT = range(len(_NOTES))


@dataclass
class Moments:
    """A window's estimators in all places P, from which everything else follows."""

    steps: Counts  #: [3, P], or [3, 1] where they are the same everywhere: steps, blocks with one, steps averaged
    scale: Numbers  #: [P], unit of the two means and of their covariance's root
    signal: Numbers  #: [P], mean of the estimates of |G|^2
    noise: Numbers  #: [P], mean of the estimates of tr(Sigma)
    covariance: Numbers  #: [P, 2, 2] of these two; NaN below FEWEST blocks
    averages: Numbers  #: [2, P], the exponential averages of both, in units of their own

    @classmethod
    def of(cls, sums: Numbers, ema: Numbers) -> Moments:
        """Return those of blocks [blocks, 3, places] and exponential averages [4, places]."""
        used = sums[:, 0] > 0
        places, seen = sums.shape[2], ema[3].astype(np.int64)
        with np.errstate(all="ignore"):
            averages = np.where(seen > 0, ema[1:3] / ema[0], math.nan)
            scale, signal, noise = np.empty((3, places))
            steps = np.stack([sums[:, 0].sum(axis=0).astype(np.int64), used.sum(axis=0), seen])
            if (steps == steps[:, :1]).all():
                steps = steps[:, :1].copy()
            covariance = np.empty((places, 2, 2))
            found = cls(steps, scale, signal, noise, covariance, averages)
            for where in _alike(used):
                found._take(np.take(sums[used[:, where[0]]], where, axis=2), where)
        return found

    def _take(self, sums: Numbers, where: Counts) -> None:
        """Take in places that all have the same blocks, each of at least one step."""
        blocks, count = len(sums), sums[:, 0].sum(axis=0)
        # Fourth powers are taken below, and must neither underflow nor overflow.
        scale = np.ldexp(1.0, np.frexp(np.abs(sums[:, 1:]).max(axis=(0, 1), initial=0))[1] - 1)
        scaled = np.ascontiguousarray((sums[:, 1:] / scale).transpose(2, 0, 1))  # [place, block, 2]
        signal, noise = np.where(count > 0, (sums[:, 1:] / scale).sum(axis=0) / count, math.nan)
        covariance: Any = math.nan
        if blocks >= FEWEST:
            means = np.stack([signal, noise], axis=-1)[:, None]
            residuals = scaled - np.ascontiguousarray(sums[:, 0].T)[:, :, None] * means
            factor = blocks / (blocks - 1)
            covariance = np.matmul(residuals.transpose(0, 2, 1), residuals) * factor / (count**2)[:, None, None]
        self.scale[where], self.signal[where], self.noise[where] = scale, signal, noise
        self.covariance[where] = covariance

    @property
    def count(self) -> Counts:
        """Steps in every place."""
        return np.broadcast_to(self.steps[0], self.scale.shape)

    @property
    def blocks(self) -> Counts:
        """Blocks with at least one step in every place."""
        return np.broadcast_to(self.steps[1], self.scale.shape)

    @property
    def seen(self) -> Counts:
        """Steps in the exponential averages of every place."""
        return np.broadcast_to(self.steps[2], self.scale.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(array.nbytes for array in vars(self).values())

    def columns(self, steps: int, skipped: int, confidence: float) -> dict[str, dict[str, Column]]:
        """Return the columns of all quantities over a window of so many steps, and of so many of fewer than 2 samples
        beside them."""
        with np.errstate(all="ignore"):
            nothing = _LEFT_OUT if steps else _ONE if skipped else _NOTHING
            out = self._columns(*self._estimates(confidence), nothing)
        dropped = (steps - self.count + skipped).astype(np.float64)
        out["skipped_steps"] = {"sum": Column(rows_of(dropped[None])[0], steps + skipped)}
        return out

    def _estimates(self, confidence: float) -> tuple[list[Numbers], list[Numbers]]:
        """Return mean, lower, upper and average [4, places] of each quantity, and the errors of the means."""
        t = _quantiles(confidence, self.blocks)
        numbers, errors = [], []
        for q, mean in enumerate((self.signal, self.noise)):
            error = np.sqrt(self.covariance[:, q, q])
            low, high = (mean - t * error) * self.scale, (mean + t * error) * self.scale
            numbers.append(np.stack([mean * self.scale, low, high, self.averages[q]]))
            errors.append(error * self.scale)
        ratio, average = _ratio(self.noise, self.signal), _ratio(self.averages[1], self.averages[0])
        gradient = np.stack([-ratio, np.ones_like(ratio)], axis=-1)[:, None]  # the delta method
        variance = np.matmul(np.matmul(gradient, self.covariance), gradient.transpose(0, 2, 1))[:, 0, 0]
        error = np.where(np.isfinite(ratio), np.sqrt(np.maximum(0.0, variance)) / self.signal, math.nan)
        numbers.append(np.stack([ratio, *fieller(self.noise, self.signal, self.covariance, t), average]))
        return numbers, [*errors, error]

    def _columns(self, numbers: list[Numbers], errors: list[Numbers], nothing: int) -> dict[str, dict[str, Column]]:
        """Return each number with what it is worth; `nothing`: the note of places without a step."""
        wrong = self.noise < 0
        few = np.where(self.blocks < FEWEST, _FEW, _FINE)
        wide = np.where(self.signal <= 0, _NOT_ABOVE, np.where(numbers[2][2] == math.inf, _INCLUDES, few))
        count, ema_count = one_if_same(self.count), one_if_same(self.seen)
        ema_notes = Words.of(np.where(wrong, _LONGER, np.where(self.seen > 0, _FINE, nothing)), _NOTES)
        out = {}
        for name, why, (mean, lower, upper, ema), error in zip(
            QUANTITIES, (few, few, wide), numbers, errors, strict=True
        ):
            notes = Words.of(np.where(wrong, _LONGER, np.where(self.count > 0, why, nothing)), _NOTES)
            finite, bounded = np.isfinite(mean), one_if_same(~np.isnan(lower) & ~wrong)
            *rows, error_row = rows_of(np.stack([mean, lower, upper, ema, np.where(finite, error, math.nan)]))
            out[name] = {
                "mean": Column(rows[0], count, "estimate", one_if_same(finite & ~wrong), notes, error_row),
                "lower": Column(rows[1], count, "estimate", bounded, notes),
                "upper": Column(rows[2], count, "estimate", bounded, notes),
                "ema": Column(rows[3], ema_count, "estimate", one_if_same(np.isfinite(ema) & ~wrong), ema_notes),
            }
        return out


def _alike(used: Flags) -> list[Counts]:
    """Return places that lack the same blocks, to be taken together; most often all lack none."""
    if used.all():
        return [np.arange(used.shape[1])] if used.shape[1] else []
    _, which = np.unique(used, axis=1, return_inverse=True)
    return [np.flatnonzero(which.reshape(-1) == k) for k in range(int(which.max()) + 1)]


def _quantiles(confidence: float, blocks: Counts) -> Numbers:
    """Return Student's quantile per place; NaN below FEWEST blocks."""
    known = {int(n): t_quantile(confidence, int(n) - 1) if n >= FEWEST else math.nan for n in np.unique(blocks)}
    return np.array([known[n] for n in blocks.tolist()])


def _ratio(noise: Numbers, signal: Numbers) -> Numbers:
    """Return noise / signal; infinite when the estimate of |G|^2 is not above 0: then |G|^2 is too small for it, and
    not negative."""
    otherwise = np.where((signal <= 0) & (noise > 0), math.inf, math.nan)
    return np.where(signal > 0, noise / signal, otherwise)


def fieller(noise: Numbers, signal: Numbers, covariance: Numbers, t: Numbers) -> tuple[Numbers, Numbers]:
    """Return the ratios R >= 0 for which noise - R signal is within t standard errors of 0 (Fieller 1954).

    They are where a R^2 - 2 b R + c <= 0; NaN where t is.
    """
    a = signal**2 - t**2 * covariance[..., 0, 0]
    b = signal * noise - t**2 * covariance[..., 0, 1]
    c = noise**2 - t**2 * covariance[..., 1, 1]
    root = np.sqrt(np.fmax(0.0, b * b - a * c))
    # c / (...) in place of a difference of nearly equal numbers; b < 0 leaves no R > 0 but those near 0.
    smallest = c / (b + root)
    bounded = (a > 0) & (signal > 0)
    low = np.fmax(0.0, np.where(b + root > 0, smallest, 0.0))
    # |G|^2 may be 0, so R has no upper bound. With c > 0 the smallest R is the only positive root.
    all_ratios = (c <= 0) | (b * b - a * c < 0)
    unbounded = np.where(all_ratios, 0.0, np.where(b + root > 0, smallest, math.inf))
    high = np.where(bounded, np.fmax(0.0, (b + root) / a), math.inf)
    known = ~np.isnan(t)
    return np.where(known, np.where(bounded, low, unbounded), math.nan), np.where(known, high, math.nan)
