"""What the loss reduction did to the backpropagated gradient, and how it is undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Terms = int | float | Tensor | Callable[[], Any] | None


class Reduction:
    """The factor f with grad l_i = f * (the backpropagated gradient's part of sample i), l_i being the sum of sample
    i's unreduced loss terms.

    "sum": 1. "mean": the number of terms that were averaged, which is B unless `terms` says how many. Whatever the loss
    was multiplied by (`scale`: an AMP scale, 1/k under gradient accumulation) is divided out.
    """

    def __init__(self, reduction: str, terms: Terms, scale: float) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(
                f"loss_reduction: expected 'mean' or 'sum', got {reduction!r}: what your loss does over the batch. "
                "It has no default, since a wrong one makes every norm wrong by a factor B"
            )
        if terms is not None and reduction == "sum":
            raise ValueError("loss_terms: a loss that is summed divides by no number of terms; leave it out")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
            raise ValueError(f"scale: expected a finite number > 0, got {scale!r}")
        self.reduction, self.terms, self.scale = reduction, terms, scale
        if terms is not None and not _is_function(terms):
            _check(terms)

    @property
    def is_constant(self) -> bool:
        """Whether f of a micro-batch of one, without a scaler, is a number that stays the same."""
        return not (_is_function(self.terms) or isinstance(self.terms, Tensor))

    def factor(self, samples: int, scaler: Any) -> float | Tensor:
        """f of a micro-batch of so many samples; a tensor where reading it would synchronise."""
        terms: Any = self.terms
        if _is_function(terms):
            terms = terms()
            _check(terms)
        count: Any = 1 if self.reduction == "sum" else samples if terms is None else terms
        if isinstance(count, Tensor):
            count = count.detach().reshape(()).to(torch.float64)
        scale = getattr(scaler, "_scale", None) if scaler is not None else None
        factor = count / self.scale
        unscaled: float | Tensor = factor / scale.double() if isinstance(scale, Tensor) else factor
        return unscaled

    def __str__(self) -> str:
        terms = "" if self.terms is None else " over loss_terms"
        return f"loss reduction '{self.reduction}'{terms}" + (f", scale {self.scale:g}" if self.scale != 1 else "")


def _is_function(terms: Any) -> bool:
    return callable(terms) and not isinstance(terms, Tensor)


def _check(terms: Any) -> None:
    """Of a tensor's value nothing is asked: it may be on a device that has not finished."""
    if isinstance(terms, bool) or not isinstance(terms, (int, float, Tensor)):
        raise TypeError(
            f"loss_terms: expected the number of averaged terms, a tensor with it, or a function that returns it, "
            f"got {type(terms).__name__}"
        )
    if isinstance(terms, Tensor):
        if terms.numel() != 1:
            raise ValueError(f"loss_terms: expected one number, got a tensor of shape {list(terms.shape)}")
    elif not 0 < terms < float("inf"):
        raise ValueError(f"loss_terms: expected a finite number > 0, got {terms!r}")
