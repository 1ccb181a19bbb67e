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

# Columns of the ledger, in the order of struct TrajectoryRow (csrc/math/ledger.h).
_COLUMNS = (
    *("steps", "path", "m2", "update_last", "update_max", "max_abs_last", "max_abs_max", "ratio_last", "ratio_sum"),
    *("ratio_max", "nonfinite_steps", "nonfinite_elements", "total_steps", "total_path", "distance", "weight"),
)
_WINDOW_COLUMNS = _COLUMNS.index("total_steps")
assert len(_COLUMNS) == _core.LEDGER_COLUMNS
_ALIGNMENT = 64  # elements; every tensor's state starts on a cache line


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

    * ``update_norm`` :math:`\|w_t - w_{t-1}\|` (last, mean, max, sum); ``update_ratio``
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

    State: three copies per parameter (previous and reference in its own dtype, mean in float32). Sums are float64.

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
        devices = {tensor.device for tensor in tensors}
        if len(devices) > 1:
            raise ValueError(
                f"model: parameters on several devices ({', '.join(sorted(map(str, devices)))}); make one Trajectory "
                "per "
                "device from (name, tensor) pairs"
            )
        self._state = _State(tensors)
        rows = len(parts) + len(self._groups) + 1
        self._ledger = torch.zeros(rows, _core.LEDGER_COLUMNS, dtype=torch.float64, device=tensors[0].device)
        entries = [
            (part.owner, part.key, part.name, *self._state.views(i), self._groups.index(part.group))
            for i, part in enumerate(parts)
        ]
        self._plan = _core.TrajectoryPlan(entries, len(self._groups), self._ledger)
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
            for name, tensor in pairs:
                if name in owner:
                    raise ValueError(f"model: two tensors are called {name!r}")
                owner[name] = tensor
        except TypeError:
            raise TypeError(
                f"model: expected a module or an iterable of (name, tensor), got {type(pairs).__name__}"
            ) from None
        return [_Part(owner, name, name, self._group_name(name)) for name in owner]

    def _group_name(self, name: str) -> str:
        group = self._group_of(name)
        if not isinstance(group, str) or not group:
            raise ValueError(f"groups: expected a non-empty group name for {name!r}, got {group!r}")
        return group

    # ---- the hot path

    def observe_step(self) -> None:
        """Take the parameters as they are now for the next point of the trajectory."""
        self._steps_seen += 1
        if self.every_steps == 1 or self._steps_seen % self.every_steps == 0:
            self._plan.step()

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
        rows = self._ledger.tolist()
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
            "ledger": self._ledger.clone(),
            "state": self._state.copies(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same model; ValueError naming the first difference, and nothing changed,
        otherwise."""
        self._require_bound()
        expected = self.state_dict()
        for key, mine in expected.items():
            if key not in state:
                raise ValueError(f"{key}: missing from the trajectory state")
            theirs = state[key]
            if key in ("version", "names", "groups", "every_steps") and theirs != mine:
                raise ValueError(f"{key}: the state has {_shorten(theirs)}, this trajectory has {_shorten(mine)}")
            if isinstance(mine, Tensor):
                _check_same_kind(key, theirs, mine)
        if set(state["state"]) != set(expected["state"]):
            raise ValueError(
                f"state: has {_shorten(sorted(state['state']))}, expected {_shorten(sorted(expected['state']))}"
            )
        for key, mine in expected["state"].items():
            _check_same_kind(f"state[{key!r}]", state["state"][key], mine)
        self._ledger.copy_(state["ledger"])
        self._state.load(state["state"])
        self._steps_seen = int(state["steps_seen"])


def _check_same_kind(key: str, theirs: Any, mine: Tensor) -> None:
    if not isinstance(theirs, Tensor) or theirs.shape != mine.shape or theirs.dtype != mine.dtype:
        what = f"{theirs.dtype} {list(theirs.shape)}" if isinstance(theirs, Tensor) else type(theirs).__name__
        raise ValueError(f"{key}: expected {mine.dtype} {list(mine.shape)}, got {what}")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _State:
    """The copies of all parameters: one flat allocation per kind and dtype, so that only w itself is scattered."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.counts = [tensor.numel() for tensor in tensors]
        self._dtypes = [tensor.dtype for tensor in tensors]
        self._flat: dict[str, Tensor] = {}
        self._views: list[tuple[Tensor, Tensor, Tensor]] = []
        sizes: dict[torch.dtype, int] = {}
        offsets = []
        for tensor in tensors:
            offsets.append(sizes.get(tensor.dtype, 0))
            sizes[tensor.dtype] = offsets[-1] + -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT
        for dtype, size in sizes.items():
            mean_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            for kind in ("prev", "ref", "mean"):
                flat = torch.zeros(size, dtype=mean_dtype if kind == "mean" else dtype, device=tensors[0].device)
                _core.advise_huge_pages(flat)
                self._flat[self._key(kind, dtype)] = flat
        for tensor, offset in zip(tensors, offsets, strict=True):
            # The state of a dense parameter lies in memory as the parameter does (channels_last, transposed).
            views = [
                self._flat[self._key(kind, tensor.dtype)].as_strided(tensor.shape, tensor.stride(), offset)
                for kind in ("prev", "ref", "mean")
            ]
            if not tensor.is_contiguous() and not torch.ops.aten.is_non_overlapping_and_dense(tensor):
                views = [torch.empty(0)] * 3  # refused by name when the plan is captured
            else:
                views[0].copy_(tensor.detach())
                views[1].copy_(tensor.detach())
            self._views.append((views[0], views[1], views[2]))

    @staticmethod
    def _key(kind: str, dtype: torch.dtype) -> str:
        return f"{kind}.{str(dtype).removeprefix('torch.')}"

    def views(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._views[i]

    def bytes_of(self, i: int) -> int:
        return self.counts[i] * (2 * self._dtypes[i].itemsize + (8 if self._dtypes[i] == torch.float64 else 4))

    def copies(self) -> dict[str, Tensor]:
        return {key: flat.clone() for key, flat in self._flat.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        for key, flat in self._flat.items():
            flat.copy_(state[key])


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
