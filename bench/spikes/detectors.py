"""What tells of a fault: scores of single signals, joint ones, practice's rules, and lipcore's alarms as they ship."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

import lipcore
from lipcore.alarms import AlarmEvent, Alarms
from lipcore.alarms.light import QUANTITY, WarningLight
from lipcore.metric.columns import Places
from lipcore.trajectory.step_stream import StepArrays

Numbers = NDArray[np.float64]
Series = Mapping[str, NDArray[Any]]

USUAL = 100  # steps that a step is compared with, as many as lipcore's alarms do
QUIET = 20  # steps in which an alarm is the only one
_ALLOWED = 0.5  # sigmas that CUSUM lets pass


@dataclass
class Scores:
    """Scores of every step, [steps, columns]: large where a step is not as usual."""

    values: Numbers
    places: Sequence[str]  #: of the columns, "" where they are no layer's

    @property
    def most(self) -> Numbers:
        """Greatest score of each step."""
        return self.values.max(1)

    def place(self, step: int) -> str:
        """Return the layer whose score is the greatest among those that are a layer's, "" where there is none."""
        named = [i for i, place in enumerate(self.places) if place]
        return self.places[named[int(np.argmax(self.values[step, named]))]] if named else ""


Detector = Callable[[Series], Scores]


def logs_of(numbers: NDArray[Any]) -> Numbers:
    """Return logarithms [steps, columns]; what is not finite counts as huge."""
    x = np.asarray(numbers, np.float64).reshape(len(numbers), -1)
    return np.log(np.clip(np.where(np.isfinite(x), x, 1e300), 1e-30, None))


def scores_of(logs: Numbers) -> Numbers:
    """Return z = (x - median) / (1.4826 MAD + 0.01) of each step against the 100 before it, 0 where there are fewer."""
    z = np.zeros_like(logs)
    if len(logs) > USUAL:
        before = np.ascontiguousarray(sliding_window_view(logs, USUAL, axis=0)[:-1])
        middle = np.median(before, axis=-1)
        spread = 1.4826 * np.median(np.abs(before - middle[..., None]), axis=-1) + 0.01
        z[USUAL:] = (logs[USUAL:] - middle) / spread
    return z


# ---- single signals


def _plain(name: str, *, two_sided: bool = False) -> Detector:
    """Return the score of a number without places."""
    return lambda series: Scores(_sided(scores_of(logs_of(series[name])), two_sided), [""])


def _by_place(name: str, level: str) -> Detector:
    """Return the two-sided score of a norm in every parameter or group; of updates over the learning rate."""

    def scores(series: Series) -> Scores:
        return Scores(np.abs(scores_of(_norms(series, name, level))), _places(series, level))

    return scores


def _norms(series: Series, name: str, level: str) -> Numbers:
    logs = logs_of(series[name][:, series["levels"] == level])
    return logs - np.log(series["rate"])[:, None] if name == "update_norm" else logs


def _places(series: Series, level: str) -> list[str]:
    names: list[str] = series["places"][series["levels"] == level].tolist()
    return [lipcore.by_block(name) for name in names] if level == "tensor" else names


def _sided(z: Numbers, two_sided: bool) -> Numbers:
    return np.abs(z) if two_sided else np.maximum(z, 0)


def _of_modules(series: Series) -> Scores:
    return Scores(_sided(scores_of(logs_of(series["kurtosis"])), False), [""] * series["kurtosis"].shape[1])


def _rms_t(series: Series) -> Scores:
    return Scores(np.abs(scores_of(logs_of(series["rms_t"]))), _places(series, "tensor"))


def _global_norm(series: Series) -> Scores:
    return Scores(_sided(scores_of(_norms(series, "grad_norm", "total")), False), [""])


def _largest_loss(series: Series) -> Scores:
    return Scores(_sided(scores_of(logs_of(series["sample_loss"].max(1))), False), [""])


def _cusum(logs: Callable[[Series], Numbers], places: Callable[[Series], list[str]], *, two_sided: bool) -> Detector:
    """Return cumulative sums of z over half a sigma, S = max(0, S + z - 1/2); z counts 6 at most, so that a spike of
    one step is not a drift."""

    def scores(series: Series) -> Scores:
        z = np.clip(scores_of(logs(series)), -6, 6)
        up, down, found = np.zeros(z.shape[1]), np.zeros(z.shape[1]), np.zeros_like(z)
        for t, row in enumerate(z):
            up = np.maximum(0, up + row - _ALLOWED)
            down = np.maximum(0, down - row - _ALLOWED) if two_sided else down
            found[t] = np.maximum(up, down)
        return Scores(found, places(series))

    return scores


