"""A saved Trajectory, checked wholly before anything of it is taken over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lipcore.metric.state import check_like
from lipcore.trajectory.building import Built
from lipcore.trajectory.tracker import Tracker


def check_pieces(pieces: Any, mine: Sequence[str], names: Sequence[str]) -> None:
    """Raise ValueError where a state is of other parts of sharded parameters than this rank's (`mine`)."""
    check_like("pieces", pieces, list(mine))
    for name, theirs, own in zip(names, pieces, mine, strict=True):
        if theirs != own:
            raise ValueError(
                f"pieces: of parameter '{name}' the state has {theirs or 'all'}, and this rank holds {own or 'all'}. "
                "A file that one rank has written by itself is for that rank; for another number of ranks save with "
                "torch.distributed.checkpoint: dcp.save({'lipcore': monitor}) on all ranks"
            )


def prepared_loads(state: dict[str, Any], built: Built) -> tuple[list[Callable[[], None]], list[int]]:
    """Return functions that take the trackers' states over, and the jumps; ValueError naming the first bad key."""
    groups: dict[str, Mapping[str, Tracker]] = {"trackers": built.trackers, "gradients": built.of_gradients}
    for key in ("steps_seen", "rebased"):
        check_like(key, state.get(key), 0)
    check_like("apart", state.get("apart", ""), "")  # a state of an earlier lipcore has neither
    jumps = state.get("jumps", [])
    check_like("jumps", jumps, [0] * len(jumps) if isinstance(jumps, list) else [])
    loads = []
    for key, trackers in groups.items():
        given = state.get(key)
        check_like(key, dict.fromkeys(given) if isinstance(given, dict) else given, dict.fromkeys(trackers))
        for name, tracker in trackers.items():
            try:
                loads.append(tracker.prepare(state[key][name]))
            except ValueError as error:  # noqa: PERF203
                raise ValueError(f"{key}.{name}.{error}") from None
    return loads, list(jumps)
