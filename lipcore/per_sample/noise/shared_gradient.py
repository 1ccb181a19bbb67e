"""Whose samples are in the gradient: this rank's alone, or those of all ranks over which it is averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lipcore.distributed.rank_axis import Place
from lipcore.metric.state import is_count, under_key
from lipcore.models.averaging import GONE, UNKNOWN, averaged_over, is_of_a_gone_group
from lipcore.models.ranks import world_size
from lipcore.models.tensor_parallel import PartRanks
from lipcore.per_sample.noise.carried_steps import CarriedSteps, PlacedOwners
from lipcore.per_sample.noise.noise_scale import NoiseScale
from lipcore.per_sample.noise.noise_sums import SHARDED, UNEQUAL, NoiseSums
from lipcore.per_sample.noise.rank_noise import NoiseSoFar, RankNoise
from lipcore.per_sample.noise.rank_steps import RankSteps, checked_table

_GONE = "parameters have gone since the layers were tapped; call Monitor.rebind()"
_LOADED = "the window began before a state was loaded, of other ranks, which holds no single steps of these"


class SharedGradient:
    """The gradient of a model as one rank sees it, and what it keeps for the noise scale of all.

    Args:
        model: what the loop calls.
        sums: of the step under way.
        layers: the place of each of the parameters' layers.
        places: layers, and the total.
        apart: where no wrapper says otherwise, each rank trains a model of its own.
        begin: steps before the open window.
        parts: the ranks that hold parts of the gradient, of the same samples; None where this one has the whole.
    """

    def __init__(
        self,
        model: nn.Module | None,
        sums: NoiseSums,
        layers: list[int],
        places: int,
        apart: bool,
        begin: int,
        parts: PartRanks | None = None,
    ) -> None:
        self._counts = parts is None or parts.counts
        if parts is not None:
            sums.off = SHARDED
        self._model, self._sums, self._layers, self._places, self._apart = model, sums, layers, places, apart
        self._asked = False
        self._kept: RankSteps | None = None
        self._interrupted = ""  # why the open window has steps that are not kept
        self.begin = begin
        self.averaged: tuple[int, ...] = ()  #: ranks, where there are several
        self.off = ""  #: why all ranks together have no noise scale
        self._so_far = NoiseSoFar()
        self._carried: CarriedSteps | None = None  # steps of the open window that other ranks have made
        self._before: NoiseScale | None = None  # of one process that has made steps of it
        self._loaded: dict[str, Any] = {}  # steps of a state, until it is known whether these are kept

    def _ask(self) -> None:
        """Ask the model's wrappers, once there is a step: a process group and wrappers may come late."""
        if self._asked or self._model is None or world_size() == 1:
            return
        self._asked = True
        self.averaged, self.off = averaged_over(self._model)
        if self.averaged:
            self._kept = RankSteps(self._places, len(self._layers), UNEQUAL)
        elif not self._sums.off and not (self._apart and self.off == UNKNOWN):
            self._sums.off = self.off
        self._take_loaded()

    def finish(self, noise: NoiseScale, recorded: bool, wanted: bool) -> None:
        """Take in a step that was made.

        Args:
            recorded: a backward pass has brought numbers.
            wanted: the step was to be recorded.
        """
        self._ask()
        if self._kept is not None and wanted:
            self._kept.add(self._sums.step_sums() if recorded else None)
        if recorded:
            self._sums.finish(noise.observe, len(self.averaged) or 1)

    def reset(self, steps: int) -> None:
        """Start a new window after so many steps."""
        self.begin, self._interrupted, self._loaded = steps, "", {}
        self._carried = self._before = None
        if self._kept is not None:
            self._kept.reset()

    def mark(self) -> None:
        """Note that everything so far is right."""
        if self._kept is not None:
            self._kept.mark()

    def take_back(self, reason: str) -> None:
        """Leave out the steps since the last mark."""
        if self._kept is not None:
            self._kept.take_back(reason)
        self._so_far.end = -1
        if self._carried is not None or self._before is not None:
            self.interrupt(reason)

    def state_dict(self) -> dict[str, Any]:
        """Return where the open window began, its single steps as far as they are kept, and the averages of windows
        before. Waits for the device."""
        state: dict[str, Any] = {"begin": self.begin, "interrupted": self._interrupted, "so_far": self._so_far.state()}
        state["carried"] = {} if self._carried is None else self._carried.state()
        state["before"] = {} if self._before is None else self._before.state_dict()
        return state | (self._loaded or {"steps": {} if self._kept is None else self._kept.state_dict()})

    def load(self, steps: int, state: dict[str, Any], within: bool) -> None:
        """Go on after so many steps of a state that was loaded: of its window, where these are kept; `within` one."""
        begin = state.get("begin", steps)
        self.reset(begin)
        self._so_far, self._loaded = NoiseSoFar.of_state(state.get("so_far", {})), {}
        self.interrupt(state.get("interrupted", ""))
        if state.get("carried"):
            self._carried = CarriedSteps.of_state(state["carried"], self._places)
        if state.get("before"):
            self._before = NoiseScale(self._places)
            self._before.load_state_dict(state["before"])
        if state.get("steps"):
            self._loaded = {"steps": state["steps"]}
            if self._asked:
                self._take_loaded()
        elif "steps" not in state and not state.get("before") and (within or begin < steps):
            self.interrupt(_LOADED)

    def settle(self, noise: NoiseScale, sums: NoiseSums | None) -> None:
        """Take the steps that other ranks have made into the noise scale of the one process that goes on from all of
        them."""
        carried, self._carried = self._carried, None
        if carried is not None:
            table = RankSteps(self._places, len(self._layers), UNEQUAL).table()
            numbers = (self._places, self.begin, self.begin, 1, self._so_far, carried)
            part = RankNoise(table, self._layers, [], *numbers)
            part.reasons = carried.reasons
            found, skipped = part.result(carried.codes, carried.scaled_to(1), 1)
            noise.load_state_dict(found.state_dict())
            if sums is not None:
                sums.count_skipped(skipped)
            self._so_far.end = -1

    def _take_loaded(self) -> None:
        if self._loaded and self._kept is not None:
            self._kept.load_state_dict(self._loaded["steps"])
        elif self._loaded:
            self.interrupt(_LOADED)
        self._loaded = {}

    def interrupt(self, why: str) -> None:
        """Note that the open window has steps that are not kept."""
        self._interrupted = why

    def part(self, names: list[str], steps: int) -> tuple[RankNoise | None, str]:
        """Return what this rank adds to the noise scale of all after so many steps; None and why there is nothing.
        Waits for the device."""
        self._ask()
        if is_of_a_gone_group(self._model):
            return None, GONE
        if self._kept is None or self._kept.off or self._interrupted:
            return None, self.off if self._kept is None else self._kept.off or self._interrupted
        if len(names) != len(self._layers):
            return None, _GONE
        table = self._kept.table()
        numbers = (names, self._places, self.begin, steps, len(self.averaged), self._so_far)
        return RankNoise(table, self._layers, *numbers, self._carried, self._before, counts=self._counts), ""

    def share(self, held: Sequence[tuple[str, str, Any]], steps: int, place: Place) -> dict[str, Any]:
        """Return what this rank adds to the steps of the open window, for ranks that go on from here, as
        :meth:`CarriedSteps.state` does; {} where that cannot be said. Waits for the device."""
        owners = PlacedOwners.of(held, place)
        part, _ = (None, "") if owners.tied or place.apart else self.part([name for name, *_ in held], steps)
        return {} if part is None else part.share(owners).state()


