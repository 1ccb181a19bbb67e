"""A loss whose factor was read from its graph, and the gradient that a backward pass brings to it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from itertools import islice
from typing import Any

from torch import Tensor

from lipcore.capture.proof import is_proof
from lipcore.capture.training_pass import accumulates_everything, in_backward
from lipcore.models.outputs import nodes_before, tensors_of
from lipcore.models.torch_internals import top_saved_tensors_hooks
from lipcore.per_sample.loss_confirmation import NOT_CONFIRMED, confirmation_of
from lipcore.per_sample.loss_factor import LossFactor, of_host, product
from lipcore.per_sample.loss_graph import read_loss
from lipcore.per_sample.loss_terms import LossTerms

_HOOKED = (
    "the model's `loss` was made under a checkpoint around the model or under saved_tensors_hooks, where reading its "
    "graph would run the model again; make the loss outside, and call set_loss(loss) or monitor.log(loss=loss)"
)
_SEVERAL = (
    "the `loss` that the model returned has shape {0}; call set_loss(loss) with the number that backward() is called on"
)
_PAST = (
    "loss_reduction='auto': the backward pass comes from more than the `loss` that the model returned: another of its "
    "outputs, which that loss is not made of, has a gradient; call set_loss(loss) with the whole before "
    "loss.backward(), or pass loss_reduction='mean' or 'sum' with loss_terms= or scale= in place of 'auto'"
)
_SAME = 1e-5  # of two factors, relative
#: How many nodes of a loss's graph are gone through at most for the other outputs.
_NODES = 256


class WatchedLoss:
    r"""A loss L whose graph says :math:`\nabla l_i = f \cdot` (what its own backward pass brings of sample i), and the
    gradient g that comes to L in the training's backward pass: the product of all that was done to it since. What that
    pass brings of sample i is then to be multiplied by f / g.

    Of the graph nothing is kept.

    Args:
        loss: before its backward pass.
        terms: proves that its terms are those of single samples.
        confirm: also prove it where that is known of such a loss, and look at the gradient at the logits, where L is a
            softmax cross-entropy; this always on a device, whose answer is not waited for.
        batch_dim: of the samples' terms.

    Raises:
        TypeError, ValueError: as :func:`read_factor` and :meth:`LossTerms.check`.
    """

    def __init__(self, loss: Tensor, terms: LossTerms, *, confirm: bool = False, batch_dim: int = 0) -> None:
        read = read_loss(loss, batch_dim)
        terms.check(read.summed, again=confirm)
        self._read = read.factor
        self._loss: weakref.ref[Tensor] | None = weakref.ref(loss)
        self._index = loss.output_nr
        self._task, self._gradient = -1, 0.0  # of the last backward pass that came to it
        self._past = -1  # the last that also came to an output which is not behind it
        self._on_device: Tensor | None = None
        self._doubt = ""
        self._agrees: Tensor | None = None  # on a device
        look = confirm or not _is_known(loss)
        self._confirmation = confirmation_of(read.reduction, self._came_to_logits) if look else None
        loss.grad_fn.register_prehook(self._came)  # type: ignore[union-attr]

    def waits_beside(self, loss: Tensor) -> bool:
        """Return whether no backward pass has come to this loss yet, and it is another than that."""
        return self._task == -1 and (self._loss is None or self._loss() is not loss)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loss": None}  # of a copy no backward pass comes

    def _came(self, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[self._index]
        if gradient is None or is_proof() or not accumulates_everything():
            return
        found = of_host(gradient)
        self._task = in_backward()
        self._on_device = found if isinstance(found, Tensor) else None
        self._gradient = found if isinstance(found, float) else 1.0
        self._doubt, self._agrees = "", None

    def _came_to_logits(self, gradient: Tensor) -> None:
        if self._task != in_backward() or self._confirmation is None:
            return
        try:
            scale = (self._gradient if self._on_device is None else self._on_device) / self._read.value
            agrees = self._confirmation.agrees(gradient.detach(), scale)
            if agrees is not None and _is_known(agrees):
                self._doubt = "" if bool(agrees) else NOT_CONFIRMED
            else:
                self._agrees = agrees
        except Exception as error:  # in the user's backward pass
            self._doubt = f"{NOT_CONFIRMED} ({type(error).__name__}: {error})"

    def watch_past(self, output: Any, loss: Tensor) -> None:
        """Notice gradients that come to those of the model's outputs which this loss is not made of."""
        behind = set(nodes_before([loss.grad_fn]))
        for tensor in tensors_of(output):
            if tensor.grad_fn is not None and tensor.grad_fn not in behind:
                tensor.grad_fn.register_prehook(self._came_past)

    def _came_past(self, gradients: tuple[Tensor | None, ...]) -> None:
        if not is_proof() and accumulates_everything():
            self._past = in_backward()

    def factor(self, task: int) -> LossFactor | str | None:
        """Return the factor in the backward pass of this number, or why it is another one; None where that pass did not
        come to this loss, or came with a gradient of 0."""
        if self._task != task or self._gradient == 0:
            return None
        if self._doubt or self._past == task:
            return self._doubt or _PAST
        later = [] if self._on_device is None else [self._on_device.reciprocal()]
        factor = product(self._read.number / self._gradient, *self._read.tensors, *later, doubt=self._read.doubt)
        return factor if self._agrees is None else factor.only_where(self._agrees, NOT_CONFIRMED)

    def contradicts(self, given: LossFactor, terms: float | Tensor, task: int) -> bool:
        """Return whether the host knows that the factor in the backward pass of this number is not the given one, which
        was made of so many terms: by the numbers, or since terms that lie on a device are not in the loss's graph."""
        found = self.factor(task)
        if not isinstance(found, LossFactor):
            return False
        if found.tensor is None and given.tensor is None:
            return not math.isclose(found.number, given.number, rel_tol=_SAME)
        return isinstance(terms, Tensor) and not self._read.tensors


