"""Which parameters have got a gradient in a pass, also where there was one of an earlier pass already."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lipcore.capture.layers.coverage import ParameterCoverage
from lipcore.models.bits import bits_of
from lipcore.models.dtensors import local_of
from lipcore.models.gathered import in_parts


class Gradients:
    """The gradients of a model as they were at a point of a pass. Where fully_shard() has gathered parameters, that of
    the part which stands there between two steps counts too."""

    def __init__(self, model: nn.Module, coverage: ParameterCoverage) -> None:
        self._model, self._coverage = model, coverage
        self._marks = {id(holder): _mark(holder.grad) for _, holder in self._holders() if holder.grad is not None}

    def _holders(self) -> Iterator[tuple[str, Any]]:
        held = [(name, "", parameter) for name, parameter in self._coverage.parameters()]
        for (name, _, parameter), (_, _, part) in zip(held, in_parts(self._model, held), strict=True):
            yield name, parameter
            if part is not parameter:
                yield name, part

    def changed(self, besides: Container[str] = ()) -> set[str]:
        """Return the parameters, besides some, whose gradient is another one now; one that was set to None or to 0 is
        none. May wait for the device."""
        return {
            name
            for name, holder in self._holders()
            if name not in besides and holder.grad is not None and not self._is_old(holder)
        }

    def _is_old(self, holder: Any) -> bool:
        mark = self._marks.get(id(holder))
        if mark is None:
            return False
        now = _mark(holder.grad)
        if mark.bits is None or now.bits is None:
            return mark == now
        return int(now.bits) == 0 or (int(now.bits) == int(mark.bits) and (now.shared or now.version == mark.version))


class _Mark(NamedTuple):
    """Numbers that differ for another gradient."""

    number: int
    version: int
    bits: Tensor | None  #: None where its elements do not lie one after the other
    shared: bool  #: a new version says nothing: it is that of all views of a bucket, or fully_shard() has added zeros


def _mark(gradient: Any) -> _Mark:
    local = local_of(gradient).detach()
    bits = bits_of(local) if local.layout is torch.strided else None
    return _Mark(
        id(gradient), local_of(gradient)._version, bits, gradient._is_view() or hasattr(gradient, "placements")
    )
