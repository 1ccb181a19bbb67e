"""Batches of one: the per-sample gradient is the gradient, so no layer need be tapped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lipcore import _core
from lipcore.capture.accumulation import Leaves
from lipcore.capture.layer_pass import LayerPass
from lipcore.capture.parameters import GradientWatch

_float64 = torch.float64


class SingleBatches:
    """Passes of one sample that are served from the gradients.

    Args:
        measured: returns the parameters that are measured, by name.
    """

    def __init__(self, measured: Callable[[], dict[str, nn.Parameter]]) -> None:
        self.enabled = True
        self._measured = measured
        self._leaves = Leaves()

    def may_serve(self, run: LayerPass, others: Iterable[LayerPass]) -> bool:
        """Before the forward pass; `others` are those whose backward pass may come together with this one's."""
        if run.batch.size != 1 or not self.enabled or run.chained or any(run.finished_task == -1 for run in others):
            return False
        return _is_served(self._measured())

    def all_accumulate(self, run: LayerPass) -> bool:
        """Whether the backward pass under way reaches all the parameters of layers that were called."""
        measured = self._measured()
        called = {name: measured[name] for name in run.calls if name in measured}
        if called and self._leaves.all_accumulate(called):
            return True
        self.enabled = False
        return False

    def begin(self, run: LayerPass) -> None:
        """The backward pass begins."""
        run.alone = _is_served(self._measured())

    def read(self, run: LayerPass, others: Iterable[LayerPass]) -> None:
        """The backward pass has ended."""
        if not run.alone or any(other is not run and other.task == run.task for other in others):
            self.enabled = False
            run.broken = (
                "a batch of one was served from the gradients, and another backward pass added to them; from now on "
                "batches of one are tapped"
            )
            return
        for name, square in gradient_squares(self._measured()).items():
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
        gradients.append(gradient if torch.ops.aten.is_non_overlapping_and_dense(gradient) else gradient.contiguous())
    rows = torch.empty(len(gradients), _core.STEP_COLUMNS, dtype=_float64)
    if gradients:
        _core.square_sums(gradients, rows)
    return dict(zip(names, rows[:, :1].unbind(), strict=True))


def on_backward(output: Any, hook: Callable[[], None]) -> bool:
    """Call the hook when the backward pass enters the graph behind the output; False when there is no one place."""
    node = output.grad_fn if isinstance(output, Tensor) else None
    if node is None:
        return False
    node.register_prehook(lambda _: hook())
    return True
