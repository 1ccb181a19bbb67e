"""Records of runs for the report, made of random numbers without a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lipcore.metric.columns import Column, Columns, Places
from lipcore.metric.results import MetricResult, Window
from lipcore.recording import Run, RunRecord, open_run

#: What must not become markup, or turn the page around.
HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "\u202eright to left \u05d0\u05d1\u05d2",
    "layers." * 80 + "weight",
    "a,b\n'c'\\\u2028",
)


def recorded(
    folder: Path,
    steps: int = 300,
    places: Sequence[str] = ("layers.0", "layers.1", "layers.2"),
    *,
    windows: int = 3,
    level: str = "group",
    fault: tuple[int, str] | None = None,
    only_nan: bool = False,
    alarm: bool = False,
    seed: int = 0,
) -> Run:
    """Return a run of so many steps, with update, weight and gradient norms in some places, and the loss.

    Args:
        level: of the places: "group" or "tensor".
        fault: step and place of an update that is 50 times too large; with `alarm` there is an event about it.
        only_nan: every number is NaN.
    """
    rng = np.random.default_rng(seed)
    names, levels = [*places, "total"], [level] * len(places) + ["total"]
    config = {"model": "Fake", "alarms": ["loss", "update_norm"] if alarm else "off"}
    record = RunRecord(folder, level="tensor", config=config)
    record.begin(0)
    for first in range(1, steps + 1, 256):
        count = min(256, steps + 1 - first)
        arrays = {}
        for quantity, size in (("update_norm", 0.01), ("weight_norm", 1.0), ("grad_norm", 0.3)):
            arrays[f"trajectory/{quantity}"] = size * np.exp(0.1 * rng.standard_normal((count, len(names))))
        loss = 3.0 / (1 + 0.01 * np.arange(first, first + count)) * np.exp(0.05 * rng.standard_normal(count))
        if fault is not None and first <= fault[0] < first + count:
            arrays["trajectory/update_norm"][fault[0] - first, [names.index(fault[1]), -1]] *= 50
        if only_nan:
            arrays = {name: np.full_like(array, np.nan) for name, array in arrays.items()}
            loss[:] = np.nan
        record.add_steps(first, arrays, names, levels, measured=True)  # type: ignore[arg-type]
        record.add_steps(first, {"logged/loss": loss[:, None]}, ["total"], ["total"], measured=True)
    each = steps // windows if windows else 0
    for index in range(windows):
        record.add_window(window_of_trajectory(index, each, names, levels, only_nan=only_nan))
    if fault is not None and alarm:
        step, place = fault
        text = f"alarm in step {step} at {place}: update norm over learning rate is 50 times its usual value (score 9)"
        record.add_event(step, "alarm", text, {"signal": "update_norm", "place": place, "score": 9.0})
    record.close()
    return open_run(folder)


def window_of_trajectory(
    index: int, steps: int, names: Sequence[str], levels: Sequence[str], *, only_nan: bool = False
) -> Window:
    """Return a window with the numbers of a Trajectory that the report shows."""
    count, grown = len(names), float(index + 1)
    result = MetricResult("trajectory", mode="exact")
    at = Places(names, levels)  # type: ignore[arg-type]

    def add(quantity: str, **numbers: float) -> None:
        columns = {
            reducer: Column(np.full(count, np.nan if only_nan else number) * np.linspace(1, 2, count), steps)
            for reducer, number in numbers.items()
        }
        result.add_columns(quantity, Columns(at, columns))

    add("update_ratio", mean=0.01, p50=0.01, p99=0.02, max=0.03)
    add("path_length", sum=1.0, cumulative=grown)
    add("distance", last=0.5 * grown)
    add("directness", last=0.5)
    add("weight_norm", last=1.0 + 0.1 * grown)
    add("unmoved_steps", sum=0.0)
    add("nonfinite_steps", sum=0.0)
    return Window(index, steps * index + 1, steps * (index + 1), True, "global", {"trajectory": result}, {})
