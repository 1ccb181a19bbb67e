"""Batches of one: the per-sample gradient is the gradient, so no layer need be tapped."""

from __future__ import annotations

import copyreg
import functools
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lipcore import _core
from lipcore.capture.layers.coverage import ParameterCoverage
from lipcore.capture.layers.layer_pass import LayerRecord, Rows
from lipcore.capture.layers.structure import Structure
from lipcore.capture.parameters import GradientWatch, WeakCall
from lipcore.capture.training_pass import GRAPH_OF_GRADIENT, Untraced
from lipcore.models.outputs import on_backward
from lipcore.models.ranks import under_process_group
from lipcore.models.torch_internals import hooks_after_accumulation, queue_callback

_PROOFS = 3  # tapped passes in a row that the gradients agree with, before any is served
# Passes that are served, until one is tapped again and compared: drawn, since a loss may have a rhythm of its own.
_PROOF_EVERY = (33, 95)
_AGREEMENT = 1e-5  # of squares: float32 rounds them to 1e-6
_MOST_ABANDONED = 3  # served passes without a backward pass; then a forward pass is no sign that one follows
_ADDED = (
    "a batch of one was served from the gradients, and another backward pass added to them; from now on batches of one "
    "are tapped"
)
_UNREADABLE = (
    "a batch of one was to be served from the gradients, and one of them is of another kind than before; from now on "
    "batches of one are tapped"
)
_ELSEWHERE = (
    "a batch of one was served from the gradients, and something beside the model's output reached them (a penalty in "
    "the loss, a layer's weight used outside the model); from now on batches of one are tapped"
)
_STOPPED = (
    "a batch of one was to be read from the gradients, and another forward pass began before its backward pass, which "
    "adds to them too"
)
_TROUBLE = {
    _core.SINGLE_STOPPED: _STOPPED,
    _core.SINGLE_ELSEWHERE: _ELSEWHERE,
    _core.SINGLE_ADDED: _ADDED,
    _core.SINGLE_GRAPH: GRAPH_OF_GRADIENT,
}
_DISAGREES = (
    "the gradients of a batch of one have come to hold more than the norms of its layers (a penalty on parameters, a "
    "layer's weight used outside the model); from now on batches of one are tapped"
)
_OTHERS = (
    "a batch of one was served from the gradients, and others of them were reached than before; from now on batches of "
    "one are tapped"
)


#: Of a sink: place of each norm, distribution of each place and of the total, square of the loss's factor.
Sink = tuple[list[int], list[Any], float]


