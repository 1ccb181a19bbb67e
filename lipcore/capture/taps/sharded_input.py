"""The gradient at the input of a model whose parts gather their parameters when they run (fully_shard): no alias goes
in, and the first layer's weight alone gives numbers, where nothing else leads past it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from lipcore.capture.taps.collector import Collector, MicroBatch
from lipcore.capture.taps.input_alias import Source
from lipcore.capture.taps.sharded_check import COMPILED, ShardedCheck, why_not_alone
from lipcore.capture.taps.site import Site
from lipcore.capture.taps.tap import InputTap
from lipcore.capture.training_pass import in_backward, is_plain_run
from lipcore.models.chains import modules_in_order
from lipcore.models.inputs import places_of

SHARDED = (
    "the model's parameters are sharded over ranks (fully_shard, tensor parallel), and are there as a whole in the "
    "training's own backward pass only, or never; lipcore.local_lipschitz on a copy that is not sharded gives it at "
    "any points"
)
FROZEN = (
    "its output requires no gradient (the layer is frozen, as is all before it), and in a model whose parameters are "
    "sharded over ranks (fully_shard) none is begun there: layers behind it would be reduced at other times than on "
    "ranks without this metric; name a layer that trains, input='<module>'"
)
_NOT_PROVED = (
    "the model's parameters are sharded over ranks (fully_shard), and nothing has shown that the output depends on the "
    "input by way of the first layer alone, as it does in an nn.Sequential of torch's own layers: call "
    "monitor.prove(batch) on all ranks, or name the layer that lambda is to be at, input='<module>'"
)


class _Call(threading.local):
    """The call of the model under way in this thread."""

    places = 1  # of its arguments that hold the input


class ShardedInput:
    """Part of an input tap that is at work in a sharded model.

    Args:
        model: what the loop calls.
        at: the module whose input is meant, the model itself or one inside it.
        first: where the output of the first layer is tapped; None where that is nowhere.
        last: where that of the model is.
        pick: returns the tensor of the model's output that is meant.
    """

    def __init__(
        self,
        tap: InputTap,
        model: nn.Module,
        at: nn.Module,
        collector: Collector,
        first: Site | None,
        last: Site | None,
        pick: Callable[[Any], Any],
    ) -> None:
        self._tap, self._model, self._at = tap, model, at
        self._first, self._last, self._pick = first, last, pick
        self._check = ShardedCheck(model, tap, collector)
        self._now = _Call()
        self._stands_alone = self._is_alone()
        if self._stands_alone:
            self._check.ranks.announce(1)  # the first pass may gather nothing, and so wait for no other rank

    def _is_alone(self) -> bool:
        """Return whether the structure of the model says that its first layer stands alone on the input."""
        return self._at is not self._model or modules_in_order(self._model, sharded=True) is not None

    def begin(self, micro: MicroBatch, arguments: tuple[Any, ...], keywords: dict[str, Any], *, compiled: bool) -> None:
        """Begin a forward pass of the model, and leave its input as it is."""
        tap, check = self._tap, self._check
        self._stands_alone = self._is_alone()  # hooks that come later may lead past the first layer
        if not self._stands_alone and not check.is_proved:
            tap.stands_alone = False
        if self._stands_alone and not tap.stands_alone and not tap.off:
            tap.allow()
            check.start()
        micro.look = check.begin(self._first, self._last)
        try:
            tap.prepare()
            if self._at is self._model and not tap.off:
                x = tap.choose(arguments, keywords)
                if x is None:
                    return
                micro.sources[tap] = Source(x, self._now.places)
            if compiled:
                tap.refuse(COMPILED)
            elif not tap.stands_alone:
                tap.refuse(_NOT_PROVED)
        except Exception as error:
            tap.refuse(str(error))

    def count_places(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Count the places of the input among the arguments of the model's call, before fully_shard() casts each to a
        tensor of its own."""
        self._now.places = 1
        if not self._check.is_proved or torch.compiler.is_compiling():
            return
        with suppress(Exception):  # which begin() meets too
            x = self._tap.choose(arguments, keywords)
            self._now.places = 1 if x is None else places_of(x, arguments, keywords)

    def enter(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Begin the forward pass of a module inside the model."""
        if in_backward() == -1 and torch.is_grad_enabled() and is_plain_run() and not self._tap.off:
            try:
                self._tap.choose(arguments, keywords)  # are these integers?
            except Exception as error:
                self._tap.refuse(str(error))

    def end(self, micro: MicroBatch | None, output: Any) -> None:
        """End a forward pass of the model; `output`: what it returns, None where it has raised."""
        raised = output is None
        try:
            if micro is not None:
                self._compare(micro, output)
                self._check.end(micro, raised=raised)
            if raised or self._tap.by_product is not False:
                return
            if self._tap.is_vector:
                self._tap.refuse(why_not_alone(None if self._first is None else self._first.module))
            else:
                self._tap.unproved = ""  # lambda is by the gradient at an Embedding's output, as in any model
        except Exception as error:
            self._tap.refuse(str(error))

    def _compare(self, micro: MicroBatch, output: Any) -> None:
        """Compare a pass with a proof that was asked for, where no other reason shows as much."""
        if output is None or self._stands_alone or not self._tap.stands_alone or self._tap.off:
            return
        try:
            self._check.compare(self._pick(output), micro.sources.get(self._tap))
        except Exception as error:
            self._tap.refuse(str(error))

    def prove(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> str:
        """Prove, in passes that all ranks run, that the first layer's weight is all that stands between the input and
        the rest; return why not, or ""."""
        first = None if self._first is None else self._first.module
        return self._check.prove(self._at, first, self._pick, arguments, keywords)

    def withdraw(self) -> None:
        """Take part in no further check."""
        self._check.withdraw()
