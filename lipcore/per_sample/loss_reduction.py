"""What the loss reduction did to the backpropagated gradient, and how it is undone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lipcore.models.arguments import check_choice
from lipcore.per_sample.loss_factor import LossFactor, of_host, product
from lipcore.per_sample.loss_terms import LossTerms
from lipcore.per_sample.watched_loss import WatchedLoss, loss_of_output

LossReduction = Literal["mean", "sum", "auto"]

NO_LOSS = (
    "loss_reduction='auto' reads the loss's own graph, and no loss was set before this backward pass, nor has the "
    "model returned one by the name of `loss`; call set_loss(loss) before loss.backward(), or monitor.log(loss=loss)"
)
NOT_REACHED = (
    "loss_reduction='auto': the backward pass did not come to the loss {0}, or came with a gradient of 0; call "
    "set_loss(loss), or monitor.log(loss=loss), before loss.backward() and with the very loss that it is called on, or "
    "that this is made of"
)
_FIRST, _EVERY = 2, 64  # passes in which a loss is confirmed
Terms = Real | int | float | Tensor | str | Callable[..., Any] | None

OTHER_TERMS = (
    "loss_terms={0!r}: the loss that the model returned was divided by something else, as its own graph says; "
    "loss_reduction='auto' reads it"
)
NO_TERMS = (
    "loss_terms={0!r}: the forward pass was called without that keyword, or with None, so that nobody knows what its "
    "loss is divided by"
)
NO_NUMBER = "loss_terms: the function returned None in place of a number of terms"


SEVERAL = (
    "another loss was set before this one, and no backward pass had come to it: of several forward passes with one "
    "backward pass it is not known whose loss is whose; call backward() after each set_loss(), or pass "
    "loss_reduction='mean' or 'sum' with loss_terms= or scale= in place of 'auto'"
)


class Reduction:
    """The loss reduction as the factor f with grad l_i = f * (what the backward pass brings of sample i), l_i being the
    sum of sample i's unreduced loss terms.

    "sum": 1. "mean": the number of terms that were averaged, which is B unless `terms` says how many. Whatever the loss
    was multiplied by (`scale`: an AMP scale, 1/k under gradient accumulation) is divided out. "auto": f / g of a loss,
    f as its graph says it and g being the gradient that comes to it: of the loss that was set before the backward
    pass, else of the one that the model has returned.
    """

    def __init__(self, reduction: LossReduction, terms: Terms, scale: float, batch_dim: int = 0) -> None:
        why = (
            ": what your loss does over the batch. It has no default, since a wrong one makes every norm wrong by a "
            "factor B"
        )
        check_choice("loss_reduction", reduction, get_args(LossReduction), why=why)
        if terms is not None and reduction == "sum":
            raise ValueError("loss_terms: a loss that is summed divides by no number of terms; leave it out")
        if reduction == "auto" and (terms is not None or scale != 1):
            argument = "scale" if terms is None else "loss_terms"
            raise ValueError(f"{argument}: loss_reduction='auto' reads it from the loss's graph; leave one of them out")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
            raise ValueError(f"scale: expected a finite number > 0, got {scale!r}")
        self.reduction, self.terms, self.scale = reduction, terms, scale
        self._batch_dim, self._terms = batch_dim, LossTerms(batch_dim)
        self._passes, self._disagrees = 0, False
        self._set: WatchedLoss | str | None = None  # the loss that was set, or why it cannot be read
        self.missing = NO_LOSS  #: why factor() has returned None
        self.untold, self._told = "", False  #: what is wrong with `terms`, until the user is told
        #: From the model's arguments and keywords to the number of terms, where it comes from there.
        self.note_of = _note_of(terms)
        #: From what the model returns to its loss, where that says, or may contradict, what it is divided by.
        self.loss_of = self.look_at_output if reduction == "auto" or self.note_of is not None else None
        if terms is not None and self.note_of is None and not _is_function(terms):
            _check(terms)

    @property
    def is_constant(self) -> bool:
        """True when f of a micro-batch of one, without a scaler, is a number that stays the same."""
        given = _is_function(self.terms) or isinstance(self.terms, (Tensor, str))
        return not (self.reduction == "auto" or given)

    def read(self, loss: Tensor) -> None:
        """Read f of the next micro-batch from its loss."""
        if self.reduction != "auto":
            raise RuntimeError(
                f"set_loss: is for loss_reduction='auto'; this metric has '{self.reduction}', which needs no loss"
            )
        before, self._set = self._set, None
        watched = WatchedLoss(loss, self._terms, confirm=self._confirms, batch_dim=self._batch_dim)
        several = before == SEVERAL or (isinstance(before, WatchedLoss) and before.waits_beside(loss))
        self._set = SEVERAL if several else watched

    def look_at_output(self, output: Any, samples: int, may_prove: bool) -> WatchedLoss | str | None:
        """Return the loss that a model has returned, watched (:func:`loss_of_output`); `may_prove`: backward passes of
        lipcore's own may go through its graph."""
        self._passes += 1
        if may_prove and self.reduction == "auto":
            self._terms.mark_outputs(output, samples)
        return loss_of_output(output, samples, self._terms, confirm=self._confirms, batch_dim=self._batch_dim)

    @property
    def _confirms(self) -> bool:
        """True where a loss is to be confirmed: in the first passes, now and then, and once that has failed always."""
        return self._passes <= _FIRST or self._passes % _EVERY == 0 or self._disagrees

    def look_at(self, loss: Tensor) -> None:
        """Read f of the next micro-batch from its loss, where that is wanted; keep the reason where it cannot be."""
        if self.reduction == "auto":
            try:
                self.read(loss)
            except ValueError as error:
                self._set = f"the loss that was logged cannot be read: {error}"

    def forget(self) -> None:
        """Forget a loss that was set: its backward pass did not come."""
        self._set = None

    def factor(
        self,
        samples: int,
        scaler: Any,
        note: Any = None,
        returned: WatchedLoss | str | None = None,
        task: int = -1,
    ) -> LossFactor | None:
        """Return f of a micro-batch of so many samples, in the backward pass with the number `task`; `note` is what
        `note_of` has returned for its forward pass, `returned` what `loss_of` has. None, with the reason in `missing`,
        where it is to be read from a loss that is not there, or from a keyword that was not or that the loss
        contradicts."""
        if self.reduction == "auto":
            return self._read_factor(returned, task)
        given: Any = self.terms
        terms: Any = 1 if self.reduction == "sum" else samples
        if self.note_of is not None and note is None:
            self.missing = f"{(NO_TERMS if isinstance(given, str) else NO_NUMBER).format(given)}; {self.note_of.seen}"
            self.untold, self._told = "" if self._told else self.missing, True
            return None
        if given is not None:
            terms = note if self.note_of is not None else given() if _is_function(given) else given
            _check(terms)  # a tensor may have changed since the last time
            terms = of_host(terms) if isinstance(terms, Tensor) else float(terms)
        factor = product(1 / self.scale, terms, *self._unscaled(scaler))
        if isinstance(returned, WatchedLoss) and returned.contradicts(factor, terms, task):
            self.missing = OTHER_TERMS.format(given)
            return None
        return factor

    def _read_factor(self, returned: WatchedLoss | str | None, task: int) -> LossFactor | None:
        for loss in (self._set, returned):
            factor = loss.factor(task) if isinstance(loss, WatchedLoss) else None
            if isinstance(factor, str):
                self._disagrees, self.missing = True, factor
                return None
            if factor is not None:
                return factor
        found = self._set or returned
        which = "that was set" if self._set is not None else "that the model returned"
        self.missing = found if isinstance(found, str) else NO_LOSS if found is None else NOT_REACHED.format(which)
        return None

    @staticmethod
    def _unscaled(scaler: Any) -> list[float | Tensor]:
        scale = getattr(scaler, "_scale", None) if scaler is not None else None
        return [of_host(scale.double().reciprocal())] if isinstance(scale, Tensor) else []

    def __str__(self) -> str:
        terms = "" if self.terms is None else " over loss_terms"
        return f"loss reduction '{self.reduction}'{terms}" + (f", scale {self.scale:g}" if self.scale != 1 else "")


