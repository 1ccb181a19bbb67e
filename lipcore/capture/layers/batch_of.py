"""How many samples a forward pass has, read from what the model is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lipcore.capture.layers.packed import boundaries
from lipcore.layers import Batch
from lipcore.models.outputs import tensors_of
from lipcore.models.torch_internals import tree_leaves

#: From the model's arguments and keywords to the document boundaries of packed sequences.
OffsetsOf = Callable[[tuple[Any, ...], dict[str, Any]], Tensor]

#: From the model's arguments and keywords to something that the record of the pass is to hold.
NoteOf = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def batch_of(
    arguments: tuple[Any, ...], keywords: dict[str, Any], batch_dim: int, offsets_of: OffsetsOf | None
) -> Batch:
    """Return the batch of a forward pass with these arguments; raise ValueError where its size cannot be told."""
    if offsets_of is not None:
        offsets = boundaries(offsets_of(arguments, keywords))
        return Batch(len(offsets) - 1, batch_dim, offsets)
    first = batch_tensor(arguments, keywords, batch_dim)
    if first is not None:
        return Batch(first.shape[batch_dim], batch_dim)
    raise ValueError(
        f"model: none of its arguments is a tensor with a dimension {batch_dim}, so there is no batch size"
    )


def check_lists(arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
    """Raise ValueError where a pass that was taken for one of a single sample was given its samples as a list."""
    for argument in (*arguments, *keywords.values()):
        rows = len(argument) if isinstance(argument, (list, tuple)) else 0
        if rows < 2 or any(not isinstance(each, Tensor) for each in argument):
            continue
        if any(tensor.shape[:1] == (rows,) for tensor in tensors_of(output)):
            raise ValueError(
                f"model: is called with a {type(argument).__name__} of {rows} tensors, the first of which has shape "
                f"{list(argument[0].shape)}, and returns {rows} rows: these are its samples, and not the first "
                "dimension of the first tensor; call it with one tensor that has them first (torch.stack, padded)"
            )


def batch_tensor(arguments: tuple[Any, ...], keywords: dict[str, Any], batch_dim: int) -> Tensor | None:
    """Return the first argument that may hold the batch; None where no argument may."""
    first = arguments[0] if arguments else None  # mostly it, and looking for others takes 10 us
    if isinstance(first, Tensor) and first.dim() > batch_dim:
        return first
    if any(isinstance(argument, PackedSequence) for argument in (*arguments, *keywords.values())):
        raise ValueError(
            "model: is called with a PackedSequence, whose rows are single steps of many samples; pass padded "
            "sequences, or rows with cu_seqlens="
        )
    for leaf in tree_leaves((arguments, keywords)):
        if isinstance(leaf, Tensor) and leaf.dim() > batch_dim:
            return leaf
    return None
