"""A pass of lipcore's own on one sample more: beside the user's, its graph shows which tensors have the batch."""

from __future__ import annotations

import functools
import itertools
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lipcore.capture.identity import Alias
from lipcore.layers import Batch
from lipcore.models.accumulation import Accumulates, without_accumulation
from lipcore.models.containers import exchanged_leaves, leaves_of
from lipcore.models.copies import why_not_again
from lipcore.models.layouts import laid_out_like
from lipcore.models.pause import paused
from lipcore.models.random_draws import Draws
from lipcore.models.ranks import below_ddp, without_communication
from lipcore.models.restored import all_put_back, without_cached_casts
from lipcore.models.sparse_rows import rows_at

HOOKED = (
    "the forward pass keeps its tensors by hooks (activation checkpointing, saved_tensors_hooks, save_on_cpu), and a "
    "node of its graph may be run once only there; run the model without them"
)


#: By number of a layer, the shapes of what its calls returned.
Shapes = defaultdict[int, list[tuple[int, ...]]]


class AnotherSize:
    """A pass of lipcore's own on more samples, which layers that are no longer torch's are to look alike in.

    Attributes:
        batch: its samples.
        calls: how often each layer was called so far, by the layer's number.
        shapes: gets, by that number, the shapes of its outputs.
    """

    def __init__(self, batch: Batch, shapes: Shapes | None = None) -> None:
        self.batch = batch
        self.shapes: Shapes = defaultdict(list) if shapes is None else shapes
        self.calls: Counter[int] = Counter()


class _UnderWay(threading.local):
    now: AnotherSize | None = None


_under_way = _UnderWay()


def another_size() -> AnotherSize | None:
    """Return the pass of lipcore's own that is under way in this thread."""
    return _under_way.now


@contextmanager
def _under_way_now(batch: Batch, shapes: Shapes | None) -> Iterator[None]:
    _under_way.now = AnotherSize(batch, shapes)
    try:
        yield
    finally:
        _under_way.now = None


class _Longer(NamedTuple):
    """One way to make a batch longer.

    Attributes:
        sample: that is there a second time, in arguments of whole numbers; in others the last one is.
        blocks: also what has a block of rows of each sample: patches of all images.
        only_numbers: what is not of whole numbers stays as it is: the pictures of a text that has none.
        first: what has the samples in its first dimension, and not where the batch is, is longer there (a padding mask
            [B, T] beside [T, B]).
        others: so many of the last rows are there again in matrices that have another number: a text's own pictures.
        alone: by id of an argument, the one dimension of it that is longer, None for none (a mask [T, T] where T = B).
    """

    sample: int
    blocks: bool = False
    only_numbers: bool = False
    first: bool = False
    others: int = 0
    alone: Mapping[int, int | None] = MappingProxyType({})


_MOST_UNCLEAR = 64


def _unclear(leaves: Sequence[Tensor], first: Tensor | None, samples: int, dim: int) -> Iterator[_Longer]:
    """Yield ways that differ in where the arguments beside the first have samples, if they have: a state [L, B, H], a
    padding mask [T, B]; and what is as large as the batch may be so by chance: masks [T, T], positions [T]."""
    places = {id(leaf): [d for d, size in enumerate(leaf.shape) if size == samples] for leaf in leaves}
    unclear = {
        key: (*sorted(dims, key=lambda d: d != dim), None) for key, dims in places.items() if dims and key != id(first)
    }
    for chosen in itertools.islice(itertools.product(*unclear.values()), _MOST_UNCLEAR):
        yield _Longer(samples - 1, alone=dict(zip(unclear, chosen, strict=True)))


