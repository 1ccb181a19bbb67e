"""The gradient noise scale against the batch size in use."""

from __future__ import annotations

import math

import numpy as np

from lipcore.report.binned import Binned
from lipcore.report.facts import Facts
from lipcore.report.html import Table, name_of, number
from lipcore.report.plots import Plots
from lipcore.report.remedies import remedy_of
from lipcore.report.section import Figure, Made, Missing, Section, with_metric

_METRIC, _NAME = "per_sample_grad_norm", "noise_scale"


def noise_scale(facts: Facts, plots: Plots) -> Made:
    """Show the noise scale as a word, with its interval, and over the run."""
    remedy = with_metric('PerSampleGradNorms(loss_reduction="auto")', "; batches need 2 samples")
    remedy = remedy_of(facts, _METRIC, [_NAME], remedy)
    found = [facts.windows.get(_METRIC, _NAME, reducer) for reducer in ("lower", "mean", "upper")]
    low, mean, high = found
    if mean is None or "total" not in mean.places:
        return Missing("Gradient noise scale", remedy)
    column = mean.places.index("total")
    last = np.flatnonzero(mean.count[:, column] > 0)
    if not len(last):
        return Missing("Gradient noise scale", remedy)
    at = int(last[-1])
    value = float(mean.mean[at, column])
    ends = _at(low, at), _at(high, at)
    batch = float(np.median(facts.windows.samples)) if facts.windows.samples else math.nan
    sentence = f"In the last window {number(value)} samples, {_interval(*ends)}. {_word(value, *ends, batch)}"
    if low is not None and high is not None and "total" in low.places and "total" in high.places:
        plots.band("noise", low, mean, high, column, "samples")
    else:
        plots.lines("noise", [("noise scale", mean, column)], "samples")
    rows = [
        (name_of(place), number(float(mean.mean[at, i])))
        for i, place in enumerate(mean.places)
        if place != "total" and mean.count[at, i]
    ]
    figure = Figure(
        "noise",
        f"Noise scale of {facts.windows.model(facts.covered.stage)}, with its 95 % interval",
        sentence,
        Table(("layer", "last window"), rows),
    )
    return Section(
        "noise",
        "Gradient noise scale",
        figures=[figure],
        notes=["An estimate; McCandlish et al. 2018, arXiv 1812.06162."],
    )


def _at(numbers: Binned | None, at: int) -> float:
    if numbers is None or "total" not in numbers.places:
        return math.nan
    return float(numbers.mean[at, numbers.places.index("total")])


def _interval(low: float, high: float) -> str:
    if math.isnan(low):
        return "without an interval: too few steps in a window"
    return f"95 % interval {number(low)} to {number(high) if math.isfinite(high) else 'infinity'}"


def _word(value: float, low: float, high: float, batch: float) -> str:
    """Say what the noise scale means for the batch size in use."""
    if not batch > 0:
        return "The batch size is not in this record."
    size = f"the batch of {number(batch)}"
    low, high = (value if math.isnan(end) else end for end in (low, high))
    if low > 2 * batch:
        return f"Noisy: above {size}, so a larger batch would still help."
    if high < batch / 2:
        return f"Quiet: below {size}, so a smaller batch would do about as well."
    return f"Uncertain, or about as large as {size}: no reason to change it."
