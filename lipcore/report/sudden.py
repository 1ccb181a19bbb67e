"""Changes of a layer's updates that need attention: beyond all that the layer did in the bins before."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

BEFORE = 40  # bins that a bin is compared with
FEWEST = 20  # of them: what training does in its beginning is no change
_TENFOLD = 1.0  # in decimal logarithms
_SPREADS = 6.0  # robust standard deviations of the bins before, as for the alarms on norms
_NOISE = 0.005  # added to one
_BEYOND = 0.5  # in decimal logarithms, of the greatest or least of these bins: spikes that come again are no news
_AT_ONCE = 5  # bins at most in which it comes about: slow changes are how a model learns
LASTS = 5  # bins that a fall has to last: an update may be small by chance
_BEGUN = 0.7  # of a fall, in logarithms
_STOPPED = -30.0  # logarithm of no update at all

Array = np.ndarray[Any, Any]


class Change(NamedTuple):
    """The largest such change: a rise above 0, or a fall, in decimal logarithms; a fall to nothing is infinite."""

    bin: int
    row: int
    log: float
    shared: bool  #: most other layers changed in the same way


def most_sudden(high: Array) -> Change | None:
    """Return the largest change among the greatest updates over weight norms of each bin, [bins, rows]; None where
    there is none.

    A rise is ten times and six robust standard deviations above the median of up to 40 bins before, and three times
    above all of them but the last five. A fall is as far below them for five bins, and unlike the other layers: what
    all share is a learning rate.
    """
    logs = _logs(high)
    usual, spread, low, top = _before(logs)
    lasting = _lasting(logs)
    rises, falls = logs - usual, lasting - usual
    enough = np.maximum(_TENFOLD, _SPREADS * (spread + _NOISE))
    with np.errstate(invalid="ignore"):
        rising = (rises >= enough) & (logs - top >= _BEYOND)
        falling = (falls <= -enough) & (lasting - low <= -_BEYOND) & ~_alike(falls)
    sizes = np.where(rising, rises, np.where(falling, -falls, 0.0))
    if not sizes.any():
        return None
    at, row = (int(i) for i in np.unravel_index(int(sizes.argmax()), sizes.shape))
    if not rising[at, row]:
        fall = float(falls[at, row])
        while at and falls[at - 1, row] <= _BEGUN * fall:  # where it began
            at -= 1
        return Change(at, row, -np.inf if fall < _STOPPED / 2 else fall, False)
    return Change(at, row, float(rises[at, row]), len(high[0]) > 1 and bool(_alike(rises)[at, row]))


def compared(high: Array) -> Array:
    """Return which of these updates have enough bins before them to be compared with, [bins, rows]."""
    return _enough(_moving(_logs(high)))


def stopped_to(high: Array, at: int, row: int) -> int | None:
    """Return the last bin of those from this one on in which a row does not move at all; None where that is so to the
    end."""
    other = np.flatnonzero(high[at:, row] != 0)
    return at + int(other[0]) - 1 if len(other) else None


def _logs(high: Array) -> Array:
    with np.errstate(all="ignore"):
        return np.where(high > 0, np.log10(high), np.where(high == 0, _STOPPED, np.nan))


def _moving(logs: Array) -> Array:
    """Return the bins before each, [bins, rows, bins before], NaN where the row did not move."""
    return _windows(np.where(logs > _STOPPED, logs, np.nan), BEFORE)


def _enough(windows: Array) -> Array:
    return np.asarray(np.isfinite(windows).sum(-1) >= FEWEST)


def _before(logs: Array) -> tuple[Array, Array, Array, Array]:
    """Return median and robust standard deviation of the bins before each, least and greatest of those but the last
    few; NaN where too few have moved."""
    windows = _moving(logs)
    found = np.full((4, *logs.shape), np.nan)
    enough = _enough(windows)
    if enough.any():
        chosen = windows[enough]
        usual = np.nanmedian(chosen, axis=-1)
        spread = 1.4826 * np.nanmedian(np.abs(chosen - usual[:, None]), axis=-1)
        older = chosen[:, :-_AT_ONCE]
        found[:, enough] = usual, spread, np.nanmin(older, axis=-1), np.nanmax(older, axis=-1)
    usual, spread, low, top = found
    return usual, spread, low, top


def _windows(logs: Array, count: int) -> Array:
    """Return the bins before each, [bins, rows, count]."""
    before = np.pad(logs, ((count, 0), (0, 0)), constant_values=np.nan)[:-1]
    return np.lib.stride_tricks.sliding_window_view(before, count, axis=0)


def _lasting(logs: Array) -> Array:
    """Return the greatest number of each bin and the few after it; NaN where one has none, or the run ends before."""
    after = np.pad(logs, ((0, LASTS - 1), (0, 0)), constant_values=np.nan)
    return np.asarray(np.lib.stride_tricks.sliding_window_view(after, LASTS, axis=0).max(-1))


def _alike(changes: Array) -> Array:
    """Return which changes go at least half as far in most of the other rows; of a single row that is not known, and
    all of them do."""
    rows = changes.shape[1]
    if rows == 1:
        return np.ones(changes.shape, bool)
    known = np.where(np.isfinite(changes), changes, 0.0)
    others = known[:, ::-1] if rows == 2 else np.median(known, axis=1)[:, None]
    return np.asarray((np.sign(others) == np.sign(known)) & (np.abs(others) >= 0.5 * np.abs(known)) & (others != 0))