class SingleBatches:
    """The server of passes of one sample, whose norms are read from the gradients that the backward pass leaves, with
    the layers' hooks taken off.

    Only after these have proved to be what taps bring, and with a proof now and then: a penalty on the
    parameters or a layer called outside the model, say, is in the gradients and is no part of a sample's loss. While
    passes are served, what changes is found at once (parameters, hooks, gradients that were there before, others
    reached; behind a Linear at the end, a gradient of its bias that did not come from the output) or by the next proof.
    The hooks that serve are compiled (csrc/batch_of_one/all_gradients.h).

    Args:
        coverage: the model's parameters.
        structure: its modules.
        batch_dim: batch dimension of the model's input.
        serve: put the compiled hooks (before and after the forward pass) in the place of the model's, and take the
            layers' off.
        tap: undo that.
        not_served: gets the (module, arguments, keywords) of a forward pass that has to be tapped, after `tap`.
        deliver: gets the record of a served pass.
        not_accumulated: told of a served pass whose backward pass did not accumulate its gradients.
        on_proof: told that a proof has agreed (""), or after served passes why it has not.

    Attributes:
        enabled: passes may be served.
        unsettled: passes were served, and no proof has come after them yet.
    """

    def __init__(
        self,
        coverage: ParameterCoverage,
        structure: Structure,
        batch_dim: int,
        serve: Callable[[Any, Any], None],
        tap: Callable[[], None],
        not_served: Callable[..., None],
        deliver: Callable[[LayerRecord], None],
        not_accumulated: Callable[[], None],
        on_proof: Callable[[str], None],
    ) -> None:
        self.enabled, self.unsettled = True, False
        self._sink: Callable[[tuple[str, ...]], Sink | None] | None = None
        self._coverage, self._structure, self._batch_dim = coverage, structure, batch_dim
        self._serve, self._tap, self._not_served = serve, tap, not_served
        self._deliver, self._not_accumulated, self._on_proof = deliver, not_accumulated, on_proof
        self._proofs = self._abandoned = 0
        self._interrupted = False  # a served pass still waited for its backward pass when the serving stopped
        self._random = random.Random(0)
        self._reached: frozenset[str] = frozenset()  # parameters that had a gradient at the last proof
        self._names: tuple[str, ...] = ()  # those of the gradients that are read
        self._core: Any = None  # while passes are served
        self._turning = threading.RLock()  # threads that train one model turn the hooks one after the other

    # ---- proofs, by passes that are tapped

    def may_prove(self) -> bool:
        """Return, before a tapped pass of one sample, whether the gradients left in .grad will be that sample's
        alone."""
        # After what has ended the serving for good, too: passes that were served are right if this one is.
        return (self.enabled or self.unsettled) and _are_fresh(self._coverage.measured())

    def compare(self, norms_sq: Mapping[str, Tensor]) -> bool:
        """Return whether the norms that a tapped pass brought are those of the gradients that it left in .grad. Where
        they are not, report that what was served before is not proved, and serve no more."""
        measured = self._coverage.measured()
        found = gradient_squares(measured)
        total = sum(float(row) for row in norms_sq.values())
        interrupted, self._interrupted = self._interrupted, False
        agrees = found.keys() == norms_sq.keys() and all(
            abs(float(square) - float(norms_sq[name])) <= _AGREEMENT * float(square) + 1e-9 * total
            for name, square in found.items()
        )
        if agrees:
            self._proofs = self._proofs + 1 if found.keys() == self._reached else 1
            self._reached = frozenset(found)
            return True
        if interrupted:  # both passes may have added to the gradients
            return False
        self.enabled = False
        if self.unsettled:
            self.unsettled = False
            self._on_proof(_DISAGREES)
        return False

    def proved(self) -> None:
        """Note, when the record of a pass that agreed was handed on, that all before it is proved; serve the next ones
        after some such passes."""
        self.unsettled = False
        self._on_proof("")
        if self.enabled and self._proofs >= _PROOFS:
            self._open(self._coverage.measured())

    def _open(self, measured: dict[str, nn.Parameter]) -> None:
        self._names = tuple(name for name in measured if name in self._reached)
        gradients = [measured[name].grad for name in self._names]
        if any(g is None or g.layout != torch.strided for g in gradients):
            self.enabled = False
            return
        names = {id(parameter): name for name, parameter in measured.items()}
        order = {name: i for i, name in enumerate(self._names)}
        places = [
            (owner, key, p, id(p) in names, names.get(id(p)) in order) for owner, key, p in self._coverage.places()
        ]
        places.sort(key=lambda place: order.get(names.get(id(place[2]), ""), len(order)))
        calls = [
            *(Tensor, queue_callback, WeakCall(self._stopped)),
            *(on_backward, WeakCall(self._came_back)),
        ]
        with self._turning:
            self._core = _core.SingleBatch(
                *(places, self._structure.links, self._structure.sizes, calls, self._batch_dim),
                self._random.randint(*_PROOF_EVERY),
            )
            self.renew_sink()
            self.unsettled = True
            self._serve(Untraced(self._core.before_forward), Untraced(self._core.after_forward))

    def stop(self) -> None:
        """Put the tapping hooks back on; the next passes are tapped, and compared with their gradients."""
        if self._core is None:
            return
        with self._turning:
            if self._core is None:
                return
            self.flush()
            self._interrupted = self._core.stop()
            self._abandoned += self._interrupted
            self.enabled &= self._abandoned < _MOST_ABANDONED
            self._tap()
            self._core = None  # last: who finds nothing to stop relies on the layers' hooks

    # ---- passes that are served

    def send_to(self, sink: Callable[[tuple[str, ...]], Sink | None]) -> None:
        """Let `sink` say where norms of given parameters go; norms for which it returns None go into records."""
        self._sink = sink
        self.renew_sink()

    def renew_sink(self) -> None:
        """Ask the sink again for the place where norms go, after its answer has changed."""
        if self._core is None:
            return
        self.flush()
        sink = self._sink(self._names) if self._sink is not None else None
        if sink is None:
            self._core.remove_sink()
        else:
            self._core.set_sink(*sink)

    def set_active(self, active: bool) -> None:
        """Set whether passes are recorded."""
        if self._core is not None:
            self._core.active = active

    def total(self) -> float | None:
        """Return the squared norm of the pass that was served last; None when its record was taken."""
        return self._core.total if self._core is not None and self._core.pending else None

    def flush(self) -> None:
        """Deliver the record of a served pass whose numbers have gone into the sink."""
        if self._core is not None and self._core.pending:
            self._core.take()
            self._deliver(replace(self._record(self._core.task), observed=True))

    def _stopped(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.stop()
        self._not_served(module, arguments, keywords)

    def _record(self, task: int) -> LayerRecord:
        squares = torch.tensor(self._core.squares, dtype=torch.float64, device="cpu")[:, None]
        return LayerRecord(1, Rows(self._names, squares), {}, "", task, True, served=True)

    def _came_back(self, found: int, trouble: int, task: int) -> None:
        """Deliver the record of a served pass whose backward pass has ended and whose norms no sink took, or the reason
        why there are none."""
        broken = _TROUBLE.get(trouble, "" if self._core is not None else _STOPPED)
        if not broken and found == _core.GRADIENTS_NOTHING:
            self._not_accumulated()
            return
        record = None
        if not broken and found == _core.GRADIENTS_EXPECTED:
            record = self._record(task)
        elif not broken and found == _core.GRADIENTS_STRIDED:
            rows = gradient_squares(self._coverage.measured())
            found_rows = {name: rows[name] for name in self._names}
            record = LayerRecord(1, found_rows, {}, "", task, True, served=True)
        elif not broken:
            broken = _OTHERS if found == _core.GRADIENTS_OTHERS else _UNREADABLE
        if record is None:
            if broken is not _STOPPED:  # which stop() has counted
                self.enabled = False
                self.stop()
            record = LayerRecord(1, {}, dict.fromkeys(self._names, broken), broken, task)
        self._deliver(record)


def _are_fresh(parameters: dict[str, nn.Parameter]) -> bool:
    """Return whether a backward pass will leave in .grad the gradient of one sample alone, to be read afterwards."""
    for parameter in parameters.values():
        if parameter.grad is not None or parameter._backward_hooks or not parameter.is_cpu:
            return False
        if not all(GradientWatch.is_ours(hook) for hook in hooks_after_accumulation(parameter)):
            return False  # an optimizer inside the backward pass takes the gradient away
        if parameter.dtype not in (torch.float32, torch.float64):
            return False
    return not under_process_group()


def gradient_squares(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return, for each parameter that has a gradient, the gradient's sum of squares, float64 [1]."""
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
    rows = torch.empty(len(gradients), _core.STEP_COLUMNS, dtype=torch.float64, device="cpu")
    if gradients:
        _core.square_sums(gradients, rows)
    return dict(zip(names, rows[:, :1].unbind(), strict=True))


def _inert_hooks() -> Any:
    """Return hooks that do nothing, which a copied model gets in the place of the compiled ones."""
    never = functools.partial(bool, False)
    calls = [Tensor, *(never for _ in range(_core.SINGLE_CALLS - 1))]
    return _core.SingleBatch([], [], [], calls, 0, 0)


copyreg.pickle(_core.SingleBatch, lambda hooks: (_inert_hooks, ()))
