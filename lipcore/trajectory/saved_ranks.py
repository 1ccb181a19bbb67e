"""The state of a Trajectory among those of several ranks: copies lie as parameters do, and what the steps of the open
window add up to goes on with any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lipcore import _core
from lipcore.distributed.placed import counts_here, placed_like, tied_to
from lipcore.distributed.rank_axis import Place
from lipcore.metric.distribution import Distribution
from lipcore.metric.state import trouble_of
from lipcore.models.bits import bits_of
from lipcore.models.dtensors import local_of
from lipcore.trajectory.building import Built
from lipcore.trajectory.parameters import WatchedParameter
from lipcore.trajectory.shard_sums import ShardSums
from lipcore.trajectory.table import COLUMN, FOLDED, POINTS
from lipcore.trajectory.whole import PathSoFar, Whole, places_of

State = dict[str, Any]
_KEPT = [COLUMN["total_steps"], POINTS, FOLDED]  # columns that a part of a parameter has as the whole does
_OTHER_VALUES = (
    "copies.{0}.{1}: parameter '{0}' has other values in the checkpoint than on the rank that loads it here had when "
    "it was saved: several ranks had different parameters of this name, and a checkpoint keeps one of them. Stages of "
    "a pipeline: give each rank names of its own with prefix=; models that ranks train apart: pass group=None; then "
    "save anew. This checkpoint cannot be used for lipcore: leave the monitor out of the load"
)
ANEW = "; to go on without it, leave the monitor out of the load and begin with a new one"


# ---- copies


def split(state: State, held: Mapping[str, Any]) -> tuple[State, State]:
    """Split a state into copies by parameter and kind, and the rest. The kinds follow from the settings alone.

    Args:
        held: what this rank holds of each watched parameter, by name.
    """
    exact = state["trackers"].get("exact")
    if exact is None:
        return {}, dict(state)
    blocks, closed = state["window_blocks"] - 1, exact["closed"]
    tensors: State = {}
    whole_ones: State = {}
    for name, whole in held.items():
        own = dict(exact["tensors"][name])
        like = own["deviation"]
        own.setdefault("earlier", torch.zeros_like(like, dtype=torch.float64))
        per_element = "m2" in own
        if per_element:
            own.setdefault("earlier_m2", torch.zeros_like(like))
        for i in range(blocks):
            own[f"closed{i}"] = closed[i]["means"][name] if i < len(closed) else torch.zeros_like(like)
            if per_element:
                own[f"closed{i}_m2"] = closed[i]["m2"][name] if i < len(closed) else torch.zeros_like(like)
        if not hasattr(whole, "placements"):
            whole_ones[name] = own
        tensors[name] = {kind: placed_like(tensor, whole) for kind, tensor in own.items()}
    first = exact["tensors"][next(iter(held))]
    rest = {key: value for key, value in exact.items() if key != "tensors"}
    rest["closed"] = [{key: block[key] for key in ("rows", "distributions")} for block in closed]
    rest["earlier"], rest["bits"] = "earlier" in first, _bits(whole_ones)
    return tensors, {**state, "trackers": {**state["trackers"], "exact": rest}}


def joined(tensors: Mapping[str, Any], rest: State) -> State:
    """Return the state that :func:`split` has split; ValueError where the copies are not those of this rank."""
    exact = rest.get("trackers", {}).get("exact")
    if not isinstance(exact, dict) or not tensors:
        return rest
    exact = dict(exact)
    earlier, bits = exact.pop("earlier", False), exact.pop("bits", {})
    local = {name: {kind: local_of(tensor) for kind, tensor in kinds.items()} for name, kinds in tensors.items()}
    for name, own in local.items():
        if missing := sorted({"prev", "ref", "deviation", "earlier"} - own.keys()):
            raise ValueError(f"copies: {missing[0]!r} is missing for parameter '{name}'")
        _check_copies(name, own)
    here = _bits({name: local[name] for name in bits if name in local})
    for name, own_bits in here.items():
        for kind, mine, theirs in zip(("prev", "ref"), own_bits, bits[name], strict=True):
            if mine != theirs:
                raise ValueError(_OTHER_VALUES.format(name, kind))
    kinds = ["prev", "ref", "deviation", "m2", *(["earlier", "earlier_m2"] if earlier else [])]
    exact["tensors"] = {name: {k: own[k] for k in kinds if k in own} for name, own in local.items()}
    exact["closed"] = [
        {
            **block,
            "means": {name: own[f"closed{i}"] for name, own in local.items()},
            "m2": {name: own[f"closed{i}_m2"] for name, own in local.items() if f"closed{i}_m2" in own},
        }
        for i, block in enumerate(exact["closed"])
    ]
    return {**rest, "trackers": {**rest["trackers"], "exact": exact}}


def _check_copies(name: str, own: Mapping[str, Any]) -> None:
    """Raise ValueError for what cannot be the copies of one parameter."""
    for kind, tensor in own.items():
        why = trouble_of(tensor) if isinstance(tensor, Tensor) else f"expected a tensor, got {type(tensor).__name__}"
        if why:
            raise ValueError(f"copies.{name}.{kind}: {why}")
    for kind, tensor in own.items():
        like = own["prev" if kind == "ref" else "deviation"].dtype
        fits = kind == "prev" or tensor.dtype == like or (kind != "ref" and tensor.dtype == torch.float64)
        if not fits or tensor.shape != own["prev"].shape:
            raise ValueError(
                f"copies.{name}.{kind}: expected {like} {list(own['prev'].shape)}, as prev and deviation have, got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )


def _bits(copies: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[int]]:
    """Return sums of the bits of each parameter's last values and reference; waits for a device once."""
    found = [bits_of(own[kind]) for own in copies.values() for kind in ("prev", "ref")]
    numbers = torch.stack(found).tolist() if found else []
    return {name: numbers[2 * i : 2 * i + 2] for i, name in enumerate(copies)}


