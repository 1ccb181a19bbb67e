"""A pass of lipcore's own before the first that differentiates by the input: may the user's passes do that?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lipcore import functional
from lipcore.capture.checkpoints import is_reentrant_checkpoint
from lipcore.capture.own_nodes import counted
from lipcore.capture.taps.graph import Operations, goes_past, operations_of
from lipcore.capture.taps.input_alias import Source
from lipcore.capture.taps.views import behind_in_place
from lipcore.capture.training_pass import in_backward
from lipcore.models.gathered import kept_gathered, nothing_reduced
from lipcore.models.inputs import exchanged, places_of
from lipcore.models.outputs import gradient_node, nodes_before
from lipcore.models.pause import paused
from lipcore.models.ranks import EXCHANGES, Communicates, without_communication
from lipcore.models.restored import RandomPass, all_put_back, without_cached_casts
from lipcore.models.torch_internals import OptimizedModule, original, without_backward_hooks

NOT_DIFFERENTIABLE = (
    "the output does not depend on the input through differentiable operations (torch.no_grad, detach or rounding lie "
    "between); name a layer behind them: input='<module>'"
)
_EMPTY = "the batch has no samples"
_OTHERS = "another rank runs no such passes: its batch or its graph does not allow them"
REENTRANT = "reentrant checkpoints cannot be differentiated by the input; use checkpoint(..., use_reentrant=False)"


class Trial(NamedTuple):
    """The findings of a trial pass."""

    refusal: str = ""  #: why the user's passes must not be differentiated by the input
    mixes: bool = False  #: the output of a sample depends on other samples
    constants: Tensor | None = None  #: of two samples, where the output has one value per sample; NaN for the others
    exchanges: bool = False  #: it speaks to other ranks
    random: bool = False  #: it draws random numbers
    rows: int = 0  #: of the input
    layer_rows: int = 0  #: of the output of the layer that was asked about
    past: bool = True  #: the layer that was asked about is not all that the output depends on the input by
    layer: nn.Module | None = None  #: of those that were asked about, the first that ran
    operations: Operations = frozenset()  #: of a sharded model, but those that depend on the input alone
    places: int = 1  #: of the model's arguments that hold the input


class Question(NamedTuple):
    """The pass that the user is about to run, and what is asked of it."""

    model: nn.Module
    at: nn.Module  #: the module whose input it is to be differentiated by
    #: Where that is the model itself, returns the input that is meant of what its forward pass is given, which hooks
    #: may have cast or moved (fully_shard() does); None: the first.
    choose: Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None] | None
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    pick: Callable[[Any], Any]  #: returns the tensor of the model's output that is meant
    #: Does the output depend on the input by way of the one of these that runs first, and of nothing else?
    layers: tuple[nn.Module, ...] = ()
    #: Given words for the backward pass, "" for none: whether all ranks of a sharded model run it. None: not asked.
    agree: Callable[[str], bool] | None = None


class _Ran(NamedTuple):
    """A call of a layer that is asked about."""

    layer: nn.Module
    on_input: bool  #: it was given the very input
    node: Any  #: that made its output
    rows: int


@counted
def trial(asked: Question) -> Trial:
    """Run the model as the user is about to, differentiated by the input of one of its modules, and leave no trace:
    neither in buffers, attributes, gradients and random numbers, nor in what metrics record. Modules' hooks on
    gradients are not called: they may change them, and the function's gradient is asked for."""
    found = Trial()
    try:
        with warnings.catch_warnings(), _unnoticed(asked.model, together=asked.agree is not None):
            warnings.simplefilter("ignore")
            found = _run(asked)
    except RandomPass:
        return found._replace(random=True)
    except Communicates:
        return Trial(EXCHANGES, exchanges=not _averages(asked.model))
    except Exception as error:
        return Trial(f"a pass that is differentiated by the input raises {type(error).__name__}: {_first_line(error)}")
    return found


