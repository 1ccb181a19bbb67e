"""Forward passes of one model that await their backward pass: which one a layer's call or gradient belongs to, and
whether a backward pass counts."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lipcore.capture.layers.batch_of_one import SingleBatches
from lipcore.capture.layers.coverage import ParameterCoverage
from lipcore.capture.layers.layer_pass import INNER, LayerPass, Recomputation
from lipcore.capture.proof import is_proof
from lipcore.capture.self_calls import IN_ANOTHER_THREAD, OtherThreads
from lipcore.capture.training_pass import GRAPH_OF_GRADIENT, NOT_ACCUMULATED, accumulates_everything, in_backward
from lipcore.models.outputs import on_backward
from lipcore.models.reduction import Reduction
from lipcore.models.torch_internals import queue_callback

_MAX_STRAY = 64
_LOOKS = 8  # backward passes whose gradients before them are looked at
STRAYED = (
    "the backward pass came through layers that were called outside the model's forward pass alone (or through the "
    "whole model in a checkpoint with use_reentrant=True)"
)
_CHAINED = (
    "the input of a forward pass depends on the model's own parameters (the output of another forward pass), so its "
    "samples' gradients are spread over several passes; detach() it where that is not meant"
)
_COMPILED_WITHIN = (
    "a compiled module runs inside a checkpoint with use_reentrant=True, whose own backward pass may belong to another "
    "forward pass; use use_reentrant=False"
)


class Passes:
    """The forward passes of one model, from their beginning until the end of their backward pass.

    Nothing here may raise: most of it runs inside the user's forward or backward pass.

    Args:
        deliver: gets a pass whose backward pass, of that number, has ended.
        on_error: gets what would have been raised inside a hook; recording has stopped then.
        on_unrecorded: gets the number of samples and the reason when a backward pass through trained layers is not
            recorded.

    Attributes:
        recording: False after an error and after closing.
        stopped: the reason why an error has ended that, or "".
        active: False in steps that are not to be recorded.
        skipped: the last forward pass was in one of those.
        as_long_as_large: a compiled model's input has as many positions as samples.
        records: how many backward passes were recorded.
        unrecorded: why others were not, and how many.
    """

    reduction: Reduction
    coverage: ParameterCoverage  # of the model as it was looked at last
    skips = False  # parameters of calls that do not fit their rules are left out, where no graph serves
    graph_serves = False  # parameters of calls that do not fit their rules are measured from the autograd graph
    single: SingleBatches

    def __init__(
        self,
        deliver: Callable[[LayerPass, int], None],
        on_error: Callable[[Exception], None],
        on_unrecorded: Callable[[int, str], None],
    ) -> None:
        self.recording = self.active = True
        self.stopped = ""
        self.skipped = False
        self.as_long_as_large = False
        self.records = 0
        self.unrecorded: dict[str, int] = {}
        self._deliver, self._on_error, self._on_unrecorded = deliver, on_error, on_unrecorded
        self._thread = threading.local()
        self._alive: weakref.WeakValueDictionary[int, LayerPass] = weakref.WeakValueDictionary()
        self.threads = OtherThreads[LayerPass]()
        self._last: LayerPass | None = None  # whose end no callback may have told
        self._delivered = self._lost = -1  # numbers of backward passes
        self._returning: set[LayerPass] = set()  # passes of the backward pass under way
        self._first_of_step = True  # no backward pass has come since the optimizer's last step
        self._found, self._filled = 0, False  # first ones that found gradients; some were other than 0
        self._stray: dict[int, set[str]] = {}  # per backward pass, parameters of layers called outside a forward pass

    @property
    def current(self) -> LayerPass | None:
        """The forward pass under way in this thread."""
        return getattr(self._thread, "run", None)

    @current.setter
    def current(self, run: LayerPass | None) -> None:
        self._thread.run = run

    @property
    def last(self) -> LayerPass | None:
        """The forward pass that has begun last."""
        return self._last

    @property
    def tapping(self) -> bool:
        """True when a forward pass that begins now is to be recorded."""
        return self.recording and self.active

    def forget(self) -> None:
        """Drop the passes that are under way."""
        self._alive.clear()
        self.current = self._last = None

    def fail(self, error: Exception) -> None:
        """Stop recording and hand the error on to `on_error`."""
        if self.recording:
            run = self.current or self._last
            self.recording, self.stopped = False, f"recording has stopped: {error}"
            self.single.set_active(False)
            self._on_error(error)
            # What was recorded before is not this pass's, nor that of any to come.
            self._on_unrecorded(run.batch.size if run is not None else 1, self.stopped)

    def start_again(self) -> None:
        """Record again after an error."""
        self.recording, self.stopped = True, ""

    def count(self, reason: str) -> None:
        """Count, under its reason, a backward pass that is not recorded."""
        self.unrecorded[reason] = self.unrecorded.get(reason, 0) + 1

    def not_accumulated(self, samples: int) -> None:
        """Count a backward pass that left some gradients out, and report it to `on_unrecorded`."""
        self.single.flush()  # an earlier pass's record comes first
        self.count(NOT_ACCUMULATED)
        self._on_unrecorded(samples, NOT_ACCUMULATED)

    def leave_to_graph(self, names: Iterable[str], why: str) -> None:
        """Have the parameters of a call that does not fit its layer's rule measured from the autograd graph."""
        for name in names:
            self.coverage.leave_to_graph(name, why)

    def leave_out(self, names: Iterable[str], why: str) -> None:
        """Measure no parameters of a call that does not fit its layer's rule; raise ValueError where none is left."""
        for name in names:
            self.coverage.uncover(name, why)
        if not self.coverage.covered:
            self.coverage.check()

    def leave(self, names: Iterable[str], why: Exception, *, graph: bool) -> str:
        """Measure the parameters otherwise in the next passes, or not at all, and return what is to be said of the one
        whose backward pass has shown that they have to be: `graph` where the autograd graph serves. Nothing is raised.
        """
        if graph:
            self.leave_to_graph(names, str(why))
            return f"{why}; the next passes are measured from the autograd graph"
        try:
            self.leave_out(names, str(why))
        except ValueError as nothing:
            self.fail(nothing)
        return f"{why}; the next passes are measured without its parameters"

    def begin_step(self, *, active: bool) -> None:
        """Note that the optimizer has made a step, and whether the next one is to be recorded."""
        self.active, self._first_of_step = active, True

    # ---- the forward pass

    def before_forward(self) -> bool:
        """Drop the pass that an earlier forward pass left when it raised; return True when the one that begins is to be
        recorded."""
        self.current = None
        self._returning.clear()
        self.skipped = self.recording and not self.active
        if self.tapping:
            self.flush()
        return self.tapping

    def goes_on(self, model: nn.Module) -> bool:
        """Return whether a call of the model that begins now is made by its own forward pass, and is a part of it."""
        if self.current is None or not self.current.self_calls.goes_on(model):
            return False
        self.current.proves = False
        return True

    def goes_back(self) -> bool:
        """Return whether a call of the model that ends now was one of these."""
        return self.current is not None and self.current.self_calls.goes_back()

    def begin(self, run: LayerPass) -> None:
        """Make a pass the one under way in this thread."""
        self.current = self._last = run
        self._alive[id(run)] = run
        self.threads.begin(run)

    def drop(self, run: LayerPass) -> None:
        """Forget a pass that no backward pass will come back to."""
        self._alive.pop(id(run), None)
        self._last = None if self._last is run else self._last

    def end(self, output: object) -> LayerPass | None:
        """Return the pass that was under way in this thread, whose forward pass has returned this, None where it has
        raised; those that it has called in other threads are spoiled with it."""
        run, self.current = self.current, None
        for inner in () if run is None else self.threads.end(run, output):
            run.spoiled = inner.spoiled = IN_ANOTHER_THREAD  # type: ignore[union-attr]
        return run

    def await_backward(self, run: LayerPass, output: object) -> None:
        """Register a hook that notices a backward pass which comes to the model's output."""
        on_backward(output, lambda _: self._begin_backward(run))

    def waiting(self) -> list[LayerPass]:
        """Return the passes, of every thread, whose graph lives and from which no backward pass has come back."""
        return [run for run in self._living() if run.finished_task == -1]

    def _living(self) -> list[LayerPass]:
        return [run for alive in self._alive.valuerefs() if (run := alive()) is not None]

    # ---- the backward pass

    def pass_of_recomputation(self) -> LayerPass | None:
        """Return the pass that a forward pass inside the backward belongs to (activation checkpointing)."""
        self.single.enabled = False  # a layer must be tapped again where it was, and be left alone where it was not
        candidates = self._returning
        if not candidates and self.tapping:
            candidates = set(self.waiting())
        if len(candidates) <= 1:
            return next(iter(candidates), None)
        return Recomputation(candidates)

    def _begin_backward(self, run: LayerPass) -> None:
        if is_proof():
            return
        self._returning.add(run)
        run.entered = in_backward()
        if run.fresh[0] != in_backward():
            there = self.reduction.gradients_there(self.coverage.measured().values())
            run.fresh = in_backward(), not there
            run.began_with = in_backward(), self._first_of_step and self._seen_to_be_filled(there)
            self._first_of_step &= not accumulates_everything()
            if run.probes and self.recording:
                self._after_backward(lambda task: self._nothing_came(run, task))

    def _seen_to_be_filled(self, gradients: list[Tensor]) -> bool:
        """Return whether gradients that a step's first backward pass finds are other than 0. That is looked at in the
        first of such passes, and in one of 64 where it was never so."""
        if not gradients or not self.recording:
            return False
        self._found += 1
        if not self._filled and self._found > _LOOKS and self._found % 64:
            return False
        known = (gradient for gradient in gradients if gradient.is_cpu and gradient.layout == torch.strided)
        found = any(bool(gradient.any()) for gradient in known)  # no other device is waited for
        self._filled |= found
        return found

    def comes_back(self, run: LayerPass, inner: bool) -> bool:
        """Note that a gradient comes back to a pass; return True when it counts.

        Args:
            run: the pass that the layer was called in.
            inner: that call was a recomputation inside the backward pass.
        """
        if is_proof():
            return False
        if inner:  # a checkpoint's own backward belongs to the one around it
            if isinstance(run, Recomputation):
                run.spoil("several forward passes with reentrant checkpoints wait for their backward pass")
                return False
            run.sums = None  # which would be those of several backward passes
            if run.begin_task(run.entered):
                run.inner_only = True
            return True
        task = in_backward()
        if isinstance(run, Recomputation):
            return False
        if torch.is_grad_enabled():
            run.spoiled = GRAPH_OF_GRADIENT
        if not accumulates_everything():
            if run.refused_task != task:
                run.refused_task = task
                self.not_accumulated(run.batch.size)
            return False
        if run.begin_task(task) or run.inner_only:
            run.inner_only = False
            self._returning.add(run)
            queue_callback(lambda: self._end_backward(run, task))
        return not run.spoiled

    def probe_comes_back(self, run: LayerPass) -> None:
        """Note that a compiled region's probe of a pass got its gradient."""
        task = in_backward()
        if run.entered not in (INNER, task):
            run.spoiled = _COMPILED_WITHIN
        if self.recording and not is_proof() and run.begin_task(task):
            queue_callback(lambda: self._end_backward(run, task))

    def _end_backward(self, run: LayerPass, task: int) -> None:
        self._returning.discard(run)
        self._delivered = task
        if self.recording and run.task == task and run.finished_task != task:
            self._deliver(run, task)

    def entangled(self, run: LayerPass, task: int) -> str:
        """Return why a pass's gradients are not its own alone in a backward pass, or ""; to be asked once."""
        reason = ""
        if any(other.chained and other.task == task for other in self._living()):
            reason = _CHAINED
        for name in self._stray.pop(task, set()):
            reason = f"the layer of parameter '{name}' was also called outside the model's forward pass"
        return reason

    def came_alone(self, run: LayerPass, task: int) -> bool:
        """Return whether no other pass has added to a pass's gradients in this backward pass."""
        return not any(other is not run and other.task == task for other in self._living())

    def is_alone(self, run: LayerPass, task: int) -> bool:
        """Return whether no other pass adds to a pass's gradients, in this backward pass or a later one."""
        others = (other for other in self._living() if other is not run)
        return not any(other.task == task or other.finished_task == -1 for other in others)

    # ---- what comes back to no forward pass

    def unfollowed(self) -> None:
        """Note that a layer runs in a backward pass, and belongs to no forward pass that was seen."""
        if self.tapping and in_backward() != self._lost:
            self._lost = in_backward()
            self._after_backward(self._only_strays)

    def strayed(self, parameters: Iterable[str]) -> None:
        """Note that a layer with these parameters, called outside the model's forward pass, gets a gradient."""
        if self.recording and accumulates_everything():
            if in_backward() not in self._stray:
                self._after_backward(self._only_strays)
            self._stray.setdefault(in_backward(), set()).update(parameters)
            if len(self._stray) > _MAX_STRAY:  # backward passes that reached no forward pass of the model
                self._stray.pop(next(iter(self._stray), -1), None)

    def _after_backward(self, call: Callable[[int], None]) -> None:
        """Have `call` called with the number of this backward pass, at its end and after its records."""
        queue, task = queue_callback, in_backward()
        queue(lambda: queue(lambda: call(task)))

    def _nothing_came(self, run: LayerPass, task: int) -> None:
        if self.recording and self.records and task not in (run.task, run.finished_task):
            self.not_accumulated(run.batch.size)

    def _only_strays(self, task: int) -> None:
        if self.recording and self.records and task != self._delivered:
            self.count(STRAYED)
            self._on_unrecorded(0, STRAYED)

    # ---- passes whose end no callback tells

    def flush(self) -> None:
        """Deliver the passes whose every number came back from inner backward passes (reentrant checkpoints), and the
        one whose numbers are in the sink."""
        self.single.flush()
        run, self._last = self._last, None
        if run is not None and run.inner_only and in_backward() == -1:
            run.inner_only = False
            self._end_backward(run, run.task)
            run.entered = INNER
