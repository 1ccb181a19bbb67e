"""Numbers of whole parameters, groups and the total over a window, from what their shards add up to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipcore.metric.distribution import Distribution
from lipcore.metric.results import Level, MetricResult, Places
from lipcore.metric.state import is_count
from lipcore.trajectory.describe import NormRows, Rows, quantiles_of
from lipcore.trajectory.shard_sums import (
    DISTANCE_SQ,
    FEWEST_POINTS,
    M2_SUM,
    MAX_ABS,
    MAX_ABS_LAST,
    NONFINITE_ELEMENTS,
    TOTAL_STEPS,
    WEIGHT_SQ,
    ShardSums,
)
from lipcore.trajectory.table import COLUMN, COLUMNS, FOLDED, M2, STEPS

Place = tuple[str, Level, list[int]]  #: name, level, and which parameters it is made of


def places_of(names: Sequence[str], groups: Sequence[str]) -> list[Place]:
    """Return every parameter, every group in the order of its first member, and the total."""
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    found: list[Place] = [(name, "tensor", [i]) for i, name in enumerate(names)]
    found += [(group, "group", indices) for group, indices in members.items()]
    return [*found, ("total", "total", list(range(len(names))))]


@dataclass
class PathSoFar:
    """The path since the reference up to a step, by place: what windows of shards that follow each other add to."""

    end: int = -1  #: after how many steps; -1: nothing is known
    paths: dict[tuple[str, Level], float] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Return it as a checkpoint holds it."""
        if self.end < 0:
            return {}
        return {"end": self.end, "places": [[name, level, path] for (name, level), path in self.paths.items()]}

    @classmethod
    def of_state(cls, state: Any) -> PathSoFar:
        """Return it from :meth:`state`; {} is one of which nothing is known. ValueError where it is neither."""
        if state == {}:
            return cls()
        places = state.get("places") if isinstance(state, dict) else None
        if not isinstance(places, list) or not is_count(state.get("end")) or not all(map(_is_place, places)):
            raise ValueError(f"so_far: expected a step and the paths up to it, got {state!r:.80}")
        return cls(state["end"], {(name, level): float(path) for name, level, path in places})


