"""What a Trajectory on one rank adds to the window of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lipcore.distributed.contribution import Sizes
from lipcore.distributed.packed import Packed, Together
from lipcore.metric.rank_part import Holding, RankPart
from lipcore.metric.results import Level, MetricResult
from lipcore.trajectory.building import Built
from lipcore.trajectory.describe import GRADIENTS, MOVES, OFFSETS
from lipcore.trajectory.kept_steps import MOST_BYTES
from lipcore.trajectory.moved_alike import check_moved_alike, gradients_of, movement, without_unreduced
from lipcore.trajectory.parameters import WatchedParameter
from lipcore.trajectory.shard_sums import ShardSums
from lipcore.trajectory.sketch_part import SketchPart, paths_of, sketch_sums
from lipcore.trajectory.sketch_tracker import SketchTracker
from lipcore.trajectory.table import COLUMN
from lipcore.trajectory.whole import PathSoFar, Place, Whole, places_of

_GONE = (
    "ring: the window has {0} steps, the ring keeps {1}, and of those before not all are kept beside it ({2} MiB at "
    "most); path lengths of shards do not add up, only the squares of single steps "
    "do. Use ring={0} or more, or shorter windows"
)


@dataclass
class TrajectoryPart(RankPart):
    """A Trajectory's window on one rank: scalars per parameter and step, no copies of parameters.

    Attributes:
        agreed: settings and the number of steps.
        holding: the parameters.
        names: of the parameters here, in the order of the columns of `sums`.
        own_paths: path since the reference of this rank's places, by name and level.
        empty: a result without numbers.
        before: the paths up to the last window; brought up to this one, unless it is `open`.
        carried: of earlier steps of the window, which ranks have made that held other parts; counted here.
    """

    agreed: dict[str, Any]
    holding: Holding
    names: list[str]
    sums: ShardSums
    own_paths: dict[tuple[str, Level], float]
    empty: MetricResult
    before: PathSoFar
    carried: ShardSums | None = None
    open: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the single steps."""
        return sum(tensor.nbytes for tensor in (self.sums.steps, *self.sums.gradients.values()))

    def sizes(self) -> Sizes:
        """Return how many numbers there are, by the parameters of all ranks."""
        owners = self.holding.ownership
        assert owners is not None
        steps, stages = self.agreed["steps"], len(self.agreed["gradients"])
        sums, largest = ShardSums.sizes(steps, len(owners.names), stages, steps)
        sums += len(self._places)
        return Sizes(largest + 2 + 2 * stages, lambda _: sums)

    def packed(self) -> Packed:
        """Return the sums with a column for each parameter of all ranks, and 0 where another rank counts it."""
        owners = self.holding.ownership
        assert owners is not None
        index = {name: i for i, name in enumerate(owners.names)}
        counted = [i for i, name in enumerate(self.names) if name in owners.mine]
        where = [index[name] for name in self.names]
        spread = self.sums.spread(where, counted, len(index))
        if self.carried is not None:
            spread = spread.after(self.carried.spread(where, range(len(where)), len(index)))
        places = self._places
        spread.paths = spread.added.new_zeros(len(places))
        for i in self._alone(places):
            name, level, members = places[i]
            if owners.names[members[0]] in owners.mine:
                spread.paths[i] = self.own_paths[name, level]
        packed = spread.packed()
        alike = [] if self.carried is not None else [i for i, n in enumerate(self.names) if n in owners.replicas]
        packed.largest += [movement(self.sums.steps, alike), gradients_of(self.sums.gradients, alike)]
        return packed

    def result(self, together: Together) -> MetricResult:
        """Return the numbers of whole parameters."""
        moved, gradients = together.largest[-2:]
        check_moved_alike(moved)
        stages, places = self.agreed["gradients"], self._places
        reduced = without_unreduced(gradients, stages, self.empty)
        wanted = frozenset(self.agreed["quantities"]) - (frozenset(stages) - reduced)
        (sums,) = ShardSums.of_packed(together, stages)
        whole = Whole(sums, places, self.agreed["end"], self.before, self._alone(places))
        after = whole.add_to(self.empty, wanted, self.agreed["length"])
        if not self.open:
            self.before.end, self.before.paths = after.end, after.paths
        return self.empty

    @property
    def _places(self) -> list[Place]:
        owners = self.holding.ownership
        assert owners is not None
        return places_of(owners.names, owners.groups)

    def _alone(self, places: Sequence[Place]) -> set[int]:
        """Return which places one rank counts alone, and knows the path of."""
        owners = self.holding.ownership
        if not self.agreed["paths"]:
            return set()
        assert owners is not None
        return {i for i, (*_, members) in enumerate(places) if owners.alone(owners.names[m] for m in members)}


