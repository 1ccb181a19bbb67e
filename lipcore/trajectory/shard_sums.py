"""What shards of one model add up to over a window: squares of single steps add up, lengths do not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lipcore.distributed.packed import Packed, Together
from lipcore.metric.state import checked_tensor
from lipcore.trajectory.table import COLUMN, M2, points_of

#: Columns of `added` and of `largest`.
M2_SUM, DISTANCE_SQ, WEIGHT_SQ, NONFINITE_ELEMENTS = range(4)
MAX_ABS_LAST, MAX_ABS, FEWEST_POINTS, TOTAL_STEPS = range(4)  # the third is negative


@dataclass
class ShardSums:
    """Sums over shards of every parameter, float64.

    Attributes:
        steps: [steps, parameters, 2], squared norms of update and weight; NaN where a shard was left out.
        added: [parameters, 4].
        largest: [parameters, 4].
        gradients: by quantity, squared norms [steps, parameters]; NaN where there was none.
        no_gradients: by quantity, how many of the steps had none.
        paths: [places], the path since the reference of places that one rank has alone; 0 elsewhere.
    """

    steps: Tensor
    added: Tensor
    largest: Tensor
    paths: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)
    no_gradients: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_rows(cls, rows: Tensor, steps: Tensor, places: int) -> ShardSums:
        """Return those of the tensors' rows of the ledger and their single steps."""
        square = [COLUMN[name] for name in ("distance", "weight")]
        elements = rows[:, COLUMN["nonfinite_elements"]]
        added = torch.stack([rows[:, M2], *rows[:, square].square().unbind(1), elements], dim=1)
        others = [rows[:, COLUMN[name]] for name in ("max_abs_last", "max_abs_max", "total_steps")]
        largest = torch.stack([*others[:2], -points_of(rows), others[2]], dim=1)
        return cls(steps, added, largest, rows.new_zeros(places))

    @classmethod
    def nothing(cls, parameters: int) -> ShardSums:
        """Return those of no step, for what is known of gradients alone."""
        empty = torch.zeros(parameters, 4, dtype=torch.float64, device="cpu")
        return cls(empty.new_zeros(0, parameters, 2), empty, empty.clone(), empty.new_zeros(0))

    def spread(self, index: Sequence[int], counted: Sequence[int], parameters: int) -> ShardSums:
        """Return the same with a column for each of the parameters of all ranks.

        Args:
            index: where each of the columns here stands among them.
            counted: which of the columns here count; the others are replicas that another rank counts.
            parameters: how many there are.
        """
        where = torch.tensor([index[i] for i in counted], dtype=torch.int64, device="cpu")
        chosen = torch.tensor(list(counted), dtype=torch.int64, device="cpu")

        def put(values: Tensor, dim: int, nothing: float = 0.0) -> Tensor:
            shape = list(values.shape)
            shape[dim] = parameters
            return values.new_full(shape, nothing).index_copy_(dim, where, values.index_select(dim, chosen))

        return ShardSums(
            put(self.steps, 1),
            put(self.added, 0),
            put(self.largest, 0, -torch.inf),
            self.paths,
            {stage: put(squares, 1) for stage, squares in self.gradients.items()},
            self.no_gradients,
        )

    def plus(self, other: ShardSums) -> ShardSums:
        """Return those of other shards of the same parameters over the same steps, with these."""
        return ShardSums(
            self.steps + other.steps,
            self.added + other.added,
            torch.maximum(self.largest, other.largest),
            self.paths,
            {stage: squares + other.gradients[stage] for stage, squares in self.gradients.items()},
            {stage: torch.maximum(n, other.no_gradients[stage]) for stage, n in self.no_gradients.items()},
        )

    def after(self, before: ShardSums) -> ShardSums:
        """Return those of earlier steps of the window and these together. What is known of the last step, of points and
        since the reference is as it is here."""
        added, largest = self.added.clone(), self.largest.clone()
        for column in (M2_SUM, NONFINITE_ELEMENTS):
            added[:, column] += before.added[:, column]
        for column in (MAX_ABS,) if len(self.steps) else (MAX_ABS, MAX_ABS_LAST):
            largest[:, column] = torch.maximum(largest[:, column], before.largest[:, column])
        return ShardSums(
            torch.cat([before.steps, self.steps]),
            added,
            largest,
            self.paths,
            {stage: torch.cat([before.gradients[stage], squares]) for stage, squares in self.gradients.items()},
            {stage: before.no_gradients[stage] + n for stage, n in self.no_gradients.items()},
        )

    def of_stages(self, stages: Iterable[str]) -> ShardSums:
        """Return the same with these kinds of gradients alone."""
        kinds = [{stage: each[stage] for stage in stages} for each in (self.gradients, self.no_gradients)]
        return ShardSums(self.steps, self.added, self.largest, self.paths, *kinds)

    def state(self) -> dict[str, Any]:
        """Return them as a checkpoint holds them."""
        found = {name: getattr(self, name) for name in ("steps", "added", "largest")}
        return found | {"gradients": dict(self.gradients), "no_gradients": dict(self.no_gradients)}

    @classmethod
    def of_state(cls, state: Any) -> ShardSums:
        """Return them from :meth:`state`; ValueError naming what does not fit."""
        if not isinstance(state, dict):
            raise ValueError(f"sums: expected a dict, got {type(state).__name__}")
        steps = checked_tensor("sums.steps", state.get("steps"), torch.float64, (None, None, 2))
        count, parameters = steps.shape[:2]
        added, largest = (
            checked_tensor(f"sums.{key}", state.get(key), torch.float64, (parameters, 4))
            for key in ("added", "largest")
        )
        stages: list[dict[str, Tensor]] = []
        for key, shape in (("gradients", (count, parameters)), ("no_gradients", (1,))):
            given = state.get(key)
            if not isinstance(given, dict):
                raise ValueError(f"sums.{key}: expected a dict, got {type(given).__name__}")
            stages.append({
                stage: checked_tensor(f"sums.{key}.{stage}", value, torch.float64, shape)
                for stage, value in given.items()
            })  # fmt: skip
        return cls(steps, added, largest, steps.new_zeros(0), *stages)

    @staticmethod
    def sizes(steps: int, parameters: int, stages: int, gradient_steps: int) -> tuple[int, int]:
        """Return how many numbers :meth:`packed` has in its sums, without paths, and in its maxima: of so many single
        steps, and of gradients in so many of so many stages."""
        return (2 * steps + 4 + stages * gradient_steps) * parameters, 4 * parameters + stages

    def packed(self, *others: ShardSums) -> Packed:
        """Return them, and others after them, in the order of :meth:`of_packed`."""
        sums: list[Tensor] = []
        largest: list[Tensor] = []
        for each in (self, *others):
            stages = sorted(each.gradients)
            sums += [each.steps, each.added, each.paths, *(each.gradients[stage] for stage in stages)]
            largest += [each.largest, *(each.no_gradients[stage] for stage in stages)]
        return Packed(sums, largest)

    @classmethod
    def of_packed(cls, together: Together, *stages: Sequence[str]) -> list[ShardSums]:
        """Return what :meth:`packed` of all ranks together says; `stages`: for each of those that were packed, of which
        quantities it has gradients."""
        sums, largest = iter(together.sums), iter(together.largest)
        found = []
        for kinds in map(sorted, stages):
            steps, added, paths, most = next(sums), next(sums), next(sums), next(largest)
            gradients = {stage: next(sums) for stage in kinds}
            found.append(cls(steps, added, most, paths, gradients, {stage: next(largest) for stage in kinds}))
        return found
