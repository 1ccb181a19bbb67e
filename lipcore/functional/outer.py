"""Layers that see one row per sample: a product of two norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipcore import _library
from lipcore.functional.statistics import sample_norms


def outer_norms_sq(x: Sequence[Tensor], grad: Sequence[Tensor]) -> Tensor:
    r"""[layers, B]: squared norms :math:`\|x_b\|^2 \|g_b\|^2` of weight gradients, many layers in one call."""
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.lipcore.outer_norms_sq([a.detach() for a in x], [g.detach() for g in grad])
        return traced
    return torch.stack([(sample_norms(a) * sample_norms(g)).square() for a, g in zip(x, grad, strict=True)])


_library.register(
    "outer_norms_sq(Tensor[] x, Tensor[] grad) -> Tensor",
    lambda x, grad: outer_norms_sq(x, grad),
    lambda x, grad: x[0].new_empty(len(x), x[0].shape[0], dtype=torch.float64),
)
