"""What lipcore.theory says of a recorded run, with the label of each number and the reason where it is not valid."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from lipcore.metric.results import Value, Window
from lipcore.theory import bias_distance, bias_variance, lipschitz_bound, sandwich, steadiness
from lipcore.theory.recorded_motion import CONTRADICTED

_MOST = 4000  # windows that are kept in memory for it
_METRIC = "lipschitz"


@dataclass(frozen=True)
class Statement:
    """A number of the theory about a stretch of the run."""

    where: str  #: "Theorem 1"
    what: str
    value: Value
    first_step: int
    last_step: int


class Theory:
    """Collector of what the statements need of a run's windows."""

    def __init__(self) -> None:
        self._windows: list[Window] = []
        self._last: Window | None = None  # with all metrics

    def take(self, window: Window) -> None:
        """Keep what is needed of a window; of the first 4,000 that have a Lipschitz metric."""
        if _METRIC in window.results and len(self._windows) < _MOST:
            self._windows.append(replace(window, results={_METRIC: window.results[_METRIC]}))
            self._last = window

    def statements(self) -> list[Statement]:
        """Return what can be said; nothing where no window has a Lipschitz metric."""
        if not self._windows:
            return []
        quantity = self._windows[-1][_METRIC].get("normalized_gradient_norm")
        places = [] if quantity is None else list(quantity)
        found = []
        parts = {"Theorem 1": self._sandwich, "Definition 1": self._steadiness, "Corollary 1": self._corollary_1}
        for where, part in parts.items():
            for place in places:
                found += self._tried(where, part, place, f" ({place})" if len(places) > 1 else "")
        for where, own in (("Corollary 2", self._corollary_2), ("Corollary 3", self._corollary_3)):
            found += self._tried(where, own)
        return found

    def _tried(self, where: str, part: Callable[..., list[Statement]], *of: str) -> list[Statement]:
        try:
            return part(*of)
        except ValueError as error:  # the windows have not what it is about: no Linear as first layer
            value = Value(math.nan, 0, "exact", False, str(error).removeprefix("history: "))
            first, last = self._windows[0].first_step, self._windows[-1].last_step
            return [Statement(where, f"cannot be said{''.join(of[1:])}", value, first, last)]
        except KeyError:  # of this place nothing of the kind was recorded
            return []

    def _sandwich(self, place: str, of: str) -> list[Statement]:
        one = sandwich(self._windows, place=place)
        values = {
            "lower side: mean of lambda / sigma_1(W_1)": one.lower,
            "in between: mean of r, the normalised gradient norm": one.middle,
            "upper side: mean of lambda / sigma_min(W_1)": one.upper,
            "normalised length: sum of r": one.length,
        }
        return [
            Statement("Theorem 1", what + of, value, one.first_step, one.last_step) for what, value in values.items()
        ]

    def _steadiness(self, place: str, of: str) -> list[Statement]:
        curve = steadiness(self._windows, place=place)
        found = []
        for i in dict.fromkeys((0, len(curve.steps) // 2)):
            phi = curve.phi[i]
            valid = math.isfinite(phi) and not curve.note
            value = Value(phi, len(curve.steps) - i, curve.label, valid, curve.note)
            what = f"phi: largest r from step {curve.steps[i]:,} on{of}"
            found.append(Statement("Definition 1", what, value, curve.steps[i], curve.ends[-1]))
        return found

    def _corollary_1(self, place: str, of: str) -> list[Statement]:
        bound = lipschitz_bound(self._windows, place=place).bound
        first, last = self._windows[0].first_step, self._windows[-1].last_step
        return [Statement("Corollary 1", f"beta phi: at least lambda of every sample visited{of}", bound, first, last)]

    def _first_bias(self, quantity: str) -> str | None:
        """Return the name of the first layer's bias, where the last window has its trajectory."""
        window = self._last
        assert window is not None
        parameter = window[_METRIC].details.get("first_bias", {}).get("parameter")
        there = "trajectory" in window and parameter in list(window["trajectory"].get(quantity, ()))
        return parameter if there else None

    def _corollary_2(self) -> list[Statement]:
        parameter = self._first_bias("update_norm")
        if self._last is None or parameter is None:
            return []
        one = bias_variance([self._last], parameter)
        values = {"lower bound, by the steps' lengths": one.lower, f"variance of {parameter}": one.variance}
        return [Statement("Corollary 2", what, value, one.first_step, one.last_step) for what, value in values.items()]

    def _corollary_3(self) -> list[Statement]:
        parameter = self._first_bias("distance")
        if self._last is None or parameter is None:
            return []
        trajectory = self._last["trajectory"]  # of the windows before, nothing of it is asked
        windows = [replace(one, results={**one.results, "trajectory": trajectory}) for one in self._windows]
        one = bias_distance(windows, parameter, eps_max=1.0)
        values = {
            f"distance of {parameter} from its start": one.distance,
            "upper bound of the distance": _without_eps(one.bound),
            "length of its way": one.length,
            "directness: distance over length": one.directness,
        }
        last = self._last.last_step
        return [Statement("Corollary 3", what, value, 1, last) for what, value in values.items()]


def _without_eps(bound: Value) -> Value:
    """Return Corollary 3's bound as a record allows it, from that for eps_max = 1: it has no loss gradients."""
    against = "" if bound.valid else bound.note.replace(CONTRADICTED, "").strip("; ")
    note = against or "eps_max is not in a record; theory.bias_distance(history, parameter, eps_max=...) takes it"
    return Value(math.nan, 0, bound.label, False, note)