def part_of(
    built: Built,
    watched: list[WatchedParameter],
    wanted: Sequence[str],
    every_steps: int,
    holding: Holding,
    empty: MetricResult,
    before: PathSoFar,
    carried: ShardSums | None,
) -> TrajectoryPart | SketchPart | str:
    """Return what is to be merged of the open window; why there is nothing, where it cannot be."""
    tracker = built.first
    steps = tracker.window_steps
    built.align()
    count, rows = len(watched), tracker.window_rows().cpu()
    single = tracker.recent.of_tensors(steps)
    of_gradients = {name: found.recent.of_tensors(steps) for name, found in built.of_gradients.items()}
    if single is None or any(found is None for name, found in of_gradients.items() if name in wanted):
        return _GONE.format(steps, tracker.table.recent.shape[0], MOST_BYTES >> 20)
    gradient_sums = sums = ShardSums.nothing(count)
    if isinstance(tracker, SketchTracker):
        sums = sketch_sums(tracker, rows, single)
    else:
        gradient_sums = sums = ShardSums.of_rows(rows[:count], single, 0)
    for stage, gradients in built.of_gradients.items():
        squares = of_gradients[stage]
        if stage in wanted and squares is not None:
            gradient_sums.gradients[stage] = squares[:, :, 0].contiguous()
            gradient_sums.no_gradients[stage] = sums.added.new_tensor([float(steps - gradients.window_steps)])
    known = [q for q in tracker.quantities if q in (*MOVES, *OFFSETS) and q in wanted]
    if every_steps > 1 and next(iter(built.trackers)) == "updates":
        known.remove("path_length")  # single steps out of many make neither a path nor a chord
    for quantity in wanted:
        if quantity not in (*known, *GRADIENTS) and any(quantity in t.quantities for t in built.trackers.values()):
            empty.details[f"{quantity}_off"] = "not merged over ranks; each rank's own is in its own window"
    agreed = {
        "every_steps": every_steps,
        "quantities": [*known, *sorted(gradient_sums.gradients)],
        "gradients": sorted(gradient_sums.gradients),
        "length": "path_length" if every_steps == 1 else "chord_length",
        "steps": steps + (0 if carried is None else len(carried.steps)),
        "end": int(tracker.table.cursor[0]),
        "paths": not bool(rows[-1, COLUMN["total_path"]].isnan()),
    }
    names = [parameter.name for parameter in watched]
    if isinstance(tracker, SketchTracker):
        agreed |= tracker.agreed
        own = paths_of(tracker, rows, COLUMN["total_path"])
        return SketchPart(
            agreed, holding, tracker.members, tracker.sketch_groups, sums, gradient_sums, names, own, empty, before
        )
    paths = dict(zip(zip(tracker.places.names, tracker.places.levels, strict=True),
                     rows[-len(tracker.places) :, COLUMN["total_path"]].tolist(), strict=True))  # fmt: skip
    if carried is not None:
        carried = carried.of_stages(sums.gradients)
    return TrajectoryPart(agreed, holding, names, sums, paths, empty, before, carried)
