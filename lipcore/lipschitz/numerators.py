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
from lipcore.metric.host_reads import OnDevice, fetch

_MOST_WAITING = 64
_LOSS = "; if the model returns its loss, name the module inside that makes its predictions: output='<module>'"


class _Comparison(NamedTuple):
    """Norms that must agree: by W_1 (None where not taken so), at the input (by W_1 where it is compiled), and of two
    samples alone."""

    product: Tensor | None
    norms: Tensor
    reference: Tensor
    tolerance: float

    def apart(self) -> _Comparison:
        """Return it with memory of its own: rows of a record would keep all of that until the window closes."""
        product = None if self.product is None else self.product.clone()
        norms = product if product is not None and self.norms is self.product else self.norms.clone()
        return self._replace(product=product, norms=norms)

    @property
    def tensors(self) -> list[Tensor]:
        """Those of the norms that are there."""
        return [tensor for tensor in (self.product, self.norms, self.reference) if tensor is not None]


class ComparisonsRead:
    """Comparisons on a device, which are replaced by those of the same numbers on the host."""

    def __init__(self, waiting: list[_Comparison]) -> None:
        self._waiting = waiting

    @property
    def device(self) -> torch.device:
        """The device of the first, and of all."""
        return self._waiting[0].norms.device

    @property
    def is_changed(self) -> bool:
        """True until they are on the host."""
        return bool(self._waiting) and not self._waiting[0].norms.is_cpu

    def packed(self) -> Tensor:
        """Return all their numbers behind each other."""
        return torch.cat([tensor.double() for one in self._waiting for tensor in one.tensors]).view(torch.int64)

    def take(self, packed: Tensor) -> None:
        """Put the comparisons of the host in their place."""
        numbers = iter(packed.view(torch.float64).split([len(t) for one in self._waiting for t in one.tensors]))
        for i, one in enumerate(self._waiting):
            product = None if one.product is None else next(numbers)
            self._waiting[i] = one._replace(product=product, norms=next(numbers), reference=next(numbers))

    def release(self) -> None:
        """Do nothing: the host has them."""


class Numerators:
    """The numerators of r and lambda of a micro-batch, from whichever taps brought some.

    Args:
        warn: called when lambda is not what it seemed to be.
        goes_on: says whether a metric without r and lambda has something else to measure.
    """

    def __init__(
        self,
        first: FirstLayerTap,
        last: OutputTap,
        at_input: ModelInputTap,
        warn: Callable[[str], None],
        goes_on: Callable[[], bool],
    ) -> None:
        self._first, self._last, self._at_input = first, last, at_input
        self._warn, self._goes_on = warn, goes_on
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
            if self._goes_on():
                return None
            raise ValueError(f"{self.first_off}; {at_input.off}; leave this metric out (metrics=[Trajectory()])")
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
        comparison = _Comparison(product, taken, reference, at_input.tolerance)
        if reference.is_cpu:
            self._waiting.append(comparison)
            self.settle()
        else:
            self._waiting.append(comparison.apart())
            del self._waiting[:-_MOST_WAITING]

    def on_device(self) -> list[OnDevice]:
        """Return the comparisons that wait."""
        return [ComparisonsRead(self._waiting)] if self._waiting else []

    def settle(self) -> None:
        """Make the comparisons that wait: on a device each would wait for it in the middle of a step."""
        fetch(self.on_device())
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
