"""Scales of norm layers: sums over rows of a product with the normalised input, which is made where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from lipcore import functional as F
from lipcore.layers.factor import Factor
from lipcore.layers.factor_sums import RowSum, is_sum_of


class NormalizedRowSum(RowSum):
    r"""The sum over rows :math:`\sum_t g_{bt} \odot \hat x_{bt}` of a layer norm or an RMS norm.

    Args:
        grad: [B, T, F], or packed.
        raw: the layer's input, of the same shape and dtype.
        eps: as of :func:`lipcore.functional.norm_layer_norms_sq`.
        center: the same.
        normalized: makes the normalised input of `raw`.
        offsets: of packed rows.
        shape: of the parameter.
    """

    def __init__(
        self,
        grad: Tensor,
        raw: Tensor,
        *,
        eps: float,
        center: bool,
        normalized: Callable[[Tensor], Tensor],
        offsets: Tensor | None,
        shape: torch.Size,
    ) -> None:
        super().__init__(grad, raw, offsets, shape)
        self.raw, self._eps, self._center, self._normalized = self.x, eps, center, normalized
        del self.x  # made when it is asked for

    @cached_property
    def x(self) -> Tensor:  # type: ignore[override]
        """The normalised input."""
        return self._normalized(self.raw)

    def _both(self) -> Tensor:
        return F.norm_layer_norms_sq(self.grad, self.raw, eps=self._eps, center=self._center, offsets=self.offsets)

    def norms_sq(self) -> Tensor:
        return self._both()[0]

    def norms_sq_with(self, other: Factor) -> tuple[Tensor, Tensor] | None:
        if not is_sum_of(other, self.grad, self.offsets):
            return None
        scale, shift = self._both()
        return scale, shift

    def tensors(self) -> Iterator[Tensor]:
        yield self.grad
        yield self.raw
