"""What backward passes of lipcore's own begin with: random gradients at the outputs that have a batch dimension."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lipcore.layers import Batch
from lipcore.models.outputs import tensors_of

_SCALE = 16.0


class Seeds(NamedTuple):
    """The outputs with a batch dimension that lipcore's own backward passes begin at.

    Attributes:
        outputs: the tensors.
        samples: for each of them, the sample at every place of its batch dimension, int64.
        dims: for each of them, its batch dimension.
        size: how many samples there are.
    """

    outputs: list[Tensor]
    samples: list[Tensor]
    dims: list[int]
    size: int

    def only(self, number: int) -> Seeds:
        """Return the seeds of one output alone, chosen by its number."""
        chosen = slice(number, number + 1)
        return Seeds(self.outputs[chosen], self.samples[chosen], self.dims[chosen], self.size)

    def gradients(self, weights: Tensor) -> list[Tensor]:
        """Return random gradients at the outputs, the same at every call, times the weight of each sample.

        They are larger than most losses': float16 has few numbers below, and those that round are other bits.
        """
        generator = torch.Generator().manual_seed(0)
        found = []
        for output, samples, dim in zip(self.outputs, self.samples, self.dims, strict=True):
            noise = _SCALE * torch.randn(output.shape, generator=generator, device="cpu")
            shape = [1] * output.dim()
            shape[dim] = -1
            found.append((noise.to(output.dtype) * weights[samples].to(output.dtype).reshape(shape)).to(output.device))
        return found


def seeds_of(output: Any, batch: Batch) -> Seeds:
    """Return the seeds in what a model returned for this batch; no outputs are in them where none has a batch
    dimension."""
    order = torch.arange(batch.size, device="cpu")
    if batch.offsets is not None:
        order = order.repeat_interleave(batch.offsets.cpu().diff())
    outputs, dims = [], []
    for tensor in tensors_of(output):
        dim = batch.dim if batch.offsets is None and tensor.dim() > batch.dim else 0
        if tensor.grad_fn is None or not tensor.is_floating_point() or not tensor.dim():
            continue
        if tensor.shape[dim] != len(order) or (dim and tensor.shape[0] == len(order)):
            continue  # [B, B, ...] with the batch second: which of them is it?
        outputs.append(tensor)
        dims.append(dim)
    return Seeds(outputs, [order] * len(outputs), dims, batch.size)
