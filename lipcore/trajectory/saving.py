"""A Trajectory's state: its own, and those that ranks have saved together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lipcore.distributed.rank_axis import Place
from lipcore.metric.rank_states import RankStates
from lipcore.metric.state import check_same, under_key
from lipcore.trajectory.reporting import Reported
from lipcore.trajectory.saved import check_pieces, prepared_loads
from lipcore.trajectory.saved_ranks import (
    ANEW,
    added_up,
    counters_of,
    in_parts,
    in_whole,
    joined,
    nothing_of,
    paths_before,
    shares_of,
    split,
)
from lipcore.trajectory.shard_sums import ShardSums
from lipcore.trajectory.sketch_places import first_indices
from lipcore.trajectory.whole import PathSoFar

_SPLIT = "split_replicas has each rank keep other parameters"

_OTHER_SHARES = (
    "{0}: the state was saved by {1} ranks of which each kept its share of the parameters (split_replicas), or all of "
    "them, and {2} has another share now. Load it with as many ranks, and with split_replicas as it was{3}"
)

_NOT_ALL = (
    "ranks: this is what one of {0} ranks has written by itself, and parameters were or are in parts. Load a "
    "checkpoint that all of them have saved together (torch.distributed.checkpoint), or on each rank the file that it "
    "has written"
)


class Saved(Reported):
    """A Trajectory's checkpoints."""

    def _settings(self) -> dict[str, Any]:
        choice = self._built.choice
        return {
            "version": self._version,
            "mode": choice.mode,
            "source": choice.source,
            "sketch": [choice.buckets, choice.seed] if choice.mode == "sketch" else [],
            "names": [parameter.name for parameter in self._watched],
            "groups": [parameter.group for parameter in self._watched],
            "every_steps": self.every_steps,
            "window_blocks": self._window_blocks,
            "ring": self._wanted.ring,
            **({"split_replicas": True} if self.keeps_parts else {}),
        }

    @property
    def _numbered(self) -> list[int]:
        """Numbers of the first elements here in sketches of parts; none in others."""
        return first_indices(self._watched) if "sketch" in self._built.trackers and any(self._pieces) else []

    def _check_fits(self, state: Any) -> None:
        check_same(state, self._settings())
        check_pieces(state.get("pieces"), self._pieces, [parameter.name for parameter in self._watched])
        if state.get("numbered", []) != self._numbered:
            raise ValueError("numbered: the state's sketches number the elements of parts in another way; start anew")

    def state_dict(self) -> dict[str, Any]:
        """Return settings, counters, scalars and copies by canonical names: tensors, numbers and strings only."""
        self._require_bound()
        self.flush()
        trackers = {key: tracker.state_dict() for key, tracker in self._built.trackers.items()}
        gradients = self._built.gradients.state_dict() if self._built.gradients else {}
        counts: dict[str, Any] = {"steps_seen": self._steps_seen, "rebased": self._rebased}
        counts |= {"apart": self._apart, "jumps": list(self._jumps), "pieces": list(self._pieces)}
        counts["numbered"] = self._numbered
        counts |= {"so_far": self._path_so_far.state(), "carried": self._carried.state() if self._carried else {}}
        return {**self._settings(), **counts, "trackers": trackers, "gradients": gradients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same model; ValueError naming the first difference, and nothing changed,
        otherwise."""
        self._require_bound()
        self._check_fits(state)
        loads, jumps = prepared_loads(state, self._built)
        so_far, carried = PathSoFar.of_state(state.get("so_far")), self._checked_carried(state.get("carried"))
        for load in loads:
            load()
        self._steps_seen, self._rebased = state["steps_seen"], state["rebased"]
        self._apart, self._jumps = state.get("apart", ""), jumps
        self._path_so_far, self._carried = so_far, carried
        self._single.before = 0  # the state's own numbers
        if self._built.unexplained is not None:
            self._built.unexplained.begin()
        self._single.start(self._built)

    def _checked_carried(self, state: Any) -> ShardSums | None:
        if state == {}:
            return None
        with under_key("carried"):
            found = ShardSums.of_state(state)
            if found.steps.shape[1] != len(self._watched) or found.gradients.keys() != self._built.of_gradients.keys():
                raise ValueError(f"sums: of {found.steps.shape[1]} parameters, and there are {len(self._watched)}")
        return found

    # ---- its state among those of other ranks

    def _held_parts(self) -> dict[str, Any]:
        held = {name: tensor for name, _, tensor in self._holding.held()}
        return {one.name: held[one.name] for one in self._watched}

    def split_state(self, state: dict[str, Any], place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split its state into copies that lie as the parameters do, and the rest, with what this rank counts of the
        open window."""
        held = self._held_parts()
        tensors, rest = split(state, held)
        self._built.align()
        share = {"tied": _SPLIT} if self.keeps_parts else None
        rest["share"] = share or shares_of(self._built, held, place, self._carried)
        steps = self._built.first.window_steps
        missed = {stage: steps - found.window_steps for stage, found in self._built.of_gradients.items()}
        if self._carried is not None:
            steps += len(self._carried.steps)
            missed = {stage: count + int(self._carried.no_gradients[stage]) for stage, count in missed.items()}
        whole = not any(self._pieces) and self._carried is None
        rest["window"] = {
            "steps": steps,
            "missed": missed,
            "paths": paths_before(self._built, self._path_so_far, steps, whole),
            "bits": rest["trackers"].get("exact", {}).get("bits", {}),
        }
        return tensors, rest

    def joined_state(self, tensors: Mapping[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in joined(tensors, rest).items() if key not in ("share", "window")}

    def empty_state(self, rest: dict[str, Any]) -> dict[str, Any]:
        """Return what all ranks have alike: where each holds whole parameters, everything."""
        counts = {key: value for key, value in rest.items() if key not in ("trackers", "gradients", "share", "pieces")}
        whole = not any(rest["pieces"]) and not rest["carried"]
        state = {key: value for key, value in rest.items() if key != "share"} if whole else {}
        why = {key: why for key, why in rest["share"].items() if key != "sums"}
        return {**counts, **why, "carried": {}, "counters": counters_of(rest), "whole": state}

    def continues(self, rest: dict[str, Any]) -> bool:
        """Return whether this rank holds the parts of parameters that it held then."""
        return bool(rest.get("pieces") == self._pieces)

    def load_ranks(self, saved: RankStates) -> str:
        """Continue from states that ranks have saved, and return what the open window lacks then; "" for nothing."""
        self._require_bound()
        own, alike = saved.own, saved.alike
        if own is not None and self.continues(own):
            self.load_state_dict(self.joined_state(saved.tensors, own))
            return ""
        if self.keeps_parts or (isinstance(alike, dict) and "split_replicas" in alike):
            raise ValueError(_OTHER_SHARES.format(self.name, saved.ranks, saved.place, ANEW))
        check_same(alike, self._settings())
        assert alike is not None
        if alike.get("whole") and not any(self._pieces):
            self.load_state_dict(self.joined_state(saved.tensors, alike["whole"]))
            return ""
        if not saved.complete:
            theirs = next((state.get("pieces") for state in saved.by_rank.values()), None)
            check_pieces(theirs, self._pieces, [parameter.name for parameter in self._watched])
            raise ValueError(_NOT_ALL.format(saved.ranks))
        if "tied" in alike:
            raise ValueError(
                f"{self.name}: the state was saved by {saved.ranks} ranks that held other parts of the parameters than "
                f"{saved.place} does, and cannot be cut anew: {alike['tied']}. Load it with the ranks, meshes and "
                f"placements of then{ANEW}"
            )
        return self._go_on(saved, alike)

    def _go_on(self, saved: RankStates, alike: dict[str, Any]) -> str:
        """Continue with other parts of the parameters than those that have saved had."""
        window, counters = alike["window"], alike["counters"]
        gone = str(alike.get("gone", ""))
        steps = 0 if gone else window["steps"]
        nothing = nothing_of(steps, len(self._watched), window["missed"])
        sums = nothing if gone else added_up([state["share"] for state in saved.others], nothing)
        here = split(self.state_dict(), self._held_parts())[1]
        keys = ("steps_seen", "rebased", "apart")
        state = {**here, **{key: alike[key] for key in keys}, "jumps": [], "carried": {}, "so_far": window["paths"]}
        if "exact" in counters["trackers"] and not any(self._pieces):
            counters["trackers"]["exact"]["bits"] = window["bits"]
        if saved.place.ranks == 1 and not gone:
            paths = PathSoFar.of_state(window["paths"])
            state = in_whole(counters, state, sums, self._watched, paths) | {"jumps": alike["jumps"]}
        else:
            state = in_parts(counters, state) | {"carried": sums.state() if steps else {}}
        self.load_state_dict(joined(saved.tensors, state))
        for tracker in self._built.trackers.values():
            if tracker.copies:
                tracker.measure()
        return gone
