"""Windows with everything that a result may hold."""

from __future__ import annotations

import math

import numpy as np

from lipcore.metric.columns import Column, Columns, Places, words_of
from lipcore.metric.results import MetricResult, Window
from lipcore.metric.values import Value

WORDS = words_of(["exact", "exact", "estimate", "exact"])
PLACES = Places(["a.weight", "a", "b", "total"], ["tensor", "group", "group", "total"])


def window_of(index: int, steps: int = 10) -> Window:
    """Return a closed window whose numbers depend on its index."""
    one = MetricResult("one", note="text", share=0.5, many=[1, 2.0, None], nested={"a": math.nan})
    present = np.array([True, False, True, True])
    columns = {
        "mean": Column(
            index + np.arange(4) / 8, np.arange(4) + index, words_of(["exact", "exact", "estimate", "exact"])
        ),
        "max": Column(
            np.array([1.0, math.nan, math.inf, -0.0]),
            7,
            "one-sided",
            np.array([True, False, True, False]),
            words_of(["", "lost", "", "lost"]),
            np.array([0.1, 0.2, math.nan, 0.4]),
            present,
        ),
    }
    one.add_columns("norm", Columns(PLACES, columns))
    one.add("alone", "somewhere", "group", last=Value(math.nan, 0, "heuristic", False, "nothing came"))
    two = MetricResult("two")
    two.add_columns("norm", Columns(PLACES, {"max": Column(2.0, 3)}))
    results = {"one": one, "two": two}
    return Window(index, steps * index + 1, steps * (index + 1), True, "global", results, {"three": "it was off"})