# ---- the steps of the open window


def shares_of(built: Built, held: Mapping[str, Any], place: Place, before: ShardSums | None) -> State:
    """Return what this rank counts of the open window's steps, with what it goes on from (`before`): {"sums": numbers
    of whole parameters once all ranks' are added up}; {"gone": why} where single steps are gone, {"tied": why} where
    parameters do not say who counts them."""
    for name, tensor in held.items():
        if why := tied_to(tensor, place.numbers):
            return {"tied": f"parameter '{name}' {why}"}
    if len(built.trackers) > 1 or "sketch" in built.trackers:
        return {"tied": f"mode {built.choice.mode!r} with source {built.choice.source!r} keeps what is of these parts"}
    if place.apart:
        return {"tied": "each rank trains a model of its own (group=None)"}
    tracker = built.first
    if tracker.closed.maxlen:
        return {"gone": "a sliding window of parts of parameters does not go on with other parts"}
    steps = tracker.window_steps
    single = tracker.recent.of_tensors(steps)
    of_gradients = {name: found.recent.of_tensors(steps) for name, found in built.of_gradients.items()}
    if single is None or any(found is None for found in of_gradients.values()):
        return {"gone": f"the open window has {steps} steps, of which the ring (Trajectory(ring=)) does not have all"}
    sums = ShardSums.of_rows(tracker.measured()[: len(held)].cpu(), single, 0)
    for stage, squares in of_gradients.items():
        assert squares is not None
        sums.gradients[stage] = squares[:, :, 0].contiguous()
        missing = steps - built.of_gradients[stage].window_steps
        sums.no_gradients[stage] = sums.added.new_tensor([float(missing)])
    counted = [i for i, tensor in enumerate(held.values()) if counts_here(tensor, place.rank)]
    sums = sums.spread(range(len(held)), counted, len(held))
    return {"sums": (sums if before is None else sums.after(before)).state()}


def added_up(shares: Sequence[State], like: ShardSums) -> ShardSums:
    """Return the sums of several ranks together; `like` has their shapes."""
    total = like
    for share in shares:
        total = total.plus(ShardSums.of_state(share["sums"]))
    return total


def nothing_of(steps: int, parameters: int, missing: Mapping[str, float]) -> ShardSums:
    """Return the sums of a rank that counts nothing of a window of so many steps."""
    zeros = torch.zeros(steps, parameters, 2, dtype=torch.float64, device="cpu")
    largest = zeros.new_full((parameters, 4), -torch.inf)
    found = ShardSums(zeros, zeros.new_zeros(parameters, 4), largest, zeros.new_zeros(0))
    for stage, count in missing.items():
        found.gradients[stage] = zeros.new_zeros(steps, parameters)
        found.no_gradients[stage] = zeros.new_tensor([float(count)])
    return found


def paths_before(built: Built, known: PathSoFar, steps: int, whole: bool) -> State:
    """Return the paths since the reference up to the begin of the open window of so many steps, of whole parameters, by
    place; {} where they are not known."""
    tracker = built.first
    end = int(tracker.table.cursor[0])
    if whole and tracker.groups and not tracker.closed:
        rows = tracker.table.rows
        before = (rows[:, COLUMN["total_path"]] - rows[:, COLUMN["path"]]).clamp(min=0).tolist()
        places = zip(tracker.places.names, tracker.places.levels, before[-len(tracker.places) :], strict=True)
        return {"end": end - steps, "places": [list(place) for place in places]}
    return known.state() if known.end == end - steps else {}


