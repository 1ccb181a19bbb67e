"""Whose samples are in the gradient: this rank's alone, or those of all ranks over which it is averaged."""

from __future__ import annotations

from torch import nn

from lipcore.models.averaging import UNKNOWN, averaged_over
from lipcore.models.ranks import world_size
from lipcore.per_sample.noise.noise_scale import NoiseScale
from lipcore.per_sample.noise.noise_sums import UNEQUAL, NoiseSums
from lipcore.per_sample.noise.rank_noise import NoiseSoFar, RankNoise
from lipcore.per_sample.noise.rank_steps import RankSteps

_GONE = "parameters have gone since the layers were tapped; call Monitor.rebind()"
_LOADED = "the window began before a state was loaded, which holds no single steps"


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
        self.begin, self._interrupted = steps, ""
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

    def load(self, steps: int, within: bool) -> None:
        """Go on after so many steps of a state that was loaded, `within` a window."""
        self.reset(steps)
        self._so_far.end = -1
        if within:
            self.interrupt(_LOADED)

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
