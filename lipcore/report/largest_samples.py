"""Samples with the largest gradient norms and losses, among the steps that the flight recorder has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lipcore.report.source import SamplesOfStep

_SHOWN = 10
_BY = {"gradient norm": "norms", "loss": "losses"}


@dataclass(frozen=True)
class LargeSample:
    """A sample at the step in which its number was largest."""

    id: int | None  #: None: all samples of the step, none of which was finite
    step: int
    value: float  #: NaN or infinite where it was that
    times: int  #: how many of the steps it was in; of all samples, how many they are


@dataclass
class LargestSamples:
    """Samples with the largest numbers.

    Attributes:
        first, last: the first and the last step that is known.
        steps: how many are known; those between may not be.
        by: of "gradient norm" and "loss", where they were recorded: each sample once; first those that are not finite
            in the first step in which there are such ones, as one where they are the whole batch, then finite numbers.
        usual: medians of all finite ones.
        later: how many more numbers are not finite, in later steps: of a model that is NaN every sample is.
    """

    first: int = 0
    last: int = 0
    steps: int = 0
    by: dict[str, list[LargeSample]] = field(default_factory=dict)
    usual: dict[str, float] = field(default_factory=dict)
    later: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, batches: Sequence[SamplesOfStep]) -> LargestSamples:
        """Find them."""
        named = [batch for batch in batches if batch.ids is not None]
        if not named:
            return cls()
        found = cls(min(b.step for b in named), max(b.step for b in named), len(named))
        for by, attribute in _BY.items():
            having = [batch for batch in named if getattr(batch, attribute) is not None]
            if having:
                ids = np.concatenate([batch.ids for batch in having if batch.ids is not None])
                values = np.concatenate([getattr(batch, attribute) for batch in having]).astype(np.float64)
                steps = np.repeat([batch.step for batch in having], [len(getattr(b, attribute)) for b in having])
                lost = ~np.isfinite(values)
                first = int(steps[lost].min(initial=np.iinfo(np.int64).max))
                kept = ~lost | (steps == first)
                found.later[by] = int((~kept).sum())
                whole = int((steps == first).sum())
                if whole > 1 and lost[steps == first].all():
                    at = int(np.flatnonzero(steps == first)[0])
                    rest = _largest(ids, values, steps, ~lost)[: _SHOWN - 1]
                    found.by[by] = [LargeSample(None, first, float(values[at]), whole), *rest]
                else:
                    found.by[by] = _largest(ids, values, steps, kept)
                finite = values[~lost]
                found.usual[by] = float(np.median(finite)) if len(finite) else float("nan")
        return found


def _largest(ids: Any, values: Any, steps: Any, kept: Any) -> list[LargeSample]:
    found: dict[int, int] = {}
    order = np.argsort(np.where(np.isfinite(values), -values, -np.inf), kind="stable")
    for i in order[kept[order]].tolist():
        found.setdefault(int(ids[i]), i)
        if len(found) == _SHOWN:
            break
    return [
        LargeSample(own, int(steps[i]), float(values[i]), len(np.unique(steps[ids == own]))) for own, i in found.items()
    ]
