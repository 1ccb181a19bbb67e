"""How the parameters move: path length, update norm, distance from the start, variance of the trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipcore import _core
from lipcore.metric import Metric, PlanLine
from lipcore.names import by_block, named_modules
from lipcore.results import Level, MetricResult, Value
from lipcore.trajectory_state import TrajectoryState

# Columns of the ledger, in the order of struct TrajectoryRow (csrc/math/trajectory_row.h).
_COLUMNS = (
    *("steps", "path", "points", "folded", "m2", "update_last", "update_max", "max_abs_last", "max_abs_max"),
    *("ratio_last", "ratio_sum", "ratio_max", "nonfinite_steps", "nonfinite_elements", "zero_steps"),
    *("total_steps", "total_path", "distance", "weight", "group"),
)
_WINDOW_COLUMNS = _COLUMNS.index("total_steps")
_POINTS, _FOLDED, _M2 = (_COLUMNS.index(name) for name in ("points", "folded", "m2"))
assert len(_COLUMNS) == _core.LEDGER_COLUMNS


@dataclass
class _Part:
    """One parameter: where it is looked up, what it is called, which group it adds to."""

    owner: dict[str, Tensor]
    key: str
    name: str
    group: str


class Trajectory(Metric):
    r"""Streaming statistics of the path that parameters take through training.

    For every parameter, every group and the total, with w_t the parameters after step t, w_0 the reference point (their
    values when the metric was bound) and a window of n steps:

    * ``update_norm`` :math:`\|w_t - w_{t-1}\|` (last, mean, max); ``update_ratio``
      :math:`\|w_t - w_{t-1}\| / \|w_t\|` (last, mean, max); ``max_abs_update`` (last, max)
    * ``path_length`` :math:`\sum_t \|w_t - w_{t-1}\|` over the window (sum) and since the reference (cumulative);
      called ``chord_length`` when `every_steps` > 1, because it then is a lower bound that no factor corrects
    * ``distance`` :math:`\|w_t - w_0\|` and ``directness`` = distance / cumulative path length (last)
    * ``variance`` :math:`\frac{1}{n+1} \sum_{t=0}^{n} \|w_t - \bar w\|^2` over the window's n + 1 points, its start
      included (Corollary 2 of Loukas et al., NeurIPS 2021)
    * ``weight_norm`` (last); ``nonfinite_steps`` and ``nonfinite_elements`` (sum)

    A group's norm is that of its parameters taken together. A parameter with NaN or infinite elements is left out of
    that step and counted; its statistics go on from its last finite values. Nothing is divided by a learning rate, and
    the loss reduction enters only as far as it changes the updates.

    State: three copies per parameter (previous and reference in its own dtype, mean in float32), and a fourth (the
    mean of earlier blocks, float32) once a window is longer than 512 steps. Sums are float64.

    Args:
        model: a module, whose trainable parameters are looked up at every step (so replaced ones are seen), or an
            iterable of (name, tensor): then only those very tensor objects are seen, not what replaces them.
        groups: name -> group name; default :func:`lipcore.names.by_block`.
        every_steps: look only at every k-th step.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> trajectory = Trajectory(layer)
    >>> with torch.no_grad():
    ...     _ = layer.weight.add_(torch.tensor([3.0, 4.0]))
    >>> trajectory.update()
    >>> round(trajectory.compute().path_length["total"].sum.value, 5)
    5.0
    """

    name = "trajectory"
    needs_steps = True
    _version = 1

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, Tensor]] | None = None,
        *,
        groups: Callable[[str], str] = by_block,
        every_steps: int = 1,
    ) -> None:
        if not isinstance(every_steps, int) or every_steps < 1:
            raise ValueError(f"every_steps: expected an integer >= 1, got {every_steps!r}")
        if not callable(groups):
            raise TypeError(f"groups: expected a callable name -> group name, got {type(groups).__name__}")
        self._group_of = groups
        self.every_steps = every_steps
        self._parts: list[_Part] = []
        self._steps_seen = 0
        if model is not None:
            self.bind(model)

    # ---- binding

    def bind(self, model: nn.Module | Iterable[tuple[str, Tensor]]) -> None:
        """Take the reference point: copies of all trainable parameters."""
        if self._parts:
            raise RuntimeError("this Trajectory is bound to a model already; make one Trajectory per model")
        parts = self._parts_of_module(model) if isinstance(model, nn.Module) else self._parts_of_pairs(model)
        if not parts:
            raise ValueError(
                "model: has no trainable parameter; a trajectory needs at least one with requires_grad=True"
            )
        self._groups = list(dict.fromkeys(part.group for part in parts))
        tensors = [part.owner[part.key] for part in parts]
        for part, tensor in zip(parts, tensors, strict=True):
            _core.check_storage(tensor, part.name)  # says what is wrong with a lazy, meta or sharded parameter
            if not bool(tensor.detach().isfinite().all()):
                raise ValueError(
                    f"model: parameter '{part.name}' has NaN or infinite values, so nothing can be measured from it"
                )
        devices = {tensor.device for tensor in tensors}
        if len(devices) > 1:
            raise ValueError(
                f"model: parameters on several devices ({', '.join(sorted(map(str, devices)))}); make one Trajectory "
                "per "
                "device from (name, tensor) pairs"
            )
        self._state = TrajectoryState(tensors)
        rows = len(parts) + len(self._groups) + 1
        self._ledger = torch.zeros(rows, _core.LEDGER_COLUMNS, dtype=torch.float64, device=tensors[0].device)
        groups = [self._groups.index(part.group) for part in parts]
        self._group_index = torch.tensor(groups, device=tensors[0].device)
        self._ledger[: len(parts), _COLUMNS.index("group")] = self._group_index.double()
        self._recent = self._ledger.new_zeros(1024, rows, 2)
        self._cursor = self._ledger.new_zeros(2)
        self._core_ledger = _core.Ledger(self._ledger, self._recent, self._cursor, len(parts))
        entries = [(part.owner, part.key, part.name, *self._state.views(i), None) for i, part in enumerate(parts)]
        self._plan = _core.TrajectoryPlan(entries, self._core_ledger)
        self._parts = parts

    def _parts_of_module(self, model: nn.Module) -> list[_Part]:
        parts, seen = [], set()
        for prefix, module in named_modules(model):
            for key, parameter in module._parameters.items():
                if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                    continue  # a tied parameter moves once
                seen.add(id(parameter))
                name = f"{prefix}.{key}" if prefix else key
                parts.append(_Part(module._parameters, key, name, self._group_name(name)))  # type: ignore[arg-type]
        return parts

    def _parts_of_pairs(self, pairs: Iterable[tuple[str, Tensor]]) -> list[_Part]:
        owner: dict[str, Tensor] = {}
        try:
            named = [(name, tensor) for name, tensor in pairs]
        except (TypeError, ValueError):
            raise TypeError(
                f"model: expected a module or an iterable of (name, tensor), got {type(pairs).__name__}"
            ) from None
        for name, tensor in named:
            if not isinstance(name, str) or not name or name in owner:
                raise ValueError(f"model: expected different, non-empty names, got {name!r}")
            owner[name] = tensor
        return [_Part(owner, name, name, self._group_name(name)) for name in owner]

    def _group_name(self, name: str) -> str:
        group = self._group_of(name)
        if not isinstance(group, str) or not group:
            raise ValueError(f"groups: expected a non-empty group name for {name!r}, got {group!r}")
        return group

    # ---- the hot path

    def observe_step(self) -> None:
        """Take the parameters as they are now for the next point of the trajectory."""
        due = (self._steps_seen + 1) % self.every_steps == 0
        if due and self._plan.step():  # raises before anything has changed
            self.settle()
        self._steps_seen += 1

    @property
    def step_call(self) -> Callable[[], object]:
        """The compiled step itself where every step is looked at."""
        self._require_bound()
        return self._plan.step if self.every_steps == 1 else self.observe_step

    def settle(self) -> None:
        """Close the open block of every parameter: its mean joins the earlier ones', its distance from them joins
        M2."""
        self._plan.block = 0
        self._ledger[:, _M2] += self._between()
        points, folded = self._ledger[:, _POINTS], self._ledger[:, _FOLDED]
        n = len(self._parts)
        self._state.fold(points[:n], folded[:n])
        folded += points
        points.zero_()

    def _between(self) -> Tensor:
        """Per row of the ledger: what the open block's mean adds to M2 when it is merged with the earlier ones."""
        n = len(self._parts)
        added = self._state.between(self._ledger[:n, _POINTS], self._ledger[:n, _FOLDED])
        groups = added.new_zeros(len(self._groups)).index_add_(0, self._group_index, added)
        return torch.cat([added, groups, added.sum().reshape(1)])

    def update(self) -> None:
        """Call after every optimizer step when the metric stands alone.

        Raises:
            RuntimeError: not bound to a model.
            ValueError: a parameter was removed, or no longer fits its state (shape, dtype, device, layout); nothing was
                updated then.
        """
        self._require_bound()
        self.observe_step()

    def _require_bound(self) -> None:
        if not self._parts:
            raise RuntimeError(
                "this Trajectory has no model; pass one to Trajectory(model) or to Monitor(model, metrics=[...])"
            )

    # ---- results

    def plan(self) -> list[PlanLine]:
        """One line per group: parameters, rule, bytes of persistent state."""
        self._require_bound()
        lines = []
        for group in self._groups:
            members = [i for i, part in enumerate(self._parts) if part.group == group]
            elements = sum(self._state.counts[i] for i in members)
            size = sum(self._state.bytes_of(i) for i in members)
            lines.append(PlanLine(group, f"{len(members)} parameters, {elements:,} elements, exact copies", size))
        return lines

    def finalize(self) -> MetricResult:
        """The open window's numbers; see the class for what they are."""
        self._require_bound()
        result = MetricResult(self.name, every_steps=self.every_steps)
        ledger = self._ledger
        if self._state.has_earlier:
            ledger = ledger.clone()
            ledger[:, _M2] += self._between()
        rows = ledger.tolist()
        places: list[tuple[str, Level]] = [(part.name, "tensor") for part in self._parts]
        places += [(group, "group") for group in self._groups]
        places.append(("total", "total"))
        for (place, level), row in zip(places, rows, strict=True):
            _describe(result, place, level, dict(zip(_COLUMNS, row, strict=True)), chord=self.every_steps > 1)
        return result

    def reset(self) -> None:
        """Start a new window at the parameters' last observed values; cumulative path and reference stay."""
        self._require_bound()
        self._ledger[:, :_WINDOW_COLUMNS] = 0
        self._plan.block = 0

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Version, names, step counter, ledger and the copies."""
        self._require_bound()
        return {
            "version": self._version,
            "names": [part.name for part in self._parts],
            "groups": [part.group for part in self._parts],
            "every_steps": self.every_steps,
            "steps_seen": self._steps_seen,
            "block": self._plan.block,
            "ledger": self._ledger.clone(),
            "state": {k: t.clone() for k, t in self._state.tensors(earlier=self._state.has_earlier).items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same model; ValueError naming the first difference, and nothing changed,
        otherwise."""
        self._require_bound()
        mine = {
            "version": self._version,
            "names": [part.name for part in self._parts],
            "groups": [part.group for part in self._parts],
            "every_steps": self.every_steps,
        }
        for key in (*mine, "steps_seen", "block", "ledger", "state"):
            if key not in state:
                raise ValueError(f"{key}: missing from the trajectory state")
            if key in mine and state[key] != mine[key]:
                raise ValueError(
                    f"{key}: the state has {_shorten(state[key])}, this trajectory has {_shorten(mine[key])}"
                )
        for key in ("steps_seen", "block"):
            if not isinstance(state[key], int) or state[key] < 0:
                raise ValueError(f"{key}: expected a number of steps, got {state[key]!r}")
        if not isinstance(state["state"], dict):
            raise ValueError(f"state: expected a dict of tensors, got {type(state['state']).__name__}")
        tensors = self._state.tensors(earlier="earlier.0" in state["state"])
        if set(state["state"]) != set(tensors):
            raise ValueError(f"state: has {_shorten(sorted(state['state']))}, expected {_shorten(sorted(tensors))}")
        _check_same_kind("ledger", state["ledger"], self._ledger)
        for key, tensor in tensors.items():
            _check_same_kind(f"state[{key!r}]", state["state"][key], tensor)
        self._ledger.copy_(state["ledger"])
        for key, tensor in tensors.items():
            tensor.copy_(state["state"][key])
        self._steps_seen, self._plan.block = int(state["steps_seen"]), int(state["block"])