def _note_of(terms: Any) -> _Note | None:
    """Return the function that takes the number of terms from what the model is called with, where it comes from
    there: from a keyword with this name, or from a function of (arguments, keywords)."""
    if isinstance(terms, str):
        if not terms.isidentifier():
            raise TypeError(f"loss_terms: expected {_EXPECTED}, got {terms!r}, which names no keyword")
        return _Note(terms)
    if not _is_function(terms):
        return None
    try:
        parameters = inspect.signature(terms).parameters.values()
    except (TypeError, ValueError):
        return None
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return _Note(terms) if len(needed) == 2 else None


class _Note:
    """Function that takes the number of terms from a call of the model; it notes which keywords the last one had.

    Args:
        terms: the name of a keyword, or a function of (arguments, keywords).
    """

    def __init__(self, terms: Any) -> None:
        self._terms = terms
        self.names: tuple[str, ...] = ()

    def __call__(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        self.names = tuple(keywords)
        if isinstance(self._terms, str):
            return keywords.get(self._terms)
        try:
            return self._terms(arguments, keywords)
        except KeyError as error:
            raise ValueError(f"loss_terms: the function asks for {error}; {self.seen}") from error

    @property
    def seen(self) -> str:
        """The keywords of the last call, in words."""
        return f"the keywords of that call were {', '.join(map(repr, self.names)) or 'none'}"


def _is_function(terms: Any) -> bool:
    return callable(terms) and not isinstance(terms, Tensor)


_EXPECTED = (
    "the number of averaged terms, a tensor with it, a function that returns it, or the name of the model's keyword "
    "that has it"
)


def _check(terms: Any) -> None:
    """Raise TypeError or ValueError for what is no number of terms. A tensor's value is looked at on the CPU only:
    another device may not have finished it."""
    if isinstance(terms, Tensor):
        if terms.numel() != 1:
            raise ValueError(f"loss_terms: expected one number, got a tensor of shape {list(terms.shape)}")
        if terms.is_complex() or terms.dtype == torch.bool:
            raise TypeError(
                f"loss_terms: expected {_EXPECTED}, got a tensor of {terms.dtype}; count a mask by its sum()"
            )
        if not terms.is_cpu:
            return
        terms = terms.item()
    elif isinstance(terms, bool) or not isinstance(terms, Real):
        raise TypeError(f"loss_terms: expected {_EXPECTED}, got {type(terms).__name__}")
    if not 0 < terms < float("inf"):
        raise ValueError(
            f"loss_terms: expected a finite number > 0, got {terms!r}; a mean over no terms has no gradient: leave "
            "that batch out"
        )
