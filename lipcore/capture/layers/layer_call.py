"""One call of a tapped layer: the batch that its shapes fit, and what its rule saves of it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lipcore.capture.layers.packed import batch_of_call, check_rows
from lipcore.layers import Batch, Rule
from lipcore.models.dtensors import local_of

_SAVED = (
    "save() of its rule {0} is to return (tensors, extra), a tuple or list of tensors and anything else that factors() "
    "needs, and has returned {1}; put what is no tensor into extra"
)


class LayerCall(NamedTuple):
    """One call of a tapped layer: its batch, arguments, output and what its rule saved."""

    batch: Batch
    arguments: tuple[Any, ...]
    output: Tensor
    saved: list[Tensor]
    extra: Any


def call_of(
    rule: Rule,
    module: nn.Module,
    arguments: Any,
    keywords: Any,
    output: Tensor,
    batches: list[Batch],
    *,
    broadcast: bool,
) -> LayerCall:
    """Return a layer's call as a call with the first of these batches that its shapes fit.

    Args:
        broadcast: it is called without the batch dimension, and its output is expanded.
    """
    *others, last = batches
    for batch in others:
        with suppress(ValueError):
            return call_of(rule, module, arguments, keywords, output, [batch], broadcast=broadcast)
    if broadcast:
        last, arguments, output = expanded(last, arguments, output)
    last = batch_of_call(last, output, rule.feature_dims(module))
    saved, extra = saved_of(rule, module, arguments, keywords, last)
    if last.offsets is not None:
        check_rows(output, rule.feature_dims(module), last.offsets)
    return LayerCall(last, arguments, output, saved, extra)


def saved_of(rule: Rule, module: nn.Module, arguments: Any, keywords: Any, batch: Batch) -> tuple[list[Tensor], Any]:
    """Return what a rule saves of a call: tensors, and anything else that it needs."""
    returned = rule.save(module, arguments, keywords, batch)
    wrong = _not_saved(returned)
    if wrong:
        raise TypeError(_SAVED.format(type(rule).__name__, wrong))
    saved, extra = returned
    if any(tensor.layout != torch.strided for tensor in saved):
        raise ValueError("is called with a sparse tensor")
    # No edges of the graph: a saved parameter would seem to be used once more.
    return [local_of(t.detach()) for t in saved], extra


def expanded(batch: Batch, arguments: tuple[Any, ...], output: Tensor) -> tuple[Batch, tuple[Any, ...], Tensor]:
    """Return batch, arguments and output as they would be with the batch dimension, for a layer that is called
    without it (positions). The values stay the same and, by the very sum over the batch that broadcasting makes, so
    do the gradients."""
    first = arguments[0]
    positions = first.dim() - first.is_floating_point()  # dimensions that are no features
    if positions > 1 and first.shape[0] == batch.size > 1:
        raise ValueError(
            f"broadcast: names this layer, which is called on shape {list(first.shape)}, with the batch dimension; "
            "leave it out of broadcast="
        )
    shape = (batch.size, *first.shape) if first.shape[0] != 1 else (batch.size, *first.shape[1:])
    alone = first.shape[0] == 1
    if output.dim() == positions + 1 and not (alone and output.shape[0] == batch.size):  # not by another metric
        output = output.expand((batch.size, *output.shape[alone:]))
    return Batch(batch.size), (first.expand(shape), *arguments[1:]), output


def tensor_of(output: Any) -> Tensor | None:
    """Return the tensor that a layer returns, or the first of a tuple; None where it is none."""
    if isinstance(output, tuple) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """Return what a layer returns with another tensor in that place."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def _not_saved(returned: Any) -> str:
    """Say what a rule's save() has returned in place of (tensors, extra); "" where it has returned that."""
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        return type(returned).__name__ + (f" of {len(returned)}" if isinstance(returned, (tuple, list)) else "")
    tensors = returned[0]
    if not isinstance(tensors, (tuple, list)):
        return f"{type(tensors).__name__} in the place of the tensors"
    wrong = next((type(each).__name__ for each in tensors if not isinstance(each, Tensor)), "")
    return wrong and f"{wrong} among the tensors"
