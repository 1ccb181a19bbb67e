"""How many samples a forward pass has, read from what the model is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lipcore.capture.layers.packed import boundaries
from lipcore.layers import Batch
from lipcore.models.containers import WHOLE, leaves_of, parts_of
from lipcore.models.outputs import tensors_of

#: From the model's arguments and keywords to the document boundaries of packed sequences.
OffsetsOf = Callable[[tuple[Any, ...], dict[str, Any]], Tensor]

_DOUBT = (
    "the first tensor that the model is called with has shape {0}, which would be one sample, but {1} {2}, and "
    "what is returned does not show that there is one sample; give what has a row for each sample before all other "
    "tensors"
)

_CLOSED = (
    "; a {0} is not looked into: give the model the tensors in it, as arguments of their own or in a dict or dataclass"
)

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
    closed = next((leaf for leaf in leaves_of((arguments, keywords)) if not isinstance(leaf, WHOLE)), None)
    kind = "" if closed is None else _CLOSED.format(type(closed).__name__)
    raise ValueError(
        f"model: none of its arguments is a tensor with a dimension {batch_dim}, so there is no batch size{kind}"
    )


def doubt_one(arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any, batch_dim: int) -> str:
    """Return why a pass that was taken for one of a single sample may have more, or "".

    Raises:
        ValueError: what the model returns shows that it has.
    """
    shapes = [tensor.shape for tensor in tensors_of(output)]
    sizes = [shape[batch_dim] if len(shape) > batch_dim else 0 for shape in shapes]
    first, doubt = batch_tensor(arguments, keywords, batch_dim), ""
    for name, argument in _named(arguments, keywords):
        is_list = isinstance(argument, (list, tuple))
        rows = len(argument) if is_list else _size(argument, batch_dim)
        if first is None or rows < 2 or (is_list and 1 in sizes):
            continue
        what = f"is a {type(argument).__name__} of {rows} tensors" if is_list else f"has {rows} rows"
        a_length = not is_list and rows in first.shape
        if rows in sizes and 1 not in sizes and not a_length:
            raise ValueError(
                f"model: the first tensor that it is called with has shape {list(first.shape)}, but {name} {what} "
                f"and {rows} rows are returned: these are the samples. Give all as one tensor (torch.stack, padded), "
                "or before all other tensors, or give the other tensors a row for each sample (expand)"
            )
        # Of one sample a length may be returned as well, and all that is returned of samples may be one row (x[None]).
        shown = 1 in sizes and (a_length or not any(rows in shape for shape in shapes))
        if rows in sizes or is_list or not shown:
            doubt = doubt or _DOUBT.format(list(first.shape), name, what)
    return doubt


def _named(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what a model is given, with names: tensors, however deep they are packed, and lists of tensors."""
    for i, each in enumerate(arguments):
        yield from _inside(f"argument {i}", each)
    yield from _inside("", keywords)


def _inside(name: str, given: Any, within: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    if id(given) in within:  # what refers to itself
        return
    within, parts = (*within, id(given)), parts_of(given)
    if parts is not None:
        for key, each in parts.items():
            yield from _inside(f"{name}[{key!r}]" if name else f"'{key}'", each, within)
    elif isinstance(given, (list, tuple)):
        if len(given) > 1 and all(isinstance(each, Tensor) for each in given):
            yield name, given
        for i, each in enumerate(given):
            yield from _inside(f"{name}[{i}]", each, within)
    else:
        yield name, given


def _size(argument: Any, batch_dim: int) -> int:
    """Return how many rows an argument or output has; 0 where it has none."""
    return int(argument.shape[batch_dim]) if isinstance(argument, Tensor) and argument.dim() > batch_dim else 0


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
    for leaf in leaves_of((arguments, keywords)):
        if isinstance(leaf, Tensor) and leaf.dim() > batch_dim:
            return leaf
    return None
