"""A tap: what a metric wants of one module's output in the backward pass, and how the numbers come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class Tap(ABC):
    """A request for numbers out of the backward pass, per sample, from the gradient at one module's output.

    `reduce` must be a pure function of tensors (and of what `save` returned beside them), so that it can be traced.
    """

    argument = "module"  #: of the metric, which named the module
    key: str  #: under which the record holds the numbers; no two taps of a Monitor share one
    columns: int  #: how many numbers per sample
    follows_input = False  #: wants to know when the output depends on the model's input past its module
    in_place_after = False  #: set directly behind a parametrised leaf module, where an in-place activation may follow

    def resolve(self, name: str, module: nn.Module) -> None:  # noqa: B027
        """The module that was found for it; raises ValueError when it will not do."""

    def check(self, output: Any) -> None:
        """ValueError when this output cannot be tapped."""
        if not isinstance(output, Tensor):
            raise ValueError(f"a {type(output).__name__} cannot be tapped, only a tensor")

    def bypassed(self) -> None:  # noqa: B027
        """The model's output turned out to depend on its input past the first layer, which this tap is on."""

    def save(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], Any]:
        """Tensors that reduce() needs beside the gradient, and anything else it needs."""
        return (), None

    @abstractmethod
    def reduce(self, grad_output: Tensor, extra: Any, *saved: Tensor) -> Tensor:
        """float64 [columns, B]."""


#: What one micro-batch (one backward pass) brought: per tap key, float64 [columns, B].
Record = dict[str, Tensor]


@dataclass(frozen=True)
class SingleSample:
    """Where the batch-1 shortcut puts a sample's r, lambda and r again (compiled distributions), and whom it tells when
    it starts."""

    distributions: list[Any]
    on_served: Callable[[], None]
    agrees: Callable[[float, float], bool]  #: whether this r and lambda are what the taps have just brought


FIRST_LAYER = "<first layer>"  #: stands for the first Linear, convolution or Embedding that is executed
