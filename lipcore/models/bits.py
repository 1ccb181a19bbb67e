"""Numbers by which tensors are known to have the same elements."""

from __future__ import annotations

import torch
from torch import Tensor


def bits_of(tensor: Tensor) -> Tensor:
    """Return the sum of the elements as integers: the same for the same bits, in whatever order they are added."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    if integer is None or tensor.is_complex():
        tensor, integer = torch.view_as_real(tensor).contiguous(), torch.int64
        return tensor.double().view(torch.int64).sum()
    return tensor.contiguous().view(integer).sum(dtype=torch.int64)
