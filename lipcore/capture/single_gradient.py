"""Batches of one: the per-sample gradient is the gradient, so no layer need be tapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from lipcore import _core
from lipcore.capture.audit import Coverage
from lipcore.capture.collector import in_backward
from lipcore.capture.layer_pass import LayerRecord
from lipcore.capture.parameters import GradientWatch

_PROOFS = 3  # tapped passes in a row that the gradients agree with, before any is served
_PROOF_EVERY = 64  # passes that are served, until one is tapped again and compared
_MOST_ABANDONED = 3  # served passes without a backward pass; then a forward pass is no sign that one follows
NOT_ACCUMULATED = "the backward pass did not accumulate all gradients (autograd.grad, or backward(inputs=))"
_ADDED = (
    "a batch of one was served from the gradients, and another backward pass added to them; from now on batches of one "
    "are tapped"
)
_OTHERS = (
    "a batch of one was served from the gradients, and others of them were reached than before; from now on batches of "
    "one are tapped"
)


class SingleBatches:
    """Serves passes of one sample from the gradients that its backward pass leaves, with the layers' hooks taken off.

    Only after these have proved to be what taps bring, and with a proof every 64 passes: a penalty on the parameters or
    a layer called outside the model, say, is in the gradients and is no part of a sample's loss. While passes are
    served, what changes is found here (parameters, hooks, gradients that were there before, others reached) or by the
    next proof.

    Args:
        coverage: the model's parameters.
        hook, unhook: put the layers' hooks on, and take them off.
        deliver: gets the record of a served pass.
        count: told why a backward pass was not recorded.
    """

    def __init__(
        self,
        coverage: Coverage,
        hook: Callable[[], None],
        unhook: Callable[[], None],
        deliver: Callable[[LayerRecord], None],
        count: Callable[[str], None],
    ) -> None:
        self.enabled = True
        self.serving = False  #: the layers' hooks are off
        self._coverage, self._hook, self._unhook = coverage, hook, unhook
        self._deliver, self._count = deliver, count
        self._proofs = self._until_proof = self._abandoned = 0
        self._reached: frozenset[str] = frozenset()  # parameters that had a gradient at the last proof
        # Every parameter of the model: where it is, itself, whether it is trained, how many hooks it has.
        self._known: list[tuple[dict[str, Any], str, nn.Parameter, bool, int]] = []
        self._all: list[nn.Parameter] = []  # those measured
        self._names: list[str] = []  # of these, those reached
        self._parameters: list[nn.Parameter] = []
        self._rows = torch.empty(0)
        self._pass: object | None = None  # a served pass without its backward pass
        self._watched = True  # that pass has an output
        self._task = -1

    # ---- proofs, by passes that are tapped

    def may_prove(self) -> bool:
        """Before a tapped pass of one sample: whether its gradients will be its own."""
        return self.enabled and _are_fresh(self._coverage.measured())

    def prove(self, norms_sq: dict[str, Tensor]) -> None:
        """A tapped pass has come back, alone: whether the gradients tell the same."""
        measured = self._coverage.measured()
        found = gradient_squares(measured)
        total = sum(float(row) for row in norms_sq.values())
        if found.keys() != norms_sq.keys() or any(
            not abs(float(square) - float(norms_sq[name])) <= 1e-3 * float(square) + 1e-9 * total
            for name, square in found.items()
        ):
            self.enabled = False
            return
        self._proofs = self._proofs + 1 if found.keys() == self._reached else 1
        self._reached = frozenset(found)
        if self._proofs >= _PROOFS:
            self._open(measured)

    def _open(self, measured: dict[str, nn.Parameter]) -> None:
        self._names = [name for name in measured if name in self._reached]
        self._parameters = [measured[name] for name in self._names]
        if any(p.grad is None or p.grad.layout != torch.strided for p in self._parameters):
            self.enabled = False
            return
        self._rows = torch.empty(len(self._names), _core.STEP_COLUMNS, dtype=torch.float64)
        self._all = list(measured.values())
        self._known = [(o, key, p, p.requires_grad, _hooks_of(p)) for o, key, p in self._coverage.places()]
        self._until_proof = _PROOF_EVERY
        self.serving = True
        self._unhook()

    def stop(self) -> None:
        """Put the layers' hooks back on; the next passes are tapped, and prove."""
        if not self.serving:
            return
        self.serving = False
        if self._pass is not None:
            self._pass = None
            self._abandoned += 1
            self.enabled &= self._abandoned < _MOST_ABANDONED
        self._hook()

    # ---- passes that are served

    def takes(self, sample: Any, batch_dim: int, others: tuple[Any, ...]) -> bool:
        """Before a forward pass on `sample`, the first argument, and `others`: whether it will be served."""
        if self._pass is not None or self._until_proof <= 0 or type(sample) is not Tensor:
            return False
        if sample.dim() <= batch_dim or sample.shape[batch_dim] != 1 or sample.grad_fn is not None:
            return False
        if any(isinstance(other, Tensor) and other.grad_fn is not None for other in others):
            return False  # the output of another pass, maybe
        for owner, key, p, trained, hooks in self._known:
            if owner.get(key) is not p or p.requires_grad is not trained or p.grad is not None:
                return False
            if (hooks or p._backward_hooks or p._post_accumulate_grad_hooks) and _hooks_of(p) != hooks:
                return False
        self._until_proof -= 1
        self._pass, self._watched, self._task = object(), False, -1
        return True

    def forward_ended(self, output: Any) -> None:
        """Of the forward pass under way."""
        if self._watched:
            return
        self._watched = True
        if output is None:  # it raised
            self._pass = None
            return
        this = self._pass
        on_backward(output, lambda: self._begin(this))

    def _begin(self, this: object | None) -> None:
        """A backward pass enters the graph of a served forward pass."""
        task = in_backward()
        if self._task == task:
            return  # at another of its outputs
        self._task = task
        if this is not self._pass or this is None or any(p.grad is not None for p in self._all):
            broken = _ADDED
        elif torch.is_grad_enabled():
            broken = "its graph was differentiated with create_graph=True, so gradients flow along other ways too"
        else:
            broken = ""
        Variable._execution_engine.queue_callback(lambda: self._finish(this, task, broken))

    def _finish(self, this: object | None, task: int, broken: str) -> None:
        """That backward pass has ended."""
        gradients = [p.grad for p in self._parameters]
        if not broken and all(g is None for g in gradients):
            self._task = -1
            self._count(NOT_ACCUMULATED)
            return
        if this is self._pass:
            self._pass = None
        more = len(self._all) > len(gradients) and sum(p.grad is not None for p in self._all) > len(gradients)
        present = [g for g in gradients if g is not None]
        if not broken and (more or len(present) < len(gradients)):
            broken = _OTHERS
        if not broken:
            try:
                _core.square_sums([g if g.is_contiguous() else g.contiguous() for g in present], self._rows)
            except (ValueError, TypeError) as error:  # a gradient of another layout than before
                broken = f"a batch of one was to be served from the gradients: {error}"
        if broken:
            self.enabled = False
            self.stop()
            self._deliver(LayerRecord(1, {}, dict.fromkeys(self._names, broken), broken, task))
            return
        rows = dict(zip(self._names, self._rows[:, :1].clone().unbind(), strict=True))
        self._deliver(LayerRecord(1, rows, {}, "", task, True))


def _hooks_of(parameter: nn.Parameter) -> int:
    after = parameter._post_accumulate_grad_hooks
    return len(parameter._backward_hooks or ()) + len(after or ())


def _are_fresh(parameters: dict[str, nn.Parameter]) -> bool:
    """Whether what a backward pass leaves in .grad will be the gradient of one sample, and still be there."""
    for parameter in parameters.values():
        if parameter.grad is not None or parameter._backward_hooks or not parameter.is_cpu:
            return False
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
        if hooks and not all(GradientWatch.is_ours(hook) for hook in hooks.values()):
            return False  # an optimizer inside the backward pass takes the gradient away
        if parameter.dtype not in (torch.float32, torch.float64):
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
    rows = torch.empty(len(gradients), _core.STEP_COLUMNS, dtype=torch.float64)
    if gradients:
        _core.square_sums(gradients, rows)
    return dict(zip(names, rows[:, :1].unbind(), strict=True))


def on_backward(output: Any, hook: Callable[[], None]) -> None:
    """Call the hook when the backward pass enters the graph behind one of the output's tensors, at each of them."""
    for leaf in (output,) if isinstance(output, Tensor) else tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
            leaf.grad_fn.register_prehook(lambda _: hook())
