"""Theorem 1 and Definition 1: what the first layer's gradients say about the function while it is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lipcore.metric.results import Label, Value, Window, suffix_maximum, weakest
from lipcore.theory.finding import Finding
from lipcore.theory.windows import NEEDS, missing_steps, one_place, quantity, select, with_samples


@dataclass(frozen=True, repr=False)
class Sandwich(Finding):
    """Result of :func:`sandwich`: Theorem 1 over an interval of training, lower <= middle <= upper."""

    lower: Value  #: mean of lambda_i / sigma_1(W_1)
    middle: Value  #: mean of r_i, the normalised first-layer gradient norm
    upper: Value  #: mean of lambda_i / sigma_min(W_1); valid only where W_1 has n_1 <= n and full rank
    length: Value  #: sum of r_i over all samples visited: the normalised length
    first_step: int
    last_step: int

    @property
    def upper_valid(self) -> bool:
        """Validity of the upper side: True where it is a theorem."""
        return self.upper.valid


def sandwich(
    history: Iterable[Window],
    *,
    first_step: int | None = None,
    last_step: int | None = None,
    place: str | None = None,
    metric: str = "lipschitz",
) -> Sandwich:
    r"""Evaluate Theorem 1 of Loukas et al. over any interval of windows:

    .. math:: \frac{1}{n}\sum_t \frac{\lambda_t}{\sigma_1(W_1)} \le \frac{1}{n}\sum_t r_t \le
              \frac{1}{n}\sum_t \frac{\lambda_t}{\sigma_{\min}(W_1)}

    over the samples t at which both r and lambda were taken. Overlapping (sliding) windows are thinned to ones that do
    not overlap, those without a sample are passed over; steps that lie in no window are named in the notes. W_1 is that
    of each window's close, so shorter windows come nearer to the exact form with W_1 at every t; a window within which
    it moved makes the sides heuristic. The lower side holds always, the upper one where W_1 has no more outputs than
    inputs and full rank.

    Args:
        history: ``monitor.history``, or any windows with a Lipschitz metric.
        first_step, last_step: only windows within these steps (inclusive).
        place: the output the numbers refer to; default the only one.

    Raises:
        ValueError: no window; no Lipschitz metric; no sandwich in a window (an Embedding, or nothing recorded).
    """
    windows = select(history, metric, first_step, last_step)
    recorded = with_samples(windows, metric)
    place = one_place(quantity(recorded[0], metric, "sandwich", NEEDS), place)
    rows = [quantity(window, metric, "sandwich", NEEDS)[place] for window in recorded]
    lengths = [window[metric]["normalized_gradient_norm"][place]["sum"] for window in recorded]
    gaps = missing_steps(windows)
    lower, middle, upper = (_mean([row[side] for row in rows], gaps) for side in ("lower", "middle", "upper"))
    count = sum(value.count for value in lengths)
    length = Value(
        math.fsum(value.value for value in lengths if value.valid),
        count,
        weakest(value.label for value in lengths),
        count > 0,
        joined([*(value.note for value in lengths if value.valid), gaps]) if count else "nothing recorded",
    )
    return Sandwich(lower, middle, upper, length, windows[0].first_step, windows[-1].last_step)


def joined(notes: Iterable[str]) -> str:
    """Join the different notes of several values; the first six, since a run can have a thousand windows."""
    different = list(dict.fromkeys(note for note in notes if note))
    more = [f"and {len(different) - 6} more"] if len(different) > 6 else []
    return "; ".join([*different[:6], *more])


def _mean(values: list[Value], gaps: str) -> Value:
    """Average over all samples of all windows; not valid where a window's value is not."""
    count = sum(value.count for value in values)
    total = math.fsum(value.value * value.count for value in values)
    notes = joined([*(value.note for value in values), gaps])
    valid = all(value.valid for value in values)
    label = weakest(value.label for value in values)
    return Value(total / count if count else math.nan, count, label, valid, notes)


@dataclass(frozen=True, repr=False)
class Steadiness(Finding):
    """Result of :func:`steadiness`: the curve phi(tau) = max of r_t over t >= tau, with tau at the start of each
    window."""

    steps: tuple[int, ...]  #: tau: first step of each window
    phi: tuple[float, ...]  #: suffix maximum, never rising
    median: tuple[float, ...]  #: of r within each window, to 1 %
    p99: tuple[float, ...]  #: of r within each window, to 1 %
    label: Label
    ends: tuple[int, ...]  #: last step of each window
    note: str = ""  #: what phi does not know: steps that lie in no window, infinite r

    def at(self, step: int) -> float:
        """Return phi of the window that contains `step`: exact at the window's first step, an upper bound of
        phi(step) within it. NaN before the first window, after the last one, and in steps that lie in no window."""
        for tau, end, phi in zip(self.steps, self.ends, self.phi, strict=True):
            if tau <= max(step, 1) <= end:
                return phi
        return math.nan

    def __repr__(self) -> str:
        at = f"from step {self.steps[0]}: {self.phi[0]:.6g}; from step {self.steps[-1]}: {self.phi[-1]:.6g}"
        lines = [type(self).__name__, f"  phi      {at}", f"  windows  {len(self.phi)}, {self.label}"]
        return "\n".join(lines + ([f"  unknown  {self.note}"] if self.note else []))

    def earliest(self, phi: float) -> int | None:
        """Return the earliest tau from which on training is (tau, phi)-steady, None when it never became so."""
        return next((tau for tau, value in zip(self.steps, self.phi, strict=True) if value <= phi), None)


def steadiness(
    history: Iterable[Window],
    *,
    first_step: int | None = None,
    last_step: int | None = None,
    place: str | None = None,
    metric: str = "lipschitz",
) -> Steadiness:
    r"""Compute the curve of Definition 1 of Loukas et al., :math:`\varphi(\tau) = \max_{t \ge \tau} r_t`: training is
    :math:`(\tau, \varphi)`-steady when :math:`r_t \le \varphi` for all :math:`t \ge \tau`.

    tau is each window's first step. Exact for the samples that were recorded; windows without any are passed over (NaN
    at the end). Overlapping windows are thinned, and steps that lie in no window named in `note`.

    Raises:
        ValueError: no window, or no Lipschitz metric.
    """
    windows = select(history, metric, first_step, last_step)
    name = "normalized_gradient_norm"
    place = one_place(quantity(windows[0], metric, name, "nothing was recorded"), place)
    rows = [window[metric][name][place] for window in windows]
    infinite = sum(window[metric].details.get("infinite_ratios", 0) for window in windows)
    return Steadiness(
        tuple(window.first_step for window in windows),
        tuple(suffix_maximum([row["max"].value for row in rows])),
        tuple(row["p50"].value for row in rows),
        tuple(row["p99"].value for row in rows),
        weakest(row["max"].label for row in rows),
        tuple(window.last_step for window in windows),
        joined([missing_steps(windows), f"r was infinite at {infinite} samples" if infinite else ""]),
    )
