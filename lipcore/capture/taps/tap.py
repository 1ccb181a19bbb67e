"""A tap: what a metric wants of one module's output in the backward pass, and how the numbers come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lipcore.capture.taps.input_alias import Source


class Tap(ABC):
    """A request for numbers out of the backward pass, per sample, from the gradient at one module's output.

    `reduce` must be a pure function of tensors (and of what `save` returned beside them), so that it can be traced.
    """

    argument = "module"  #: of the metric, which named the module
    key: str  #: under which the record holds the numbers; no two taps of a Monitor share one
    columns: int  #: how many numbers per sample
    optional = False  #: the others go on without it where its module is called twice, or never
    in_place_after = False  #: set directly behind a parametrised leaf module, where an in-place activation may follow

    stays = False  #: its metric has something without it where its module is called on DTensors; else that is an error
    has_leaf = False  #: leaf() may return one

    def resolve(self, name: str, module: nn.Module) -> None:  # noqa: B027
        """Take the module that was found for this tap; raise ValueError when it will not do."""

    def check(self, output: Any) -> None:
        """Raise ValueError when this output cannot be tapped."""
        if not isinstance(output, Tensor):
            raise ValueError(f"a {type(output).__name__} cannot be tapped, only a tensor")

    def pick(self, output: Any) -> Any:
        """Return the tensor that this tap means, of what the module returned."""
        return output

    def leaf(self, output: Tensor) -> Tensor | None:
        """Return a leaf into which backward passes are to accumulate the gradient at this output, summed to the leaf's
        shape; None for none. Not asked in compiled regions."""
        return None

    def close(self) -> None:  # noqa: B027
        """Remove the tap's own hooks."""

    def lost(self, reason: str) -> None:  # noqa: B027
        """Note that there will be no numbers of this tap, and why."""

    def save_from(
        self, sources: Mapping[InputTap, Source], module: nn.Module, arguments: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Return what save() returns; a tap overrides this to ask whether its module was given the very tensor of an
        input tap."""
        return self.save(module, arguments)

    def save(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], Any]:
        """Return the tensors that reduce() needs beside the gradient, and any other details it needs."""
        return (), None

    @abstractmethod
    def reduce(self, grad_output: Tensor, extra: Any, *saved: Tensor) -> Tensor:
        """Return the numbers per sample that a gradient at the output gives, float64 [columns, B]."""


class InputTap(Tap):
    """A request for numbers from the gradient at one module's input; the name "" means the model's own input."""

    argument = "input"
    columns = 1
    off: str  #: why there is no gradient at the input, or ""
    unproved: str  #: why nothing has shown that the numbers are right, or ""
    sharded: bool  #: parts of the model gather their parameters when they run
    stands_alone: bool  #: in a sharded model: W_1 is all that stands between the input and the rest
    is_vector: bool  #: False for integers
    mixing: bool  #: samples influence each other
    by_product: bool | None  #: whether the first layer's weight gives the numbers as well; None: not known yet
    first: Tap  #: on the layer that may be all that the output depends on the input by
    last: Tap  #: on the output that is differentiated

    @property
    def check_key(self) -> str:
        """Key under which a record holds the norms that a second way has brought, [B]: those of two samples, seeded
        alone, and of what they bring to the others, which is 0 where samples are apart."""
        return f"{self.key}.check"

    @property
    def trial_key(self) -> str:
        """Key under which a record holds the constants that a pass of lipcore's own has found for some samples."""
        return f"{self.key}.trial"

    @abstractmethod
    def prepare(self) -> None:
        """Look at the state of the first layer before a pass that is tapped."""

    @abstractmethod
    def choose(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor | None:
        """Return the tensor that this tap means, of those that the module is called with; None where there is none.
        Raise ValueError where it cannot be told."""

    @abstractmethod
    def asks(self) -> tuple[bool, bool]:
        """Say whether the gradient is wanted in the pass that begins, and whether it is to be checked."""

    @abstractmethod
    def begin_sharded(self, *, checks: bool) -> None:
        """Begin a pass of a sharded model, in which only the first layer's weight may give numbers."""

    @abstractmethod
    def allow(self) -> None:
        """Take numbers of a sharded model, where its first layer stands alone on the input."""

    @abstractmethod
    def check_later(self) -> None:
        """Note that the pass that was to be checked allows no check."""

    @abstractmethod
    def refuse(self, reason: str) -> None:
        """Note that there is no gradient at the input, and why."""

    @abstractmethod
    def tried(self, found: Any) -> None:
        """Take the findings of a pass of lipcore's own (:class:`lipcore.capture.taps.trial.Trial`)."""

    @abstractmethod
    def seen(self, past: bool) -> None:
        """Note whether the output depends on the input past the first layer."""


#: What one micro-batch (one backward pass) brought: per tap key, float64 [columns, B].
Record = dict[str, Tensor]


@dataclass(frozen=True)
class SingleSample:
    """The receiver of the batch-1 shortcut: compiled distributions for a sample's r, lambda and r again, and a function
    to call when the shortcut starts."""

    distributions: list[Any]
    on_served: Callable[[], None]
    agrees: Callable[[float, float], bool]  #: whether this r and lambda are what the taps have just brought


FIRST_LAYER = "<first layer>"  #: stands for the first Linear, convolution or Embedding that is executed
