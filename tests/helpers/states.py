"""A monitor's state as tests look into it: what this rank has saved of each metric, under "metrics"."""

from __future__ import annotations

import copy
from typing import Any

from lipcore.distributed.rank_axis import Place, packed, spread, unpacked


def opened(state: dict[str, Any], rank: int = 0) -> dict[str, Any]:
    """A copy, with `metrics` and `logged` of a rank."""
    state = copy.deepcopy(state)
    own = unpacked("ranks", state.pop("ranks")[str(rank)])
    return state | own | {"alike": unpacked("alike", state["alike"]["all"])}


def sealed(state: dict[str, Any], rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """The state of :func:`opened`, as of another rank if that is said; its metrics are those of all ranks."""
    state = dict(state)
    own = {key: state.pop(key) for key in ("metrics", "logged", "waiting", "lacking") if key in state}
    alike, metrics = state["alike"], own.get("metrics")
    if isinstance(metrics, dict):
        metrics = {name: alike["metrics"].get(name) for name in metrics}
    state["alike"] = {"all": packed(alike | {"metrics": metrics, "ranks": ranks})}
    return state | {"ranks": spread(own, Place(rank, ranks))}
