"""The signals: what each is, the score from which it alarms, and in which directions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class Signal:
    """One signal: a series in one place, or in every group of parameters."""

    name: str
    words: str  #: for messages
    limit: float  #: of the score
    two_sided: bool  #: a fall alarms too
    of_groups: bool  #: it has a value in every group
    by_default: bool = True  #: looked at where no signals are named
    exact: bool = False  #: compared with its limit itself, without a score and outside the budget


_ALL = (
    Signal("loss", "loss", 3.0, two_sided=False, of_groups=False),
    Signal("update_norm", "update norm over learning rate", 6.0, two_sided=True, of_groups=True),
    Signal("grad_norm", "gradient norm", 6.0, two_sided=True, of_groups=True),
    Signal("rms_t", "RMS_t", 8.0, two_sided=True, of_groups=True, by_default=False),
    Signal("unexplained_movement", "", 1.0, two_sided=False, of_groups=True, by_default=False, exact=True),
)
SIGNALS = {signal.name: signal for signal in _ALL}


def checked_signals(signals: Any) -> dict[str, Signal]:
    """Return the signals that are asked for, by name, with their limits.

    Raises:
        TypeError: neither None nor names nor limits by name.
        ValueError: an unknown name, no name at all, or a limit that is not > 0.
    """
    if signals is None:
        return {name: signal for name, signal in SIGNALS.items() if signal.by_default}
    if isinstance(signals, (str, bytes)) or not isinstance(signals, Iterable):
        raise TypeError(f"signals: expected a list of names, or a dict of limits by name, got {signals!r}")
    limits = dict(signals) if isinstance(signals, Mapping) else dict.fromkeys(signals)
    if not limits:
        raise ValueError(f"signals: expected at least one of {', '.join(map(repr, SIGNALS))}, got none")
    return {name: _checked(name, limit) for name, limit in limits.items()}


def _checked(name: Any, limit: Any) -> Signal:
    if not isinstance(name, str) or name not in SIGNALS:
        raise ValueError(f"signals: expected names out of {', '.join(map(repr, SIGNALS))}, got {name!r}")
    signal = SIGNALS[name]
    if limit is None:
        return signal
    if not isinstance(limit, Real) or isinstance(limit, bool) or not 0 < float(limit) < math.inf:
        raise ValueError(f"signals: expected a limit > 0 of the score of {name!r}, got {limit!r}")
    return replace(signal, limit=float(limit))
