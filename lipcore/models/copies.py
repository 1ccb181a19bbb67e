"""Whether a sample's output depends on the other samples: the batch is run again with that sample in every place.

Statistics of the batch that are detached leave no trace in the gradients; this shows them. A batch of copies, and not
the sample alone, since then every kernel runs on the same shapes and draws the same random numbers: the sample's output
is the same bits where it does not depend on the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.models.accumulation import without_accumulation
from lipcore.models.chains import home_of
from lipcore.models.containers import exchanged_leaves, fixed_container, leaves_of
from lipcore.models.drawing_operations import DrawingOperations
from lipcore.models.dtensors import local_of
from lipcore.models.gathered import is_spread
from lipcore.models.outputs import tensors_of
from lipcore.models.pause import paused
from lipcore.models.ranks import below_ddp, without_communication
from lipcore.models.restored import PassState, without_cached_casts
from lipcore.models.sparse_rows import bytes_of, rows_at
from lipcore.models.torch_internals import (
    ANY_FORWARD_HOOKS,
    ANY_FORWARD_PRE_HOOKS,
    is_compiled,
)
from lipcore.models.writes import writes_put_back

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
#: Whose hooks on forward passes see nothing that could surprise them: transformers' output_capturing collects what a
#: call has asked for, and that call's alone; the others let gradients reach an embedding's output, or add noise to it.
_KNOWN = (
    "lipcore",
    "torch.nn.utils",
    "transformers.utils.output_capturing",
    "transformers.modeling_utils",
    "transformers.integrations.neftune",
    "peft",
)
DEPENDS = (
    "the output of sample {0} is another one when the other samples are exchanged. Either the model takes statistics "
    "over the batch that it detaches, or it returns its samples in another order, and then there are no gradients per "
    "sample; take the statistics over features, or call eval() where they are running ones. Or it takes or returns a "
    "list with a tensor for each sample; pass and return one tensor of all (torch.stack, pad_sequence)"
)
#: Largest relative difference that rounding explains: experts that get other numbers of rows use other kernels.
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}
_ROUNDING_HALF = 3e-2
_ANOTHER = "its output is another one when it is run again on the same batch"
_SPEAKS = (
    "a hook of {0} on module '{1}' would speak to other ranks in another forward pass; DistributedDataParallel in the "
    "place of the composable replicate() leaves such a pass to one rank"
)
_SEES = "would see another forward pass"
TAKE_OFF = "take the hook off, by its handle's remove(), and call rebind()"
_DRAWS = "how many random numbers it draws depends on the batch"
_OTHERS = (
    "the output of sample {0} is another one when the other samples are exchanged, and it is called with tensors of "
    "other numbers of rows beside, which may belong to samples by what these hold (pictures in texts)"
)
_BATCHES = 3  # held at once: what was kept, the copies, and what the model is given


def _returned(call: Callable[[], Any]) -> Any:
    return call()


class Before:
    """State that a forward pass begins with, kept so that it can be run again.

    Args:
        model: the module that is called.
        arguments: of the call.
        keywords: of the call.
        first: the argument that has the batch.
        dim: where.
        together: all ranks run it again, each on its own batch: a sharded model is then run as often on each.

    Attributes:
        refused: why the pass cannot be run again, or "".
        bytes: that it keeps and will take, but for what a forward pass without gradients does.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        first: Tensor,
        dim: int,
        *,
        together: bool = False,
    ) -> None:
        model, self._together = below_ddp(model), together
        self._model, self._call, self._first, self._dim = model, (arguments, keywords), first, dim
        self.refused = why_not_again(model, arguments, keywords, together=together)
        self.bytes = 0
        if not self.refused:
            self._kept = first.detach().clone()
            self.bytes = _BATCHES * bytes_of(self._kept)
            self._state = PassState(model)
            leaves = [leaf for leaf in leaves_of(self._call) if isinstance(leaf, Tensor) and leaf is not first]
            beside = [leaf for leaf in leaves if leaf.is_floating_point() and leaf.dim() > 1]
            self._has_others = any(leaf.shape[min(dim, leaf.dim() - 1)] != first.shape[dim] for leaf in beside)

    def difference(
        self, output: Any, rows: Sequence[tuple[int, int, Tensor]], run: Callable[[Callable[[], Any]], Any] = _returned
    ) -> tuple[str, list[int]]:
        """Return why samples are not independent of each other, or "", and the places of the tensors that show it; none
        where it is not certain.

        Args:
            output: of the model in this pass; rows of its tensors are compared.
            rows: of the tensors in it, in their order: the place, the batch dimension, the sample of each row there.
            run: takes a function that calls the model to the model's output, where that is not what it returns.
        """
        if self.refused:
            return self.refused, []
        if self._together:
            return self._difference_together(output, rows, run)
        after = PassState(self._model)
        try:
            if _compiles(self._model):  # the compiled numbers are not the eager ones
                output = run(lambda: self._run(self._kept))
            tensors = list(tensors_of(output))
            for sample in (0, self._kept.shape[self._dim] - 1):
                copies = list(tensors_of(run(functools.partial(self._run, self._copies(sample)))))
                used = self._state.random.now()
                wrong = _differing(rows, tensors, copies, sample)
                if not wrong:
                    continue
                again = list(tensors_of(run(lambda: self._run(self._kept))))
                if not all(_same(tensors[i], again[i]) for i, *_ in rows):
                    return _ANOTHER, []
                if not self._state.random.are_same(used, self._state.random.now()):
                    return _DRAWS, []
                if self._draws(self._kept) != self._draws(self._copies(sample)):
                    return "for how many rows it draws random numbers depends on the batch (dropout in experts)", []
                return self._depends(sample, wrong)
        except Exception as error:
            return f"it could not be run again ({type(error).__name__}: {error})", []
        finally:
            after.put_back()
        return "", []

    def _depends(self, sample: int, wrong: list[int]) -> tuple[str, list[int]]:
        return (_OTHERS.format(sample), []) if self._has_others else (DEPENDS.format(sample), wrong)

    def _difference_together(
        self, output: Any, rows: Sequence[tuple[int, int, Tensor]], run: Callable[[Callable[[], Any]], Any]
    ) -> tuple[str, list[int]]:
        """Return the same from three passes, whatever they bring: every rank runs as many."""
        after, found, random = PassState(self._model), [], []
        samples = (0, self._kept.shape[self._dim] - 1)
        try:
            for x in (self._copies(samples[0]), self._copies(samples[1]), self._kept):
                found.append(list(tensors_of(run(functools.partial(self._run, x)))))
                random.append(self._state.random.now())
        except Exception as error:
            return f"it could not be run again ({type(error).__name__}: {error})", []
        finally:
            after.put_back()
        again = found.pop()
        tensors = again if _compiles(self._model) else list(tensors_of(output))
        if not all(_same(tensors[i], again[i]) for i, *_ in rows):
            return _ANOTHER, []
        for sample, copies in zip(samples, found, strict=True):
            wrong = _differing(rows, tensors, copies, sample)
            if wrong and not all(self._state.random.are_same(each, random[-1]) for each in random):
                return _DRAWS, []
            if wrong:
                return self._depends(sample, wrong)
        return "", []

    def _copies(self, sample: int) -> Tensor:
        if self._kept.layout != torch.strided:
            places = torch.full((self._kept.shape[self._dim],), sample, device=self._kept.device)
            return rows_at(self._kept, self._dim, places)
        # In the batch's own memory format, which selected rows would not have: other kernels round in another way.
        return self._kept.narrow(self._dim, sample, 1).expand_as(self._kept).clone()

    def _draws(self, x: Tensor) -> list[tuple[str, tuple[int, ...]]]:
        """Return the operations that draw random numbers, and how many each draws, as the model is run on x."""
        drawn = DrawingOperations()
        with drawn:
            self._run(x)
        return drawn.found

    def _run(self, x: Tensor) -> Any:
        """Return what the model makes of x in the place of the batch, from the same state as the pass had."""
        self._state.put_back()
        x = x.clone()
        arguments, keywords = exchanged_leaves(lambda leaf: x if leaf is self._first else leaf, self._call)
        # Sharded parameters come and go within the pass, which speaks to other ranks.
        alone = (
            *(writes_put_back(self._state.held.watched()), without_communication()),
            without_accumulation(self._model),
        )
        with ExitStack() as stack:
            for context in (torch.no_grad(), paused(), without_cached_casts(), *(() if self._together else alone)):
                stack.enter_context(context)

            return self._model(*arguments, **keywords)


