"""Whose samples are in the gradient: this rank's alone, or those of all ranks over which it is averaged."""

from __future__ import annotations

from typing import Any

from torch import nn

from lipcore.metric.state import is_count, under_key
from lipcore.models.averaging import UNKNOWN, averaged_over
from lipcore.models.ranks import world_size
from lipcore.per_sample.noise.noise_scale import NoiseScale
from lipcore.per_sample.noise.noise_sums import UNEQUAL, NoiseSums
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
    """

    def __init__(
        self, model: nn.Module | None, sums: NoiseSums, layers: list[int], places: int, apart: bool, begin: int
    ) -> None:
        self._model, self._sums, self._layers, self._places, self._apart = model, sums, layers, places, apart
        self._asked = False
        self._kept: RankSteps | None = None
        self._interrupted = ""  # why the open window has steps that are not kept
        self.begin = begin
        self.averaged: tuple[int, ...] = ()  #: ranks, where there are several
        self.off = ""  #: why all ranks together have no noise scale
        self._so_far = NoiseSoFar()
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

    def state_dict(self) -> dict[str, Any]:
        """Return where the open window began, its single steps as far as they are kept, and the averages of windows
        before. Waits for the device."""
        state: dict[str, Any] = {"begin": self.begin, "interrupted": self._interrupted, "so_far": self._so_far.state()}
        return state | (self._loaded or {"steps": {} if self._kept is None else self._kept.state_dict()})

    def load(self, steps: int, state: dict[str, Any], within: bool) -> None:
        """Go on after so many steps of a state that was loaded: of its window, where these are kept; `within` one."""
        begin = state.get("begin", steps)
        self.reset(begin)
        self._so_far, self._loaded = NoiseSoFar.of_state(state.get("so_far", {})), {}
        self.interrupt(state.get("interrupted", ""))
        if state.get("steps"):
            self._loaded = {"steps": state["steps"]}
            if self._asked:
                self._take_loaded()
        elif "steps" not in state and (within or begin < steps):
            self.interrupt(_LOADED)

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
        if self._kept is None or self._kept.off or self._interrupted:
            return None, self.off if self._kept is None else self._kept.off or self._interrupted
        if len(names) != len(self._layers):
            return None, _GONE
        table = self._kept.table()
        numbers = (names, self._places, self.begin, steps, len(self.averaged), self._so_far)
        return RankNoise(table, self._layers, *numbers), ""


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
    return state


def noise_of_all(noise: dict[str, Any], shared: dict[str, Any], steps: int, *, alone: bool) -> dict[str, Any]:
    """Return what ranks begin with that go on from others: the averages up to the open window, where they are known,
    and nothing of this window.

    Args:
        noise: state of a rank's own noise scale.
        shared: of its SharedGradient, {} for none.
        steps: made so far.
        alone: there was one rank, whose own noise scale is that of all.
    """
    begin = shared.get("begin", steps)
    so_far = shared.get("so_far") or {}
    if alone and begin == steps:
        so_far = {"end": begin, "places": noise["places"], "scale": noise}
    found = NoiseScale(noise["places"], decay=noise["decay"])
    if so_far and so_far["end"] == begin:
        found.load_state_dict(so_far["scale"])
        found.reset()
    return {"noise": found.state_dict(), "shared": shared and {"begin": begin, "so_far": so_far}}
