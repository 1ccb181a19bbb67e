"""What backward passes of lipcore's own begin with: random gradients at the outputs that have a batch dimension."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lipcore.capture.output_places import OutputPlaces
from lipcore.layers import Batch
from lipcore.models.dtensors import is_partial, placed_as
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

    def differ(self, other: Seeds) -> bool:
        """Return whether these begin elsewhere than others."""
        pairs = [zip(map(id, each.outputs), each.dims, strict=True) for each in (self, other)]
        return list(pairs[0]) != list(pairs[1])

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
            whole = noise.to(output.dtype) * weights[samples].to(output.dtype).reshape(shape)
            found.append(placed_as(whole, output).to(output.device))
        return found


class Begins:
    """The output that proofs of a pass begin at.

    Args:
        output: it; None where it is not known in this pass.
        batch: the samples.
        places: where they are in it, where that is known and it is not all that the model returns.
        named: it is a part or a module's.
    """

    def __init__(self, output: Any, batch: Batch, places: OutputPlaces | None = None, *, named: bool = False) -> None:
        self.output, self._batch, self._places, self._named = output, batch, places, named

    def seeds(self, places: OutputPlaces | None) -> Seeds:
        """Return the seeds there; `places`: where the samples are in all that the model returns."""
        return seeds_of(self.output, self._batch, self._places if self._named else places)


def seeds_of(output: Any, batch: Batch, places: OutputPlaces | None = None) -> Seeds:
    """Return the seeds in what a model returned for this batch; no outputs are in them where none has a batch
    dimension. `places`: where that is, where it is known."""
    returned = list(tensors_of(output))
    if places is not None and batch.offsets is None and len(places) == len(returned):  # one for each sample: other ones
        pairs = zip(returned, places, strict=True)
        told = [(t, at) for t, at in pairs if at is not None and t.grad_fn is not None and t.is_floating_point()]
        if told:  # else the model drops the sample more, as one with a fixed order of its samples
            whose = [at.samples(batch.size) for _, at in told]
            return Seeds([t for t, _ in told], whose, [at.dim for _, at in told], batch.size)
    each = torch.arange(batch.size, device="cpu")
    orders = [each]
    if batch.offsets is not None:  # rows of documents, or one for each document
        orders.insert(0, each.repeat_interleave(batch.offsets.cpu().diff()))
    outputs, dims, whose = [], [], []
    for tensor in returned:
        dim = batch.dim if batch.offsets is None and tensor.dim() > batch.dim else 0
        if tensor.grad_fn is None or not tensor.is_floating_point() or not tensor.dim() or is_partial(tensor):
            continue
        order = next((order for order in orders if tensor.shape[dim] == len(order)), None)
        if order is None or (dim and tensor.shape[0] == len(order)):
            continue  # [B, B, ...] with the batch second: which of them is it?
        outputs.append(tensor)
        dims.append(dim)
        whose.append(order)
    return Seeds(outputs, whose, dims, batch.size)