SINGLE: dict[str, Detector] = {
    "loss": _plain("loss"),
    "global gradient norm": _global_norm,
    "largest loss of a sample": _largest_loss,
    "update norm per group": _by_place("update_norm", "group"),
    "update norm per parameter": _by_place("update_norm", "tensor"),
    "gradient norm per group": _by_place("grad_norm", "group"),
    "gradient norm per parameter": _by_place("grad_norm", "tensor"),
    "weight norm per group": _by_place("weight_norm", "group"),
    "RMS_t per parameter": _rms_t,
    "normalized_update_rms": _plain("normalized_update_rms"),
    "activation kurtosis": _of_modules,
    "CUSUM of the loss": _cusum(lambda series: logs_of(series["loss"]), lambda _: [""], two_sided=False),
    "CUSUM of update norms per group": _cusum(
        lambda series: _norms(series, "update_norm", "group"), lambda series: _places(series, "group"), two_sided=True
    ),
}
_NEEDS_ADAMW = {"RMS_t per parameter": "rms_t", "normalized_update_rms": "normalized_update_rms"}

#: Joint detectors: each signal's score over its own threshold, the greatest of them.
JOINT: dict[str, tuple[str, ...]] = {
    "loss + global gradient norm": ("loss", "global gradient norm"),
    "loss + update norm per group": ("loss", "update norm per group"),
    "loss + update norm + gradient norm per group": ("loss", "update norm per group", "gradient norm per group"),
    "loss + update norm + gradient norm per parameter": (
        "loss",
        "update norm per parameter",
        "gradient norm per parameter",
    ),
}


# ---- practice


def six_sigma(series: Series) -> Scores:
    """Return the rule that trainers ship: how many standard deviations of the last 128 steps the loss, or the global
    gradient norm, is above their mean. It alarms at 6."""
    total = series["grad_norm"][:, series["levels"] == "total"]
    x = np.column_stack([series["loss"], total])
    x = np.where(np.isfinite(x), x, 1e300)
    found = np.zeros_like(x)
    if len(x) > 128:
        before = sliding_window_view(x, 128, axis=0)[:-1]
        with np.errstate(over="ignore", invalid="ignore"):
            found[128:] = (x[128:] - before.mean(-1)) / np.maximum(before.std(-1), 1e-10)
    return Scores(np.maximum(np.nan_to_num(found, nan=0.0), 0), ["", ""])


PRACTICE = "6 sigma of 128 steps, loss and gradient norm"
SHIPPED = 'alarms="default"'
#: lipcore's alarms with other arguments, by how they are made.
OTHERS = {"Alarms(least_multiplier=0.5)": {"least_multiplier": 0.5}}
#: It counts in every step in which it is on, which is no alarm: it has no budget.
LIGHT = "warning light"


def available(series: Series) -> dict[str, Detector]:
    """Return the detectors of single signals and practice's for which a series has the numbers."""
    found = {name: one for name, one in SINGLE.items() if _NEEDS_ADAMW.get(name, "loss") in series}
    return found | {PRACTICE: six_sigma}


# ---- thresholds and alarms


def peaks(score: Numbers) -> list[float]:
    """Return the greatest score of every stretch of 20 steps, from the first step that is scored."""
    return [float(score[t : t + QUIET].max()) for t in range(USUAL, len(score), QUIET)]


def threshold(scores: Sequence[Numbers], per_1000: float) -> float:
    """Return the score that so many stretches per 1000 steps of clean runs are over."""
    found = sorted((peak for score in scores for peak in peaks(score)), reverse=True)
    steps = sum(max(0, len(score) - USUAL) for score in scores)
    return found[min(len(found) - 1, int(per_1000 * steps / 1000))]


def alarms(score: Numbers, limit: float) -> list[int]:
    """Return the steps, from 0, of the alarms: over the limit, and none in the 20 steps before."""
    found: list[int] = []
    for step in np.flatnonzero(score[USUAL:] > limit) + USUAL:
        if not found or step > found[-1] + QUIET:
            found.append(int(step))
    return found


def joint(parts: Mapping[str, Scores], names: Sequence[str], limits: Mapping[str, float]) -> Scores:
    """Return the scores of several signals, each over its own threshold."""
    values = np.concatenate([parts[name].values / limits[name] for name in names], axis=1)
    return Scores(values, [place for name in names for place in parts[name].places])


def light(series: Series) -> Scores:
    """Return 1 in every step in which the warning light is on, by the class that a Monitor uses."""
    one = WarningLight()
    found = np.zeros((len(series[QUANTITY]), 1))
    for step, rms in enumerate(series[QUANTITY].tolist(), 1):
        one.step(step, rms)
        found[step - 1] = one.is_on
    return Scores(found, [""])


def shipped(series: Series, **options: Any) -> list[AlarmEvent]:
    """Return what lipcore's Alarms tell of a recorded training, by the calls that a Monitor makes of them."""
    told = Alarms(**options)
    told._begin([], lambda error: None, lambda: True, has_norms=True)
    places = Places(tuple(series["places"].tolist()), tuple(series["levels"].tolist()))
    told._logged(1, {"loss": series["loss"], "lr": series["rate"]})
    told._norms(1, StepArrays(places, {name: series[name] for name in ("update_norm", "grad_norm", "weight_norm")}))
    told._end()
    return told.events
