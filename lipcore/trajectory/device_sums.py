"""Sums of squares of gradients on a device, in a few operations for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipcore import _core
from lipcore.models.torch_internals import foreach_norm


class DeviceSums:
    """Sums of squares of a fixed number of gradients, which nothing waits for and which a CUDA graph can capture.

    Args:
        count: how many there are.
        device: where they lie.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._count, self._device = count, device
        self._nothing: dict[torch.dtype, Tensor] = {}  # in place of a gradient that is not there

    def new(self) -> Tensor:
        """Return a table to be filled, whose other columns are 0."""
        return torch.zeros(self._count, _core.STEP_COLUMNS, dtype=torch.float64, device=self._device)

    def read(self, gradients: Sequence[Tensor | None], out: Tensor) -> Tensor:
        """Write the sums as :func:`lipcore.functional.update_sums` does, a gradient in the place of an update and of a
        parameter; return the table."""
        dtype = next((gradient.dtype for gradient in gradients if gradient is not None), torch.float64)
        there = [self._nothing_of(dtype) if gradient is None else gradient for gradient in gradients]
        norms = torch.stack(foreach_norm(there, 2, dtype=torch.float64)).unsqueeze(1)
        apart = norms - norms  # 0, or NaN where a norm is not finite
        both = (tensor.expand(-1, 2) for tensor in (apart, norms, norms))
        torch.addcmul(*both, out=out[:, :5:4])
        torch.ne(apart, 0.0, out=out[:, 5:])
        return out

    def _nothing_of(self, dtype: torch.dtype) -> Tensor:
        found = self._nothing.get(dtype)
        if found is None:
            found = self._nothing[dtype] = torch.zeros(1, dtype=dtype, device=self._device)
        return found
