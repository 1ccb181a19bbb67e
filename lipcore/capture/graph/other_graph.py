"""The graph of a pass on one sample more, in which the model makes the same random choices as in the pass beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from lipcore.capture.graph.another_size import note_draws, on_one_more
from lipcore.capture.graph.frontier import GraphsDiffer, paired
from lipcore.capture.graph.walk import Walk
from lipcore.layers import Batch
from lipcore.models.held import Held
from lipcore.models.random_draws import Draws
from lipcore.models.random_numbers import RandomNumbers

_DRAWN = (
    "{0}; the model draws random numbers, and was held to those of its pass: where it chooses by them what it runs "
    "(layers that are left out at random), draw these with torch and one for all samples, or leave none out"
)


class Call(NamedTuple):
    """A call of a model.

    Attributes:
        arguments: as the model got them.
        keywords: likewise.
        begun: the states of the generators of random numbers when it began; None where they are not known.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    begun: list[Any] | None = None


class OtherGraphs:
    """The graphs of one model on one sample more."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._random: RandomNumbers | None = None
        self._chooses = False  # what is run by random numbers

    def begun(self) -> list[Any] | None:
        """Return the states of the generators, as a pass that begins now finds them; None where a device does not tell
        (while it captures a graph)."""
        try:
            if self._random is None:
                self._random = RandomNumbers(Held(self._model))
            return self._random.now()
        except RuntimeError:
            return None

    def beside(self, walk: Walk, names: Mapping[int, str], call: Call, batch: Batch) -> tuple[Walk, Any]:
        """Return the graph of a pass on one sample more, and what the model has returned in it.

        Args:
            walk: the graph of the pass.
            names: of the parameters, by id.
            call: the model's, in the pass.
            batch: the pass's samples.

        Raises:
            CannotRun: the model cannot be run once more.
            GraphsDiffer: the graph is another one, whatever random numbers are drawn.
        """
        if not self._chooses or call.begun is None:
            found = self._run(walk, call, batch, None)
            if call.begun is None or _differs(walk, found[0], names, batch) is None:
                return found
        assert self._random is not None  # which has made call.begun
        assert call.begun is not None
        draws = Draws(self._random, call.begun)
        note_draws(self._model, call.arguments, call.keywords, draws)
        held = self._run(walk, call, batch, draws)
        why = _differs(walk, held[0], names, batch)
        if why is not None:
            raise GraphsDiffer(_DRAWN.format(why) if draws.any else str(why)) from why
        self._chooses = True
        return held

    def _run(self, walk: Walk, call: Call, batch: Batch, draws: Draws | None) -> tuple[Walk, Any]:
        given, aliased = (call.arguments, call.keywords), walk.aliased
        returned = on_one_more(self._model, *given, batch.size, batch.dim, draws, aliased=aliased)
        return Walk(returned), returned


def _differs(walk: Walk, other: Walk, names: Mapping[int, str], batch: Batch) -> GraphsDiffer | None:
    """Return how two graphs differ beside sizes; None where they do not, or cannot for one sample alone."""
    if batch.size == 1:
        return None
    try:
        paired(walk, other, names, batch.size)
    except GraphsDiffer as error:
        return error
    return None
