"""What Lipschitz takes in, micro-batch by micro-batch, and what later checks make it take back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lipcore import _core
from lipcore.capture.taps.tap import Record
from lipcore.lipschitz.numerators import Numerators
from lipcore.lipschitz.open_window import LipschitzWindow
from lipcore.lipschitz.taps import OutputTap
from lipcore.metric.blocks import Block
from lipcore.metric.distribution import observe_ratios
from lipcore.metric.hook_warnings import warn_in_hook
from lipcore.models.checks import has_statistics, mixes_samples

_PROBE = "follow fixed points in eval mode, monitor.probe(x, name), or use GroupNorm or LayerNorm"
_REPLACE = "put GroupNorm or LayerNorm in its place"
_LEAVE_OUT = (
    "follow fixed points in eval mode, monitor.probe(x, name), where samples are apart there, or leave out what mixes "
    "them"
)
#: Distributions of a window: of r, of lambda, and of r where there is a lambda, for the sandwich.
LAMBDA, PAIRED, PLACES = 1, 2, 3
_OF_LAMBDA = ("local_lipschitz", "sandwich")  # quantities that are made of the second and third


class LipschitzRecords(LipschitzWindow):
    """Base of :class:`Lipschitz` that takes in records of micro-batches."""

    _last: OutputTap
    _numerators: Numerators
    _cores: list[Any]  # the same objects all the time: the shortcut holds them
    _since_check: int  # micro-batches, since a check has agreed in one
    _record: tuple[Tensor, Tensor] | None  # the last one's numerators and output gradients
    _batchnorms: list[nn.Module]
    _warned: bool
    _raised: Warning | None  # by a warning, where it could not be handed on
    _served: bool  # the shortcut has been used

    def observe_record(self, record: Record) -> None:
        """Take in one micro-batch that has come through the taps."""
        output_grad = record[self._last.key]
        if self._batchnorms:
            self._check_mixing()
        numerators = self._numerators.of(record, mixed=self._mixed)
        self._since_check = 0 if self._heed_checks() else self._since_check + 1
        if self._raised is not None:
            error, self._raised = self._raised, None
            raise error
        if numerators is None:
            return
        self._record = numerators, output_grad
        self._observe(numerators, output_grad, self._open.open, self._cores)
        if self._served:  # what the taps bring is right, and stays
            proved = self._open.proved
            self._observe(numerators, output_grad, proved, [distribution.core for distribution in proved])

    def _observe(self, numerators: Tensor, output_grad: Tensor, block: Block, cores: list[Any]) -> None:
        if numerators.is_cpu:
            _core.observe_ratios(numerators, output_grad, cores, self._last.smallest)
        else:
            observe_ratios(numerators, output_grad[0], self._last.smallest, block)

    def observe_gradients(self) -> None:
        if self._virtual_bias is not None:
            self._virtual_bias.observe_gradients()

    def observe_divided_gradients(self) -> None:
        """Leave it: a bias that no layer has is divided by nobody, so its path is not known then."""

    def observe_used_gradients(self, optimizer: Optimizer) -> None:
        if self._virtual_bias is not None:
            self._virtual_bias.observe_used_gradients(optimizer)

    def observe_step(self) -> None:
        """Count an optimizer step that was just made."""
        self._bias.observe()
        if self._virtual_bias is not None:
            self._virtual_bias.observe_step()

    @property
    def step_call(self) -> Callable[[], object]:
        """The function that counts a step, for loops whose steps take microseconds."""
        return self._bias.observe if self._virtual_bias is None else self.observe_step

    def _heed_checks(self) -> bool:
        """Label the values where samples mix, and drop the lambdas that a check has found to be wrong; return whether
        one has agreed."""
        if self._at_input.mixing and not self._mixed:
            self._mixes("the output of a sample depends on other samples of the batch", _LEAVE_OUT)
        found, at_input = self._numerators, self._at_input
        wrong = found.disagreed
        if at_input.strayed:
            wrong = f"the output has come to depend on the input past '{self._first.name}'"
        agreed = found.agreed and not wrong
        found.agreed, found.disagreed, at_input.strayed = False, "", False
        if agreed:
            self._unchecked.settle()
        if wrong:
            self._drop_lambdas(wrong)
        return agreed

    def _drop_lambdas(self, why: str) -> None:
        """Drop the lambdas since the last check that agreed, in results that have been handed out too."""
        known = bool(self._open.merged()[LAMBDA].count or self._unchecked)
        self._open.drop((LAMBDA, PAIRED))
        self._unchecked.withdraw(f"a later check did not agree: {why}", _OF_LAMBDA)
        if known:
            self._warn(
                f"local_lipschitz by W_1 of '{self._first.name}' is not the gradient at the model's input: {why}. What "
                "came since the last check that agreed is dropped, and NaN in windows that have closed"
            )

    def _check_mixing(self) -> None:
        if any(mixes_samples(module) for module in self._batchnorms):
            lasting = not all(map(has_statistics, self._batchnorms))
            self._mixes(f"{self._mixer} mixes samples", _REPLACE if lasting else _PROBE)

    @property
    def _mixer(self) -> str:
        """Name of what mixes samples, where something does."""
        if not self._batchnorms:
            return "the model"
        kept = all(map(has_statistics, self._batchnorms))
        return f"BatchNorm {'in train mode' if kept else 'without running statistics'}"

    def _mixes(self, why: str, way_out: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(
                f"{why}, so per-sample gradients are not those of single samples: lipschitz values are heuristic "
                f"(directly behind the first layer they lose their meaning). For exact ones {way_out}"
            )
        self._mixed = True

    def _lose_first(self, reason: str) -> None:
        self._numerators.lose_first(reason)

    def _lambda_refused(self, reason: str) -> None:
        self._warn(f"lipcore turned local_lipschitz off: {reason}")

    def _virtual_bias_refused(self, reason: str) -> None:
        self._warn(f"lipcore does not follow the virtual bias: {reason}")

    def _warn(self, message: str) -> None:
        self._raised = warn_in_hook(message, UserWarning, stacklevel=3) or self._raised

    def _forget_record(self) -> None:
        if not self._served:
            self._open.mark()  # what the taps brought is right
        self._record, self._served = None, True

    def _agrees(self, r: float, local_lipschitz: float) -> bool:
        """Return whether the shortcut reads the values that the taps have just brought; warn where it does not."""
        if self._record is None or self._record[1].shape[1] != 1:
            return False
        numerators, eps = self._record[0].tolist(), abs(self._record[1].item())
        if eps > 0 and math.isfinite(eps):
            tapped = numerators[0][0] / eps, numerators[1][0] / eps
            agrees = math.isclose(r, tapped[0], rel_tol=1e-6)
            # NaN: the taps take lambda less often.
            agrees &= math.isnan(tapped[1]) or math.isclose(local_lipschitz, tapped[1], rel_tol=1e-6)
        else:
            agrees = math.isnan(r)
        if agrees:
            self._open.mark()
            self._handed_out.settle()
        elif self._served:
            self._take_back()
        return agrees

    def _take_back(self) -> None:
        """Drop what was read from the gradients since the last check, which the taps have found to be wrong."""
        self._served = False
        reason = (
            "the gradients of the first and last bias have come to hold more than the loss of one sample (a penalty on "
            "parameters?)"
        )
        count = self._open.take_back()
        self._taken_back += count
        self._handed_out.withdraw(f"unproved: a later proof failed: {reason}")
        self._warn(
            f"{reason}: {count} values that were read from them since the last check are taken back, results that were "
            "made of some of them are NaN (windows of the history too), and from here on they are not used"
        )
