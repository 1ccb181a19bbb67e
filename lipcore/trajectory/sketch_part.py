"""What a Trajectory with sketches adds to the window of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipcore.distributed.contribution import Sizes
from lipcore.distributed.packed import Packed, Together
from lipcore.metric.rank_part import Holding, RankPart
from lipcore.metric.results import Level, MetricResult, Places
from lipcore.trajectory.describe import Rows, quantiles_of
from lipcore.trajectory.moved_alike import check_moved_alike, gradients_of, movement, without_unreduced
from lipcore.trajectory.shard_sums import NONFINITE_ELEMENTS, WEIGHT_SQ, ShardSums
from lipcore.trajectory.sketch_errors import relative_errors
from lipcore.trajectory.sketch_history import SketchHistory
from lipcore.trajectory.sketch_tracker import SPLIT, SketchTracker
from lipcore.trajectory.whole import PathSoFar, Place, Whole, places_of

_STAGES = (
    "ranks hold other parameters (stages of a pipeline), whose sketches have elements of the same numbers; use mode "
    "'exact' or 'updates'"
)
_MIXED = (
    "in the group {0!r} a rank counts some of the parameters that share a sketch and another rank the others; use mode "
    "'exact' or 'updates'"
)


@dataclass
class SketchRankPart(RankPart):
    """Sketches of one rank among those of all, and which of them it counts.

    Attributes:
        members: names of the parameters of each sketch.
        groups: the group of each sketch.
    """

    agreed: dict[str, Any]
    holding: Holding
    members: list[list[str]]
    groups: list[str]

    def refused(self) -> str:
        """Return why the sketches cannot be added up, from who holds what."""
        owners = self.holding.ownership
        if owners is None:
            return ""
        if len(owners.everywhere) != len(owners.names):
            return _STAGES
        mixed = (g for g, names in zip(self.groups, self.members, strict=True) if not owners.counted_together(names))
        return next((_MIXED.format(group) for group in mixed), "")

    def _counted(self) -> list[int]:
        """Return which of the sketches this rank counts."""
        owners = self.holding.ownership
        assert owners is not None
        return [i for i, names in enumerate(self.members) if not owners.mine.isdisjoint(names)]


@dataclass
class SketchPart(SketchRankPart):
    """A window of sketches on one rank: squared norms of the slices of sketches per step, which add up over shards as
    those of groups do: no two shards have an element in common.

    Attributes:
        sums: a column for each slice.
        gradients: a column for each parameter.
        names: of the parameters, in the order of these.
        own_paths: path since the reference of slices, groups and the total, by name and level.
        empty: a result without numbers.
        before: the paths up to the last window; brought up to this one, unless it is `open`.
    """

    sums: ShardSums
    gradients: ShardSums
    names: list[str]
    own_paths: dict[tuple[str, Level], float]
    empty: MetricResult
    before: PathSoFar
    open: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the single steps."""
        return sum(tensor.nbytes for tensor in (self.sums.steps, *self.gradients.gradients.values()))

    def sizes(self) -> Sizes:
        """Return how many numbers there are, by the slices and the parameters."""
        owners = self.holding.ownership
        assert owners is not None
        steps, stages = self.agreed["steps"], len(self.agreed["gradients"])
        of_slices = ShardSums.sizes(steps, len(self.members) * SPLIT, 0, steps)
        of_gradients = ShardSums.sizes(0, len(owners.names), stages, steps)
        sums, largest = (a + b for a, b in zip(of_slices, of_gradients, strict=True))
        sums += len(self._places)
        return Sizes(largest + 2 + 2 * stages, lambda _: sums)

    def packed(self) -> Packed:
        """Return the sums of slices and of gradients, 0 where another rank counts them."""
        owners = self.holding.ownership
        assert owners is not None
        slices = len(self.members) * SPLIT
        counted = [sketch * SPLIT + j for sketch in self._counted() for j in range(SPLIT)]
        spread = self.sums.spread(range(slices), counted, slices)
        places = self._places
        spread.paths = spread.added.new_zeros(len(places))
        for i in self._alone(places):
            name, level, members = places[i]
            if not owners.mine.isdisjoint(self.members[members[0] // SPLIT]):
                spread.paths[i] = self.own_paths[name, level]
        index = {name: i for i, name in enumerate(owners.names)}
        mine = [i for i, name in enumerate(self.names) if name in owners.mine]
        packed = spread.packed(self.gradients.spread([index[name] for name in self.names], mine, len(index)))
        alike = [i for i, names in enumerate(self.members) if owners.replicas.issuperset(names)]
        packed.largest.append(movement(self.sums.steps, [i * SPLIT + j for i in alike for j in range(SPLIT)]))
        same = [i for i, name in enumerate(self.names) if name in owners.replicas]
        packed.largest.append(gradients_of(self.gradients.gradients, same))
        return packed

    def result(self, together: Together) -> MetricResult:
        """Return the estimates of all ranks, each with its standard error."""
        moved, gradients = together.largest[-2:]
        check_moved_alike(moved)
        owners = self.holding.ownership
        assert owners is not None
        wanted, places = frozenset(self.agreed["quantities"]), self._places
        stages = self.agreed["gradients"]
        sums, of_gradients = ShardSums.of_packed(together, [], stages)
        whole = Whole(sums, places, self.agreed["end"], self.before, self._alone(places))
        rows, distributions, after = whole.rows()
        slices = len(self.members) * SPLIT
        groups = list(dict.fromkeys(self.groups))
        row_group = [groups.index(group) for group in self.groups]
        table = torch.stack(rows)
        errors = relative_errors(table[:slices].numpy(), table[slices:-1].numpy(), SPLIT, row_group)
        where = Places([name for name, *_ in places[slices:]], [level for _, level, _ in places[slices:]])
        described = Rows(where, table[slices:], quantiles_of(distributions[2 * slices :]))
        described.add_to(self.empty, wanted, length=self.agreed["length"], relative_errors=errors)
        parameters = places_of(owners.names, owners.groups)
        Whole(of_gradients, parameters, self.agreed["end"]).add_gradients(
            self.empty, without_unreduced(gradients, stages, self.empty)
        )
        if not self.open:
            self.before.end, self.before.paths = after.end, after.paths
        return self.empty

    @property
    def _places(self) -> list[Place]:
        names = [f"{sketch}#{j}" for sketch in range(len(self.members)) for j in range(SPLIT)]
        return places_of(names, [group for group in self.groups for _ in range(SPLIT)])

    def _alone(self, places: Sequence[Place]) -> set[int]:
        """Return which places one rank counts alone, and knows the path of."""
        owners = self.holding.ownership
        assert owners is not None
        if not self.agreed["paths"]:
            return set()
        names = [{name for m in members for name in self.members[m // SPLIT]} for _, _, members in places]
        return {i for i, each in enumerate(names) if owners.alone(each)}


@dataclass
class KeptSketchesPart(SketchRankPart):
    """Kept sketches of one rank, [steps, sketches' kinds, buckets].

    Attributes:
        kept: by which ranks hold copies of what they are of.
        kinds: which of the kinds each of the groups' sketches adds to.
    """

    kept: Tensor
    kinds: list[int]

    @property
    def nbytes(self) -> int:
        """Bytes of the sketches."""
        return self.kept.nbytes

    def refused(self) -> str:
        """Return why the sketches cannot be added up, from who holds what."""
        owners = self.holding.ownership
        if owners is None or (why := super().refused()):
            return "" if owners is None else why
        for kind in set(self.kinds):
            names = [n for names, k in zip(self.members, self.kinds, strict=True) if k == kind for n in names]
            if not owners.counted_together(names):
                return _MIXED.format("total")
        return ""

    def sizes(self) -> Sizes:
        """Return how many numbers a kind of sketches has."""
        return Sizes(0, lambda _: self.kept[:, 0].numel())

    def packed(self) -> Packed:
        """Return the sum of the kinds that this rank counts."""
        mine = {self.kinds[i] for i in self._counted()}
        kept = [self.kept[:, kind] for kind in sorted(mine)]
        return Packed([sum(kept, torch.zeros_like(self.kept[:, 0]))], [])

    def result(self, together: Together) -> MetricResult:
        """Return the sketches of the whole model as a detail."""
        return MetricResult("trajectory", matrix=together.sums[0])


def sketch_sums(tracker: SketchTracker, rows: Tensor, single: Tensor) -> ShardSums:
    """Return the window's sums per slice of a sketch. The weights' norms and elements that are not finite are known
    without a sketch, and stand at the first slice."""
    slices = len(tracker.watched)
    sums = ShardSums.of_rows(rows[:slices], single, 0)
    for column, of_parameters in ((WEIGHT_SQ, tracker.weight_sq), (NONFINITE_ELEMENTS, tracker.nonfinite)):
        sums.added[:, column] = 0
        sums.added[::SPLIT, column] = tracker.by_sketch(of_parameters).cpu()
    return sums


def paths_of(tracker: SketchTracker, rows: Tensor, column: int) -> dict[tuple[str, Level], float]:
    """Return the path since the reference of slices, groups and the total."""
    names = [f"{i // SPLIT}#{i % SPLIT}" for i in range(len(tracker.watched))]
    found: dict[tuple[str, Level], float] = {(n, "tensor"): float(rows[i, column]) for i, n in enumerate(names)}
    places = zip(tracker.places.names, tracker.places.levels, strict=True)
    return found | dict(zip(places, rows[-len(tracker.places) :, column].tolist(), strict=True))


def kept_part(tracker: SketchTracker, holding: Holding, agreed: dict[str, Any]) -> KeptSketchesPart:
    """Return what the kept sketches of this rank add to those of all."""
    history: SketchHistory = tracker.history
    agreed = agreed | {"kept": history.steps.tolist()}
    return KeptSketchesPart(agreed, holding, tracker.members, tracker.sketch_groups, history.by_kind, tracker.kinds)
