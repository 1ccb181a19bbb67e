"""Numerators of r and lambda from one record, and the check of lambda."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lipcore.capture.taps.tap import Record
from lipcore.capture.taps.trial import two_of
from lipcore.lipschitz.input_tap import INTEGERS, ModelInputTap
from lipcore.lipschitz.taps import FirstLayerTap, OutputTap

_MOST_WAITING = 64
_LOSS = "; if the model returns its loss, name the module inside that makes its predictions: output='<module>'"


class _Comparison(NamedTuple):
    """Norms that must agree: by W_1 (None where not taken so), at the input (by W_1 where it is compiled), and of two
    samples alone."""

    product: Tensor | None
    norms: Tensor
    reference: Tensor
    tolerance: float


class Numerators:
    """The numerators of r and lambda of a micro-batch, from whichever taps brought some.

    Args:
        warn: called when lambda is not what it seemed to be.
    """

    def __init__(
        self, first: FirstLayerTap, last: OutputTap, at_input: ModelInputTap, warn: Callable[[str], None]
    ) -> None:
        self._first, self._last, self._at_input = first, last, at_input
        self._warn = warn
        self._waiting: list[_Comparison] = []
        self.first_off = ""  #: why there is no r
        self.agreed = False  #: a check has found that lambda is right
        self.disagreed = ""  #: why lambda is not right, as a check has found

    def start(self) -> None:
        """Begin with another model, without earlier findings."""
        self.first_off, self.disagreed, self.agreed = "", "", False
        self._waiting.clear()

    def lose_first(self, reason: str) -> None:
        """Go on without r, and report why."""
        if not self.first_off:
            self.first_off = reason
            self._at_input.refuse_product()
            self._warn(f"lipcore turned normalized_gradient_norm off: {reason}")

    def of(self, record: Record, *, mixed: bool) -> Tensor | None:
        """Return r, lambda, and r where there is a lambda, each times the norm of the output's gradient; [3, B].

        Args:
            mixed: samples are known to mix, so two of them alone bring something else.
        """
        output_grad, at_input = record[self._last.key], self._at_input
        size = output_grad.shape[1]
        first, norms = record.get(self._first.key), record.get(at_input.key)
        if first is not None and first.shape[1] != size:
            self._misfit(first.shape[1], size)
            first = None
        if norms is not None and norms.shape[1] != size:
            at_input.refuse(
                f"the model's input has {norms.shape[1]} rows, {self._last.place} has {size}; both must have the batch "
                f"as first dimension{_LOSS * (size == 1)}"
            )
            norms = None
        if not at_input.is_vector and not at_input.off and not isinstance(self._first.module, nn.Embedding):
            at_input.refuse(INTEGERS)
        if self.first_off and at_input.off:
            raise ValueError(f"{self.first_off}; {at_input.off}")
        if not mixed:
            self._check(record, first, norms, size)
        return self._rows(first, norms)

    def _misfit(self, rows: int, size: int) -> None:
        reason = (
            f"input: first layer '{self._first.name}' has {rows} rows, {self._last.place} has {size}; both must have "
            f"the batch as first dimension ({_LOSS[2:] if size == 1 else 'was it flattened with another one?'})"
        )
        if self._first.named:
            raise ValueError(reason)
        self.lose_first(reason)

    def _rows(self, first: Tensor | None, norms: Tensor | None) -> Tensor | None:
        at_input = self._at_input
        by_first = bool(at_input.by_product) or not at_input.is_vector
        off = bool(at_input.off or at_input.suspended) and at_input.is_vector
        if first is not None and by_first and not off:
            return first
        found = None if off or norms is None else norms[0]
        if first is None and found is None:
            return None
        size = first.shape[1] if first is not None else len(found)  # type: ignore[arg-type]
        like = first if first is not None else found
        assert like is not None
        missing = like.new_full((size,), math.nan)
        ratio = missing if first is None else first[0]
        return torch.stack([ratio, missing if found is None else found, missing if found is None else ratio])

    # ---- the check

    def _check(self, record: Record, first: Tensor | None, norms: Tensor | None, size: int) -> None:
        at_input = self._at_input
        reference, alone = record.get(at_input.check_key), record.get(at_input.trial_key)
        if reference is None and alone is not None and len(alone) == size:
            reference = alone * record[self._last.key][0].abs()
        product = first[1] if first is not None and at_input.by_product else None
        if reference is None or not size or (norms is None and product is None):
            return
        taken = product if norms is None else norms[0]
        assert taken is not None
        self._waiting.append(_Comparison(product, taken, reference, at_input.tolerance))
        if reference.is_cpu:
            self.settle()
        else:
            del self._waiting[:-_MOST_WAITING]

    def settle(self) -> None:
        """Make the comparisons that wait: on a device each would wait for it in the middle of a step."""
        waiting, self._waiting = self._waiting, []
        for comparison in waiting:
            self._compare(comparison)

    def _compare(self, found: _Comparison) -> None:
        at_input = self._at_input
        some = two_of(len(found.norms))
        others = torch.ones_like(found.norms, dtype=torch.bool)
        others[some] = False
        at_input.mixing = bool(torch.nan_to_num(found.reference[others], 0.0, 0.0, 0.0).any())
        if at_input.mixing:
            return
        if _differ(found.norms[some], found.reference[some], found.tolerance):
            at_input.suspend(
                f"two samples' outputs alone have another gradient at the input than the loss brings there: it depends "
                f"on the input past {self._last.place} (an auxiliary output, a penalty), or hooks change gradients; "
                "name the output that the loss is made of: output=..."
            )
            self.disagreed = at_input.suspended
            return
        at_input.resume()
        if found.product is not None and _differ(found.product, found.norms, found.tolerance):
            at_input.refuse_product()
            self.disagreed = "a check has found another gradient at the model's input"
        else:
            self.agreed = True


def _differ(one: Tensor, other: Tensor, tolerance: float) -> bool:
    both = one.isfinite() & other.isfinite()
    if not bool(both.any()):
        return False
    one, other = one[both], other[both]
    scale = torch.maximum(one.abs(), other.abs()).max()
    return bool(((one - other).abs() > tolerance * scale).any())
