"""The rule by which lambda is taken: by W_1 where W_1 is all that stands between the model's input and the rest, else
by the gradient at the input, or not at all."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lipcore import functional
from lipcore.capture.taps.cost_share import CostShare
from lipcore.capture.taps.tap import InputTap, Tap
from lipcore.capture.taps.trial import Trial
from lipcore.models.inputs import InputChoice, chosen_input
from lipcore.models.names import unwrap

_SHARE = 0.005  # of the time, for gradients at the input, and as much again for checks
_TIMED = 8  # passes after a check, to compare its cost with
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}  # of norms taken in two ways; half precision: 0.1

#: Why there is no gradient at an input of integers.
INTEGERS = "the model's input holds integers, and no Embedding is its first layer; name a layer with input='<module>'"


class FirstLayer(Tap):
    """A tap on the first layer, as the tap on the model's input asks it."""

    @abstractmethod
    def is_plain(self) -> bool:
        """Return whether the layer will compute W_1 x + b_1 with a W_1 that will be known."""


class ModelInputTap(InputTap):
    """The tap that takes, per sample, the norm of the gradient at the model's input, in those passes where it is
    needed.

    Args:
        every: at every so many micro-batches; None: as the measured share of the time allows.
        on_refused: called with the reason why there is no gradient at the input.
    """

    def __init__(self, key: str, every: int | None, on_refused: Callable[[str], None]) -> None:
        self.key = key
        self._every = every
        self._on_refused = on_refused
        self.first: FirstLayer
        self.choice: InputChoice | None = None  #: which tensor is meant; None: the first
        self._model: nn.Module | None = None
        self.off = ""  #: why there is no gradient at the input
        self.suspended = ""  #: why there is none for now: the last check said so
        self.unproved = ""  #: why nothing has shown that the numbers are right
        self.mixing = False  #: samples influence each other
        self.tolerance = 0.1  #: of two ways to take the pass under way
        self.by_product: bool | None = None  #: W_1 stands alone between the input and the rest; None: not known yet
        self._product_refused = False  # it seemed to do, and a check found that it does not
        self.is_vector = True  #: False for integers
        self.sharded = False  #: parts of the model gather their parameters when they run
        self.stands_alone = False  #: in a sharded model: W_1 is all that stands between the input and the rest
        self.checks = False  #: in the pass under way
        self.strayed = False  #: lambda was taken by W_1 until the output was seen to depend on the input past it
        self._check_wanted = True
        self._passes = 0
        self._timed_until = 0
        self._dtype = torch.float32  # of the input
        self._gradients, self._checks = CostShare(_SHARE), CostShare(_SHARE)

    def prepare(self) -> None:
        """Stop taking lambda by W_1 where the first layer will not compute W_1 x + b_1 any more."""
        if self.by_product and not self.first.is_plain():
            self.by_product = False

    def choose(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor | None:
        """Return the tensor that lambda is the gradient at; None for integers."""
        if self.off:
            return None
        assert self._model is not None
        chosen = chosen_input(unwrap(self._model), self.choice, arguments, keywords)
        self.is_vector = chosen is not None
        self._dtype = chosen.dtype if chosen is not None else self._dtype
        if self.sharded:
            self._set_tolerance()  # asks() does it elsewhere
        return chosen

    def bind(self, model: nn.Module) -> None:
        """Turn to this model, and forget findings about another."""
        self._model = model
        self.off = self.suspended = self.unproved = ""
        self.by_product, self.mixing, self.strayed = None, False, False
        self._product_refused, self._check_wanted = False, True
        self.stands_alone = False

    def start_window(self) -> None:
        """Have the next pass checked that may be, since a window begins."""
        self._check_wanted = True

    def asks(self) -> tuple[bool, bool]:
        """Say whether the gradient is wanted in the pass that begins, and whether it is to be checked."""
        number, self._passes = self._passes, self._passes + 1
        self.checks = False
        if self.off:
            return False, False
        if self._check_wanted:
            self._timed_until = number + _TIMED
        if self.by_product and number > self._timed_until:
            return False, False
        self._set_tolerance()
        self._gradients.begin(number)
        self._checks.begin(number)
        self.checks = self._check_wanted and self._checks.is_due
        if self._every is not None and self.by_product is False:
            wanted = number % self._every == 0
        else:
            wanted = self.by_product is False and self._gradients.is_due
        if self.checks:
            self._check_wanted = False
            self._checks.done()
            self._gradients.disturbed()
        elif wanted:
            self._gradients.done()
            self._checks.disturbed()
        return self.checks or wanted or self.by_product is None, self.checks

    def _set_tolerance(self) -> None:
        half = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        self.tolerance = 0.1 if half else _TOLERANCE.get(self._dtype, 0.1)

    def begin_sharded(self, *, checks: bool) -> None:
        """Begin a pass of a sharded model, in which nothing but W_1 gives lambda."""
        self.checks = checks and not self.off

    def allow(self) -> None:
        """Take lambda by W_1 of a sharded model from here on: it is proved that W_1 stands alone on the input."""
        self.off, self.by_product, self.stands_alone, self._product_refused = "", None, True, False

    def check_later(self) -> None:
        """Ask for the check again in the next pass."""
        self._check_wanted, self.checks = True, False

    def refuse(self, reason: str) -> None:
        """Take no gradient at the input any more, and report why."""
        if not self.off:
            self.off = reason
            self._on_refused(reason)

    def suspend(self, reason: str) -> None:
        """Give no lambda until a check agrees again, and report why."""
        if not self.suspended:
            self._on_refused(reason)
        self.suspended = reason

    def resume(self) -> None:
        """Give lambda again, since a check has agreed."""
        self.suspended = self.unproved = ""

    def refuse_product(self) -> None:
        """Take lambda by the gradient at the input from here on, never by W_1."""
        self._product_refused, self.by_product = True, False

    def tried(self, found: Trial) -> None:
        """Take the findings of a pass of lipcore's own."""
        self.mixing = found.mixes

    def seen(self, past: bool) -> None:
        """Note whether the output depends on the input past the first layer."""
        if past:
            self.strayed = self.strayed or bool(self.by_product)
            self.by_product = False

    def took_input(self, is_input: bool) -> None:
        """Note whether the first layer was W_1 x + b_1 of this very input, in the pass under way."""
        if not is_input or self._product_refused:
            self.by_product = False
        elif self.by_product is None:
            self.by_product = True

    @property
    def rule(self) -> str:
        """Words for how lambda is taken."""
        if self.off:
            return f"off: {self.off}"
        how = "the gradient at the model's input, which adds the backward pass of what is before the first parameter: "
        if self._every is not None:
            return f"{how}every {self._every} micro-batches" if self._every > 1 else f"{how}every micro-batch"
        return how + self._gradients.rule

    def reduce(self, grad_output: Tensor, extra: Any, *saved: Tensor) -> Tensor:
        """Return the norm of the gradient at the input, per sample."""
        return functional.sample_norms(grad_output.detach()).reshape(1, -1)