def _tries(arguments: tuple[Any, ...], keywords: dict[str, Any], samples: int, dim: int) -> Iterator[_Longer]:
    leaves = [leaf for leaf in leaves_of((arguments, keywords)) if isinstance(leaf, Tensor)]
    first = next((leaf for leaf in leaves if leaf.dim() > dim), None)
    last = samples - 1
    some = list(dict.fromkeys([last, 0, samples // 2, samples // 3]))
    ways = [_Longer(last), _Longer(last, first=True), _Longer(last, blocks=True), *map(_Longer, some[1:])]
    if samples == 1 or (first is not None and not first.is_floating_point()):  # else nothing is longer
        ways += [_Longer(sample, only_numbers=True) for sample in some]
    ways += [_Longer(last, others=count) for count in (1, 2, 3)]
    yield from ways
    yield from _unclear(leaves, first, samples, dim)


class CannotRun(ValueError):
    """The reason why the model cannot be run once more."""


def on_one_more(
    model: nn.Module,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    samples: int,
    dim: int,
    draws: Draws | None = None,
    shapes: Shapes | None = None,
    *,
    aliased: frozenset[int] = frozenset(),
) -> Any:
    """Return what the model makes of the batch with its last sample a second time; or another one, where it does not
    run so (a text with more than one of as many pictures as there are texts).

    Random numbers, buffers and attributes are as before when it returns. Buffers are changed in copies, since a graph
    of the user's may have kept them.

    Args:
        model: that is called.
        arguments: of the call.
        keywords: of the call.
        samples: B.
        dim: where the batch is.
        draws: the random numbers that the pass on B samples has drawn; the draws here are those.
        shapes: gets those of the tapped layers' outputs.
        aliased: ids of arguments in whose place the model got an alias, by another metric (Lipschitz), and of the nodes
            of these.

    Raises:
        CannotRun: with the reason.
    """
    model = below_ddp(model)
    why = why_not_again(model, arguments, keywords)
    if why:
        raise CannotRun(why)

    failure = None
    for more_of in _tries(arguments, keywords, samples, dim):
        longer = functools.partial(_longer, samples=samples, dim=dim, way=more_of, aliased=aliased)
        try:
            if shapes is not None:
                shapes.clear()
            with _own_pass(model, Batch(samples + 1, dim), shapes):
                more, words = exchanged_leaves(longer, (arguments, keywords))
                with draws.again(model, samples) if draws is not None else nullcontext():
                    output = model(*more, **words)
            break
        except Accumulates as error:
            raise CannotRun(str(error)) from error
        except Exception as error:
            failure = failure or error
    else:
        raise CannotRun(
            f"the model could not be run on {samples + 1} samples, which shows where the batch is "
            f"({type(failure).__name__}: {str(failure)[:200]}); where its arguments have other dimensions of size "
            f"{samples}, use another batch size"
        ) from failure
    return output


def note_draws(model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], draws: Draws) -> None:
    """Run the model once more on the batch, to note what random numbers it draws.

    Raises:
        CannotRun: with the reason.
    """
    model = below_ddp(model)
    try:
        with _own_pass(model, None):
            same, words = exchanged_leaves(_copied, (arguments, keywords))
            with draws.noted(model):
                model(*same, **words)
    except Exception as error:
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise CannotRun(f"the model could not be run once more on the same samples ({what})") from error


@contextmanager
def _own_pass(model: nn.Module, batch: Batch | None, shapes: Shapes | None = None) -> Iterator[None]:
    """Run the model in this with block as if it had not been run; `batch`: of samples that its layers are to look alike
    in."""
    with (
        all_put_back(model, random=True),
        _buffers_exchanged(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        paused(),
        without_cached_casts(),
        without_communication(),
        without_accumulation(model),
        nullcontext() if batch is None else _under_way_now(batch, shapes),
    ):
        yield


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _longer(leaf: Any, samples: int, dim: int, way: _Longer, *, aliased: frozenset[int]) -> Any:
    """Return an argument with a sample a second time, or a copy of one that has no samples."""
    if not isinstance(leaf, Tensor):
        return leaf
    if way.first and leaf.dim() > dim and leaf.shape[0] == samples != leaf.shape[dim]:
        dim = 0
    if id(leaf) in way.alone:
        at = way.alone[id(leaf)]
        dim = leaf.dim() if at is None else at
    elif leaf.dim() == dim == 1:  # labels, lengths
        dim = 0
    more, rows = leaf.detach(), leaf.shape[dim] if leaf.dim() > dim else 0
    floats = leaf.is_floating_point()
    strided = leaf.layout == torch.strided
    has = rows == samples or (strided and way.blocks and rows and rows % samples == 0)
    if has and not strided:
        more = rows_at(more, dim, torch.tensor([*range(samples), way.sample], device=more.device))
    elif has and not (floats and way.only_numbers):
        # Pictures are in the order of their texts: that of the one at the end is the last.
        sample = samples - 1 if floats else way.sample
        more = torch.cat([more, more.narrow(dim, sample * (rows // samples), rows // samples)], dim)
    elif way.others and strided and leaf.dim() > 1 and rows >= way.others:
        more = torch.cat([more, more.narrow(dim, rows - way.others, way.others)], dim)
    else:
        more = more.clone()
    more = more if not strided or leaf.is_contiguous() else laid_out_like(more, leaf)
    if floats and strided and not aliased.isdisjoint((id(leaf), id(leaf.grad_fn))):
        return Alias.apply(more, torch.zeros((), requires_grad=True))  # type: ignore[no-untyped-call]
    return more.requires_grad_(leaf.requires_grad)


@contextmanager
def _buffers_exchanged(model: nn.Module) -> Iterator[None]:
    kept = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    copies: dict[int, Tensor] = {}
    for module, buffers in kept:
        for name, buffer in buffers.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.clear()
            module._buffers.update(buffers)