@dataclass
class Whole:
    """Whole parameters over one window.

    Attributes:
        sums: over all shards.
        end: after how many steps the window ends.
        before: the paths up to an earlier window's end.
        alone: indices of places whose path since the reference one rank knows alone.
    """

    sums: ShardSums
    places: list[Place]
    end: int
    before: PathSoFar = field(default_factory=PathSoFar)
    alone: Collection[int] = ()

    def add_to(self, result: MetricResult, wanted: frozenset[str], length: str) -> PathSoFar:
        """Add all wanted quantities to a result; return the paths up to the window's end. `length` is what the sum of
        update norms is called."""
        rows, distributions, after = self.rows()
        where = Places([name for name, *_ in self.places], [level for _, level, _ in self.places])
        Rows(where, torch.stack(rows), quantiles_of(distributions)).add_to(result, wanted, length=length)
        self.add_gradients(result, wanted)
        return after

    def add_gradients(self, result: MetricResult, wanted: frozenset[str]) -> None:
        """Add the wanted norms of gradients to a result."""
        where = Places([name for name, *_ in self.places], [level for _, level, _ in self.places])
        for stage in self.sums.gradients.keys() & wanted:
            self._add_gradients(result, stage, where)

    def rows(self) -> tuple[list[Tensor], list[Distribution], PathSoFar]:
        """Return the ledger's row of every place, the distributions of its update norm and ratio, and the paths up to
        the window's end."""
        rows, distributions = [], []
        after = PathSoFar(self.end)
        firsts = [self._first_step(i) for i in range(self.sums.steps.shape[1])]
        for i, (name, level, members) in enumerate(self.places):
            squares, left_out = _together(self.sums.steps[:, members])
            norms = squares.sqrt()
            row = self._row(members, norms)
            row[COLUMN["nonfinite_steps"]] = left_out.sum()
            first = min(firsts[member] for member in members)
            path = float(self.sums.paths[i]) if i in self.alone else self._path((name, level), first, norms[:, 0])
            row[COLUMN["total_path"]] = path
            after.paths[name, level] = path
            updates, ratios = Distribution(), Distribution()
            updates.observe(norms[:, 0])
            ratios.observe(_ratios(norms))
            rows.append(row)
            distributions += [updates, ratios]
        return rows, distributions, after

    def squares(self, of_tensors: Tensor) -> Tensor:
        """Return squares of single steps of every place, [steps, places, kinds], from those of parameters."""
        return torch.stack([_together(of_tensors[:, members])[0] for _, _, members in self.places], dim=1)

    def norm_rows(self, stage: str) -> tuple[list[Tensor], list[Distribution]]:
        """Return what the ledger has of the norms of gradients, as :meth:`rows` does."""
        rows, distributions = [], []
        for numbers, distribution in self._gradients(stage):
            row = self.sums.added.new_zeros(len(COLUMNS))
            for column, number in zip(("steps", "nonfinite_steps", "path", "update_last", "update_max"), numbers,
                                      strict=True):  # fmt: skip
                row[COLUMN[column]] = number
            rows.append(row)
            distributions += [distribution, Distribution()]
        return rows, distributions

    def _row(self, members: list[int], norms: Tensor) -> Tensor:
        added, largest = self.sums.added[members], self.sums.largest[members]
        counted = norms[:, 0].isfinite()
        finite, ratios = norms[counted, 0], _ratios(norms[counted])
        row = added.new_zeros(len(COLUMNS))
        row[STEPS], row[COLUMN["path"]] = len(finite), finite.sum()
        row[M2] = added[:, M2_SUM].sum()
        row[FOLDED] = (-largest[:, FEWEST_POINTS]).max()
        row[COLUMN["total_steps"]] = largest[:, TOTAL_STEPS].max()
        row[COLUMN["distance"]] = added[:, DISTANCE_SQ].sum().sqrt()
        row[COLUMN["weight"]] = added[:, WEIGHT_SQ].sum().sqrt()
        row[COLUMN["nonfinite_elements"]] = added[:, NONFINITE_ELEMENTS].sum()
        row[COLUMN["zero_steps"]] = (finite == 0).sum()
        row[COLUMN["max_abs_last"]] = largest[:, MAX_ABS_LAST].max()
        row[COLUMN["max_abs_max"]] = largest[:, MAX_ABS].max()
        if len(finite):
            row[COLUMN["update_last"]], row[COLUMN["update_max"]] = finite[-1], finite.max()
            row[COLUMN["ratio_last"]], row[COLUMN["ratio_sum"]] = ratios[-1], ratios.sum()
            row[COLUMN["ratio_max"]] = ratios.max()
        return row

    def _path(self, place: tuple[str, Level], first: int, norms: Tensor) -> float:
        """Return the path since the reference: of the steps from `first` on where it lies in the window, else with what
        windows before have added up; NaN where those are not known."""
        if first >= 0:
            return float(norms[first:].nansum())
        if self.before.end == self.end - len(norms):
            return self.before.paths.get(place, torch.nan) + float(norms.nansum())
        return torch.nan

    def _first_step(self, parameter: int) -> int:
        """Return which of the window's steps is the first since the parameter's reference; -1 for one before."""
        since = int(self.sums.largest[parameter, TOTAL_STEPS])
        finite = self.sums.steps[:, parameter, 0].isfinite().nonzero().flatten()
        if since == 0:
            return len(self.sums.steps)
        return int(finite[-since]) if since < len(finite) else 0 if since == len(finite) else -1

    def _add_gradients(self, result: MetricResult, stage: str, where: Places) -> None:
        if int(self.sums.no_gradients[stage]) >= len(self.sums.gradients[stage]):
            return
        columns, distributions = zip(*self._gradients(stage), strict=True)
        numbers = np.concatenate([np.array(columns, dtype=np.float64).T, quantiles_of(list(distributions))])
        NormRows(where, numbers).add_to(result, stage)

    def _gradients(self, stage: str) -> list[tuple[list[float], Distribution]]:
        """Return of every place: steps, steps left out, sum, last and largest norm; and the norms' distribution."""
        missing, squares = int(self.sums.no_gradients[stage]), self.sums.gradients[stage]
        found = []
        for _, _, members in self.places:
            joined, left_out = _together(squares[:, members, None])
            norms = joined[:, 0].sqrt()
            finite = norms[norms.isfinite()]
            last, most = (float(finite[-1]), float(finite.max())) if len(finite) else (0.0, 0.0)
            skipped = max(int(left_out.sum()) - missing, 0)
            distribution = Distribution()
            distribution.observe(norms)
            found.append(([len(finite), skipped, float(finite.sum()), last, most], distribution))
        return found


def _together(each: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squares of several parameters together, [steps, kinds], and in which steps one was left out: the
    others go on; without any, the step is left out too."""
    left_out = each[..., 0].isnan()
    squares = torch.where(left_out[..., None], 0.0, each).sum(dim=1)
    squares[left_out.all(dim=1)] = torch.nan
    return squares, left_out.any(dim=1)


def _is_place(place: Any) -> bool:
    return isinstance(place, list) and len(place) == 3 and isinstance(place[2], float)


def _ratios(norms: Tensor) -> Tensor:
    return torch.where(norms[:, 0] == 0, 0.0, norms[:, 0] / norms[:, 1])