def why_not_again(model: nn.Module, arguments: Any, keywords: Any, *, together: bool = False) -> str:
    """Return why a model that was called so cannot be run again without anyone noticing, or ""; `together`: by all
    ranks."""
    known = (*_KNOWN, "torch.distributed") if together else _KNOWN
    fixed = fixed_container((arguments, keywords))
    odd = [leaf for leaf in leaves_of((arguments, keywords)) if not isinstance(leaf, (*_PLAIN, Tensor))]
    odd = odd if fixed is None else [fixed]
    if odd:
        return f"it is called with a {type(odd[0]).__name__}, which another pass may change"
    if is_spread(model) and not together:
        return "it is sharded"
    if ANY_FORWARD_HOOKS or ANY_FORWARD_PRE_HOOKS:
        return f"hooks on all modules {_SEES}"
    for name, module in model.named_modules():
        homes = map(home_of, [*module._forward_hooks.values(), *module._forward_pre_hooks.values()])
        if others := [home for home in homes if not home.startswith(known)]:
            if others[0].startswith("torch.distributed"):
                return _SPEAKS.format(others[0], name)
            return f"a hook of {others[0]} on module '{name}' {_SEES}"
    return ""


def is_for_a_hook(why: str) -> bool:
    """Return whether a model cannot be run again for a hook on it, of which :data:`TAKE_OFF` is the remedy."""
    return _SEES in why


def not_looked_for(why: str) -> str:
    """Return that the model was not run on copies of a sample, why, and the remedy where it is a hook."""
    said = f"statistics over the batch that the model may detach were not looked for: {why}"
    return f"{said}; {TAKE_OFF}" if is_for_a_hook(why) else said


def _of(tensor: Tensor, dim: int, whose: Tensor, sample: int) -> Tensor:
    return rows_at(local_of(tensor.detach()), dim, (whose == sample).nonzero().flatten().to(tensor.device))


def _differing(
    rows: Sequence[tuple[int, int, Tensor]], tensors: Sequence[Tensor], copies: Sequence[Tensor], sample: int
) -> list[int]:
    """Return the places of the tensors whose rows of a sample are others than where it stands in every place."""
    return [i for i, d, whose in rows if not _same(_of(tensors[i], d, whose, sample), _of(copies[i], d, whose, sample))]


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two outputs agree, or the first is not finite."""
    one, other = local_of(one.detach()), local_of(other.detach())
    if torch.equal(one, other) or not bool(one.isfinite().all()):
        return True
    allowed = _ROUNDING.get(one.dtype, _ROUNDING_HALF)
    difference = (one.double() - other.double()).norm()
    return bool(difference <= allowed * one.double().norm())


def _compiles(model: nn.Module) -> bool:
    return any(is_compiled(module) for module in model.modules())