def exchanges(model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Return whether a forward pass speaks to other ranks, which none of them hears of; leave no trace."""
    try:
        with warnings.catch_warnings(), _unnoticed(model, together=False), torch.no_grad():
            warnings.simplefilter("ignore")
            _bare(model)(*arguments, **keywords)
    except Communicates:
        return not _averages(model)
    except Exception:  # the user's own pass raises it too, or random numbers were drawn
        return False
    return False


def _averages(model: nn.Module) -> bool:
    """Return whether what ranks exchange may be statistics over the batch, by which samples are known to mix."""
    return any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _bare(model: nn.Module) -> nn.Module:
    """Return the module without the wrappers that synchronise or compile its passes."""
    while isinstance(model, (OptimizedModule, nn.parallel.DistributedDataParallel)):
        model = original(model) if isinstance(model, OptimizedModule) else model.module
    return model


@contextmanager
def _unnoticed(model: nn.Module, *, together: bool) -> Iterator[None]:
    alone = [] if together else [kept_gathered(model), without_communication()]
    with ExitStack() as stack:
        for each in alone:
            stack.enter_context(each)
        stack.enter_context(_no_trace(model))
        yield


@contextmanager
def _no_trace(model: nn.Module) -> Iterator[None]:
    with (
        without_backward_hooks(model),
        all_put_back(model),
        paused(),
        torch.compiler.set_stance("force_eager"),
        without_cached_casts(),
    ):
        yield


def _run(asked: Question) -> Trial:
    points: list[Tensor] = []
    sources: list[Source] = []
    layers: list[_Ran] = []

    def replace(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if points and in_backward() == -1:
            return None
        old = asked.choose(given, named) if asked.choose else given[0] if given else next(iter(named.values()))
        if old is None:
            return None
        if not points:
            points.append(old.detach().clone().requires_grad_())
        copy = points[0].clone()  # no leaf: the model may work on it in place
        copy.__dict__.update(old.__dict__)
        if not sources:
            sources.append(Source(copy, places_of(old, given, named)))
        return exchanged(given, old, copy, undo), exchanged(named, old, copy, undo)

    def ran(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if in_backward() == -1:
            made, _ = behind_in_place(output)
            on_input = bool(given) and bool(sources) and sources[0].holds(given[0])
            layers.append(_Ran(module, on_input, made.grad_fn, len(output) if output.dim() else 1))

    undo: list[Any] = []
    handles = [_bare(asked.at).register_forward_pre_hook(replace, with_kwargs=True)]
    handles += [layer.register_forward_hook(ran) for layer in asked.layers]
    try:
        returned = _bare(asked.model)(*asked.arguments, **asked.keywords)
        found = _found(asked, returned, points, layers)
        return found._replace(places=sources[0].places) if sources else found
    finally:  # a checkpoint has run forward again by now
        for handle in handles:
            handle.remove()
        for back in undo:
            back()


def _found(asked: Question, returned: Any, points: list[Tensor], layers: list[_Ran]) -> Trial:
    output = _picked(asked, returned, points)
    if asked.agree is not None and not asked.agree("" if isinstance(output, Trial) else "backward"):
        return output if isinstance(output, Trial) and output.refusal else Trial(_OTHERS)
    if isinstance(output, Trial):
        return output
    alone = bool(layers) and layers[0].on_input and [ran.layer for ran in layers].count(layers[0].layer) == 1
    past = not alone or goes_past(output.grad_fn, gradient_node(points[0]), layers[0].node)
    layer_rows = layers[0].rows if layers else 0
    layer = layers[0].layer if layers else None
    made_of: Operations = frozenset()
    if asked.agree is not None:
        made_of = operations_of(output.grad_fn, (gradient_node(points[0]),))
    with nothing_reduced(asked.model) if asked.agree is not None else nullcontext():
        found = _differentiated(output, points[0])
    return found._replace(past=past, rows=len(points[0]), layer_rows=layer_rows, layer=layer, operations=made_of)


def _picked(asked: Question, returned: Any, points: list[Tensor]) -> Any:
    """Return the output that is differentiated, or the findings where there is none."""
    try:
        output = asked.pick(returned)
    except ValueError:
        return Trial()  # the taps say it in the user's own pass
    if not isinstance(output, Tensor) or not points:
        return Trial()
    if output.grad_fn is None:
        return Trial(NOT_DIFFERENTIABLE)
    if any(map(is_reentrant_checkpoint, nodes_before([output.grad_fn]))):
        return Trial(REENTRANT)
    if output.dim() and not len(output):
        return Trial(_EMPTY if asked.agree is not None else "")
    return output


def _differentiated(output: Tensor, point: Tensor) -> Trial:
    size = output.shape[0] if output.dim() else 1
    if not size:
        return Trial()
    some = two_of(size)
    values = output.reshape(size, -1)[some]
    (gradient,) = torch.autograd.grad(values.sum(), point, allow_unused=True)
    if gradient is None:
        return Trial(NOT_DIFFERENTIABLE)
    if point.shape[0] != size:
        return Trial()
    others = all_but(some, size, gradient.device)
    mixes = bool(torch.nan_to_num(gradient[others], 0.0, 0.0, 0.0).any())
    constants = None
    if values.numel() == len(some) and not mixes:
        constants = functional.sample_norms(gradient).masked_fill(others, float("nan"))
    return Trial(mixes=mixes, constants=constants)


def two_of(size: int) -> list[int]:
    """Return the numbers of the samples that a check looks at: two at no even distance."""
    return sorted({size // 3, (size * 5) // 6})


def all_but(some: list[int], size: int, device: torch.device) -> Tensor:
    """Return which samples of a batch are not among some, as flags."""
    others = torch.ones(size, dtype=torch.bool, device=device)
    others[some] = False
    return others