def checked_shared(state: Any, places: int) -> dict[str, Any]:
    """Return what :meth:`SharedGradient.state_dict` gave, or {"begin": ...} of other ranks; ValueError
    naming what does not fit."""
    if not isinstance(state, dict):
        raise ValueError(f"shared: expected a dict, got {type(state).__name__}")
    with under_key("shared"):
        if not is_count(state.get("begin", 0)) or not isinstance(state.get("interrupted", ""), str):
            raise ValueError(f"begin: expected a count of steps, got {state.get('begin')!r}")
        if state.get("steps"):
            checked_table(state["steps"], places)
        NoiseSoFar.of_state(state.get("so_far", {}))
        for key in ("carried", "before"):
            if not isinstance(state.get(key, {}), dict):
                raise ValueError(f"{key}: expected a dict, got {type(state[key]).__name__}")
        if state.get("carried"):
            CarriedSteps.of_state(state["carried"], places)
        if state.get("before"):
            NoiseScale(places).load_state_dict(state["before"])
    return state


def noise_of_all(
    noise: dict[str, Any], shared: dict[str, Any], share: dict[str, Any], steps: int, *, alone: bool
) -> dict[str, Any]:
    """Return what ranks begin with that go on from others: the averages up to the open window, where they are known;
    of this window that of one process, or how many steps others will bring.

    Args:
        noise: state of a rank's own noise scale.
        shared: of its SharedGradient, {} for none.
        share: what it adds to the steps of the window.
        steps: made so far.
        alone: there was one rank, whose own noise scale is that of all.
    """
    begin = shared.get("begin", steps)
    if alone and shared:
        return {"noise": noise, "shared": {"begin": begin, "so_far": {}, "before": noise}}
    so_far = shared.get("so_far") or {}
    found = NoiseScale(noise["places"], decay=noise["decay"])
    if so_far and so_far["end"] == begin:
        found.load_state_dict(so_far["scale"])
        found.reset()
    state: dict[str, Any] = {"begin": begin, "so_far": so_far}
    if share:
        nothing = CarriedSteps.nothing(len(share["codes"]), noise["places"], share["averaged"])
        state |= {"carried": nothing.state(), "steps": {}}
    return {"noise": found.state_dict(), "shared": shared and state}


def with_steps(state: dict[str, Any], shares: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the `shared` of :func:`noise_of_all` with the steps that some ranks have made."""
    if not state.get("carried"):
        return state
    places = state["carried"]["sums"][0].shape[1]
    total = CarriedSteps.of_state(state["carried"], places)
    for share in shares:
        total = total.plus(CarriedSteps.of_state(share, places))
    return state | {"carried": total.state()}
