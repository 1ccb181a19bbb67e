"""What the model returns of parameters without the batch: whether the loss uses it beside its samples."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor

RETURNED = (
    "the model returns what it makes of it without the batch, and the loss uses that, so that its gradient is not the "
    "sum of what the samples bring; return it expanded over the samples, x.expand(B, ...), or do what the loss does "
    "with it in forward()"
)
#: Share of a gradient that rounding explains, where sums of samples' gradients are compared with it.
_OUTSIDE, _OUTSIDE_HALF = 1e-4, 3e-2
_HALF = (torch.float16, torch.bfloat16)


class ReturnedPlaces:
    """The nodes without the batch whose tensors the model returns, in one pass's graph.

    Args:
        places: of these nodes.
        behind: by parameter, the places that its gradient comes through.
        samples: B.
    """

    def __init__(self, places: Container[int], behind: Mapping[str, Container[int]], samples: int) -> None:
        self._places, self._behind, self._samples = places, behind, samples
        self._outside: dict[str, Tensor] = {}  # by parameter, whether a gradient came past its samples', on its device

    def __contains__(self, place: int) -> bool:
        return place in self._places

    def begin(self) -> None:
        """Forget what an earlier backward pass has shown."""
        self._outside = {}

    def compare(self, grads: tuple[Tensor | None, ...], sums: Mapping[int, Tensor], place: int) -> None:
        """Note whether more has come to a tensor that the model returns than its samples' gradients."""
        for k, grad in enumerate(grads):
            if grad is None:
                continue
            more, scale = grad.double(), grad.double().norm()
            if k in sums:
                more = more - sums[k].sum(0).double()
                scale = torch.maximum(scale, sums[k].double().reshape(self._samples, -1).norm(dim=1).sum())
            came = ~(more.norm() <= (_OUTSIDE_HALF if grad.dtype in _HALF else _OUTSIDE) * scale)
            for name, behind in self._behind.items():
                if place in behind:
                    self._outside[name] = self._outside[name] | came if name in self._outside else came

    def outside(self) -> dict[str, str]:
        """Return the parameters of which the last backward pass brought more than samples' gradients, and why."""
        return {name: RETURNED for name, came in self._outside.items() if bool(came)}
