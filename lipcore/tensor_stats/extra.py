"""What is watched beside statistics of tensors: numbers that are made of the outputs of modules which only some models
have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.functional.dtypes import FLOATING
from lipcore.metric.results import MetricResult
from lipcore.models.dtensors import is_partial, local_of
from lipcore.models.names import listed, named_modules
from lipcore.models.outputs import output_names, tensors_of

UNREADABLE = "no float32, float64, bfloat16 or float16 tensor with values of its own"
ROOT = "(model)"  #: the place of what the model itself returns


class Extra(ABC):
    """One of them: `sums` numbers that are added up and `most` of which the largest is kept, on the device of the
    outputs.

    Attributes:
        modules: names of the modules whose outputs it reads.
        problem: why it has no numbers, once an output did not fit.
        named: the user has named what is read; else it was found.
    """

    kind: str
    place: str
    modules: tuple[str, ...]
    sums: int
    most: int
    problem: str = ""
    named: bool = True

    @classmethod
    @abstractmethod
    def described(cls, place: str, sums: int, most: int, *, named: bool) -> Extra:
        """Make one that stands for another rank's, and reads nothing here."""

    @property
    @abstractmethod
    def rule(self) -> str:
        """The words for the plan."""

    def begin(self) -> None:  # noqa: B027
        """Learn that a forward pass begins."""

    @abstractmethod
    def read(self, module: str, output: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return what an output adds to the sums, and the numbers to take maxima with; None where there is nothing
        yet. ValueError, with the words for :attr:`problem`, for an output that does not fit."""

    @abstractmethod
    def add_to(self, result: MetricResult, sums: Tensor, most: Tensor) -> None:
        """Add the numbers of a window to a result, where there are any."""


def matching_modules(
    model: nn.Module, choice: Mapping[str, Any] | str, argument: str
) -> Iterator[tuple[str, list[str], Any]]:
    """Yield pattern, names of the modules that match it, and value of a user's choice of modules.

    Raises:
        TypeError: it is no dict.
        ValueError: it is another word than "auto", or a pattern that names nothing in the model.
    """
    if isinstance(choice, str):
        raise ValueError(f"{argument}: expected None, 'auto' or a dict of modules, got {choice!r}")
    if not isinstance(choice, Mapping):
        raise TypeError(f"{argument}: expected None, 'auto' or a dict of modules, got {type(choice).__name__}")
    modules = [name for name, _ in named_modules(model)]
    for pattern, value in choice.items():
        names = [name for name in modules if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"{argument}: the model has no module {pattern!r}; it has {listed(modules[1:])}")
        yield pattern, names, value


def main_tensor(output: Any) -> Tensor | None:
    """Return the tensor that is measured of what a module returns: itself, of several that under "logits", else the
    first floating one; None where there is none that the kernels read."""
    if isinstance(output, Tensor):
        return readable(output)
    if "logits" in output_names(output):
        output = output["logits"] if isinstance(output, Mapping) else output.logits
    return next((found for tensor in tensors_of(output) if (found := readable(tensor)) is not None), None)


def readable(tensor: Any) -> Tensor | None:
    """Return the tensor's values on this rank as the kernels read them; None where they cannot."""
    if is_partial(tensor):
        return None
    # What a collective still brings is waited for here, where its values are; what uses it next would wait for it too.
    tensor = local_of(tensor)
    if tensor.is_nested or tensor.is_meta or tensor.dtype not in FLOATING:
        return None
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.detach() if tensor.device.type in ("cpu", "cuda") else None