def _is_known(tensor: Tensor) -> bool:
    """Return whether the host reads it without waiting."""
    return tensor.is_cpu


def loss_of_output(
    output: Any, samples: int, terms: LossTerms, *, confirm: bool = False, batch_dim: int = 0
) -> WatchedLoss | str | None:
    """Watch the loss that a model has returned: what it calls `loss` (a key or an attribute), or a number without
    dimensions that it returns alone or as the first of several. Return why it cannot be watched, or None where there
    is no such loss.

    Without a name it is taken for the loss where there are several samples (of one it may be a prediction) and all else
    that it returns is behind it in the graph (else it may be a penalty, and the loss is made of the others later).
    """
    loss = _named_loss(output)
    loss = _first_of(output, samples) if loss is None else loss
    if loss is None or not loss.requires_grad:
        return None
    if top_saved_tensors_hooks(True) is not None:
        return _HOOKED
    if loss.numel() != 1:
        return _SEVERAL.format(list(loss.shape))
    try:
        watched = WatchedLoss(loss, terms, confirm=confirm, batch_dim=batch_dim)
    except ValueError as error:
        return f"the `loss` that the model returned cannot be read: {error}"
    if confirm:
        watched.watch_past(output, loss)
    return watched


def _named_loss(output: Any) -> Tensor | None:
    found = output.get("loss") if isinstance(output, Mapping) else None
    if not isinstance(output, (Tensor, Mapping)):
        found = getattr(output, "loss", None)
    return found if isinstance(found, Tensor) else None


def _first_of(output: Any, samples: int) -> Tensor | None:
    first, *others = output if isinstance(output, (tuple, list)) and output else [output]
    if samples < 2 or not isinstance(first, Tensor) or first.dim() or first.grad_fn is None:
        return None
    waiting = {tensor.grad_fn for tensor in tensors_of(others) if tensor.grad_fn is not None}
    waiting.difference_update(islice(nodes_before([first.grad_fn]), _NODES))
    return None if waiting else first