def _check_same_kind(key: str, theirs: Any, mine: Tensor) -> None:
    if not isinstance(theirs, Tensor) or theirs.shape != mine.shape or theirs.dtype != mine.dtype:
        what = f"{theirs.dtype} {list(theirs.shape)}" if isinstance(theirs, Tensor) else type(theirs).__name__
        raise ValueError(f"{key}: expected {mine.dtype} {list(mine.shape)}, got {what}")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _describe(result: MetricResult, place: str, level: Level, row: dict[str, float], *, chord: bool) -> None:
    """One ledger row as named values."""
    steps, total = int(row["steps"]), int(row["total_steps"])
    note = ""
    if row["nonfinite_steps"]:
        note = f"{int(row['nonfinite_steps'])} steps had non-finite parameters, which were left out"

    def value(x: float, count: int = steps) -> Value:
        return Value(x if count else math.nan, count, "exact", count > 0, note if count else "no step observed")

    def add(quantity: str, **reducers: Value) -> None:
        result.add(quantity, place, level, **reducers)

    mean = 1 / steps if steps else math.nan
    add("update_norm", last=value(row["update_last"]), mean=value(row["path"] * mean), max=value(row["update_max"]))
    add("update_ratio", last=value(row["ratio_last"]), mean=value(row["ratio_sum"] * mean), max=value(row["ratio_max"]))
    add("max_abs_update", last=value(row["max_abs_last"]), max=value(row["max_abs_max"]))
    length = "chord_length" if chord else "path_length"
    add(length, sum=value(row["path"]), cumulative=value(row["total_path"], total))
    add("distance", last=value(row["distance"], total))
    directness = row["distance"] / row["total_path"] if row["total_path"] else math.nan
    moved = row["total_path"] > 0
    add("directness", last=Value(directness, total, "exact", moved, note if moved else "has not moved"))
    add("variance", last=value(row["m2"] / (steps + 1)))
    add("weight_norm", last=value(row["weight"], total))
    seen = steps + int(row["nonfinite_steps"])
    add("nonfinite_steps", sum=Value(row["nonfinite_steps"], seen))
    add("nonfinite_elements", sum=Value(row["nonfinite_elements"], seen))
