"""Batches of one: the per-sample gradient is the gradient, so no layer need be tapped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lipcore import _core
from lipcore.capture.accumulation import Leaves
from lipcore.capture.layer_pass import LayerPass
from lipcore.capture.parameters import GradientWatch

_float64 = torch.float64


_PROOF_EVERY = 64  # passes that are served, until one is tapped again and compared


class SingleBatches:
    """Passes of one sample that are served from the gradients, where these have proved to be what taps bring: a penalty
    on the parameters, say, is in the gradients and is no part of a sample's loss.

    Args:
        measured: returns the parameters that are measured, by name.
    """

    def __init__(self, measured: Callable[[], dict[str, nn.Parameter]]) -> None:
        self.enabled = True
        self._measured = measured
        self._leaves = Leaves()
        self._until_proof = 0
        self._reading: LayerPass | None = None  # whose backward pass is under way

    def may_serve(self, run: LayerPass, others: Iterable[LayerPass]) -> bool:
        """Before the forward pass; `others` are those whose backward pass may come together with this one's."""
        if run.batch.size != 1 or not self.enabled or run.chained or any(run.finished_task == -1 for run in others):
            return False
        run.measured = self._measured()
        if not _is_served(run.measured):
            return False
        self._until_proof -= 1
        run.proves = self._until_proof < 0
        return not run.proves

    def prove(self, run: LayerPass, norms_sq: dict[str, Tensor], others: Iterable[LayerPass]) -> None:
        """A pass that was tapped has come back: whether the gradients would have told the same."""
        run.proves = False
        found = gradient_squares(self._measured())
        total = sum(float(row) for row in norms_sq.values())
        together = any(other is not run and other.task == run.task for other in others)
        if together or any(
            not abs(float(square) - float(norms_sq.get(name, 0))) <= 1e-3 * float(square) + 1e-9 * total
            for name, square in found.items()
        ):
            self.enabled = False
        else:
            self._until_proof = _PROOF_EVERY

    def all_accumulate(self, run: LayerPass) -> bool:
        """Whether the backward pass under way reaches all the parameters of layers that were called."""
        called = {name: run.measured[name] for name in run.calls if name in run.measured}
        if called and self._leaves.all_accumulate(called):
            return True
        self.enabled = False
        return False

    def begin(self, run: LayerPass) -> None:
        """The backward pass begins."""
        run.alone = _is_served(run.measured)
        self._reading = run

    def another_begins(self, run: LayerPass) -> None:
        """The backward pass of another, maybe in another thread, which adds to the same gradients."""
        reading = self._reading
        if reading is not None and reading is not run:
            reading.alone = False

    def read(self, run: LayerPass, others: Iterable[LayerPass]) -> None:
        """The backward pass has ended."""
        self._reading = None
        if not run.alone or any(other is not run and other.task == run.task for other in others):
            self.enabled = False
            run.broken = (
                "a batch of one was served from the gradients, and another backward pass added to them; from now on "
                "batches of one are tapped"
            )
            return
        for name, square in gradient_squares(run.measured).items():
            run.calls[name] = 1
            run.add_row(name, square)


def _is_served(parameters: dict[str, nn.Parameter]) -> bool:
    """Whether what a backward pass leaves in .grad will be the gradient of one sample, and still be there."""
    for parameter in parameters.values():
        if parameter.grad is not None or parameter._backward_hooks or not parameter.is_cpu:
            return False
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
        if hooks and not all(GradientWatch.is_ours(hook) for hook in hooks.values()):
            return False  # an optimizer inside the backward pass takes the gradient away
        if parameter.dtype not in (torch.float32, _float64):
            return False
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def gradient_squares(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Per parameter that has a gradient, float64 [1]: its sum of squares."""
    names, gradients = [], []
    for name, parameter in parameters.items():
        gradient = parameter.grad
        if gradient is None:
            continue
        gradient = gradient.detach()
        if gradient.is_sparse:
            gradient = gradient.coalesce().values()
        names.append(name)
        gradients.append(gradient if gradient.is_contiguous() else gradient.contiguous())
    rows = torch.empty(len(gradients), _core.STEP_COLUMNS, dtype=_float64)
    if gradients:
        _core.square_sums(gradients, rows)
    return dict(zip(names, rows[:, :1].unbind(), strict=True))


def on_backward(output: Any, hook: Callable[[], None]) -> None:
    """Call the hook when the backward pass enters the graph behind one of the output's tensors, at each of them."""
    for leaf in (output,) if isinstance(output, Tensor) else tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
            leaf.grad_fn.register_prehook(lambda _: hook())