# ---- what goes on with another number of ranks


def in_parts(counters: State, begin: State) -> State:
    """Return the state of a rank that goes on with other parts of the parameters: with the counters of all ranks, and
    no step in the open window; the steps before are beside it.

    Args:
        counters: {trackers or gradients: {name: those of the tracker}}.
        begin: this rank's state as it is, for everything else.
    """
    state = {**begin}
    for kind in ("trackers", "gradients"):
        state[kind] = {name: _begun(begin[kind][name], found) for name, found in counters[kind].items()}
    return state


def _begun(tracker: State, counters: State) -> State:
    rows = torch.zeros_like(tracker["rows"])
    kept = counters["rows"].to(rows)
    rows[:, COLUMN["group"]] = tracker["rows"][:, COLUMN["group"]]
    rows[:, _KEPT] = kept
    # Otherwise the next step would count the window's start once more.
    again = (rows[:, POINTS] == 0) & (rows[:, FOLDED] > 0)
    rows[again, POINTS] = _core.CONTINUES
    rows[:, COLUMN["total_path"]] = torch.nan
    return _with_counters(tracker, counters, rows, torch.zeros_like(tracker["recent"]["ring"]), [])


def _with_counters(
    tracker: State,
    counters: State,
    rows: Tensor,
    ring: Tensor,
    distributions: Sequence[Any],
    closed: Sequence[Any] = (),
) -> State:
    count = len(tracker["distributions"])
    states = [each.state_dict() for each in distributions] or [Distribution().state_dict() for _ in range(count)]
    found: State = {key: counters[key] for key in ("cursor", "settled", "open_steps")}
    written = int(counters["cursor"][0])
    seen = counters["settled"] + counters["open_steps"]
    recent = {"drained": written, "absorbed": seen, "ring": ring}
    extra: State = {key: torch.zeros_like(tracker[key]) for key in ("rms",) if key in tracker}
    found |= {key: counters[key] for key in ("earlier", "bits") if key in counters}
    return {**found, **extra, "rows": rows, "recent": recent, "distributions": states, "closed": list(closed)}


def in_whole(
    counters: State, begin: State, sums: ShardSums, watched: Sequence[WatchedParameter], paths: PathSoFar
) -> State:
    """Return the state of the one process that goes on with whole parameters, with all steps of the window."""
    places = places_of([one.name for one in watched], [one.group for one in watched])
    state = {**begin}
    (name, tracker), *_ = begin["trackers"].items()
    of_steps = counters["trackers"][name]
    whole = Whole(sums, places, int(of_steps["cursor"][0]), paths)
    found, distributions, _ = whole.rows()
    rows = torch.stack(found)
    rows[:, COLUMN["group"]] = tracker["rows"][:, COLUMN["group"]].to(rows)
    rows[:, _KEPT] = of_steps["rows"].to(rows)
    ring = _written(tracker["recent"]["ring"], int(of_steps["cursor"][0]), whole.squares(sums.steps))
    state["trackers"] = {name: _with_counters(tracker, of_steps, rows, ring, distributions)}
    state["gradients"] = {}
    for stage, tracker in begin["gradients"].items():
        of_stage, squares = counters["gradients"][stage], whole.squares(sums.gradients[stage][:, :, None])
        found, distributions = whole.norm_rows(stage)
        rows = torch.stack(found)
        rows[:, COLUMN["group"]] = tracker["rows"][:, COLUMN["group"]].to(rows)
        rows[:, _KEPT] = of_stage["rows"].to(rows)
        both = torch.cat([squares, torch.zeros_like(squares)], dim=2)
        ring = _written(tracker["recent"]["ring"], int(of_stage["cursor"][0]), both)
        state["gradients"][stage] = _with_counters(tracker, of_stage, rows, ring, distributions)
    return state


def _written(ring: Tensor, cursor: int, steps: Tensor) -> Tensor:
    ring = torch.zeros_like(ring)
    kept = min(len(steps), len(ring))
    index = torch.arange(cursor - kept, cursor, device="cpu") % len(ring)
    ring[index] = steps[len(steps) - kept :].to(ring)
    return ring


def counters_of(state: State) -> State:
    """Return the counters of a state's trackers, which are the same on all ranks."""
    found: State = {}
    for kind in ("trackers", "gradients"):
        found[kind] = {
            name: {
                **{key: tracker[key] for key in ("cursor", "settled", "open_steps", "earlier") if key in tracker},
                "rows": tracker["rows"][:, _KEPT].cpu(),
            }
            for name, tracker in state[kind].items()
        }
    return found
