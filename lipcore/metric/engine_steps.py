"""The steps of an engine: what happens when one begins, when it is over, and when weights move outside of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from lipcore.capture.parameters import GradientWatch
from lipcore.capture.pipeline_stages import StageWatch
from lipcore.capture.taps.tap import Record
from lipcore.capture.training_pass import in_backward
from lipcore.metric.clock import Clock
from lipcore.metric.engine_windows import EngineWindows
from lipcore.metric.optimizers import scaler_above
from lipcore.metric.ordinary import ordinary
from lipcore.metric.protocol import Metric
from lipcore.metric.step_end import StepEnd, StepEndCalls
from lipcore.models.checks import never_called


class EngineSteps(EngineWindows):
    """The part of an engine that is called by its hooks, and counts steps."""

    _clock: Clock
    _optimizers: list[Any]
    _scaler: Any
    _gradient_watch: GradientWatch
    _stage_watch: StageWatch
    _wanting: dict[str, list[Metric]]  # by what they want to be called for
    _needs_steps: bool
    _asked_for_scaler: bool
    _steps_here: int  # since this object was made, without those of a loaded state
    _all_counted: bool  # no step has moved the parameters that is not counted, or not yet
    _stepped_within: bool = False  # an optimizer has stepped in the backward pass under way

    # ---- the clock

    def _observe_record(self, record: Record) -> None:
        self._call(self._tapping, lambda metric: metric.observe_record(record))

    def _observe_layers(self, metric: Metric, record: Any) -> None:
        if self._scaled is not None:
            self._scaled.look()  # whether the step before this backward pass was skipped
        metric.observe_layers(record)

    def _step_begins(self) -> None:
        self._stepped_within |= in_backward() != -1
        if not self._asked_for_scaler:
            self._asked_for_scaler = True
            self._look_for_scaler()
        self._at_step_end(self._step_end.step_begins)

    def _look_for_scaler(self) -> None:
        """Tell, at the first step, of a GradScaler that makes it and was not passed: its scale is in every gradient."""
        if self._scaler is None and scaler_above() and (self._wanting["gradients"] or self._layer_captures):
            self._failures.warn(
                f"a GradScaler makes {self._clock}(), and lipcore was given none, so gradient norms hold its scale; "
                "pass it as scaler= (Lightning's: trainer.strategy.precision_plugin.scaler)"
            )
            reason = "a GradScaler makes the step, and lipcore was given none: these numbers hold its scale"
            self._call(self.metrics.values(), lambda metric: metric.observe_unknown_scale(reason))

    def _before_step(self) -> None:
        self._call(self._wanting["before_step"], lambda metric: metric.before_step())

    def _before_step_of(self, optimizer: Optimizer) -> None:
        self._call(self._wanting["used_gradients"], lambda metric: metric.observe_used_gradients(optimizer))

    def _after_step_of(self, optimizer: Optimizer) -> None:
        self._call(self._wanting["each_optimizer"], lambda metric: metric.after_step_of(optimizer))

    def _after_backward(self) -> None:
        if self._scaled is not None:
            self._scaled.look()
        taken, self._stepped_within = self._stepped_within, False
        wanting = self._wanting["gradients"]
        self._call(wanting, lambda metric: metric.observe_taken_gradients() if taken else metric.observe_gradients())

    def _divided(self) -> None:
        self._call(self._wanting["gradients"], lambda metric: metric.observe_divided_gradients())

    def _before_backward(self) -> None:
        self._stage_watch.look()
        if not self._clock.inside:  # else it is a closure's pass, at weights of its own
            self._at_step_end(self._step_end.backward_begins)

    def _moved_by_hand(self) -> None:
        self._step_end.moved_by_hand()

    def _stepped_once(self) -> None:
        self._all_counted = False
        self._at_step_end(self._step_made)

    def _step_made(self) -> None:
        """Take in a step that waits, then the one that was made just now, or let it wait."""
        self._step_end.take_waiting()
        self._note_step()
        self._step_end.step()

    def _note_step(self) -> None:
        """Note what is known of a step now, and not when it is taken in."""
        self._call(self._told_of_steps, lambda metric: metric.step_made())

    @property
    def _steps_made(self) -> int:
        """Steps that were made, those of a loaded state among them: one more than were counted while one waits."""
        return self._windows.step + self._step_end.waits

    def _loaded(self) -> None:
        self._call(self.metrics.values(), lambda metric: metric.rebase())
        self._gradient_watch.close()  # load_state_dict(assign=True) makes new parameters
        self._watch_gradients()

    # ---- weights that move outside the optimizer's step

    def _make_step_end(self, parameters: Callable[[], list[torch.Tensor]]) -> StepEnd:
        calls = StepEndCalls(
            *(self._after_step, self._at_step_end, self._may_wait, self._became_late, self._moved_without_step)
        )
        return StepEnd(parameters, calls, compare=bool(self._optimizers))

    def _bound_to_step(self) -> list[str]:
        return [name for name, metric in self.metrics.items() if metric.needs().at_step]

    def _may_wait(self) -> bool:
        return not self._bound_to_step()

    def _became_late(self) -> None:
        """Tell the metrics and the user that weights move after a step."""
        self._call(self.metrics.values(), lambda metric: metric.observe_late_move())
        later = (
            "From now on a step is read when the next backward pass begins"
            if self._step_end.late
            else f"{self._bound_to_step()[0]} reads the optimizer's own state, so steps are read as before"
        )
        self._failures.warn(
            f"the parameters moved after {self._clock} number {self._windows.step} was over and before the next "
            "backward pass (a wrapper around the optimizer, clipped or averaged weights?); what was recorded of it is "
            f"without that. {later}. Where there is a wrapper, pass it as optimizer="
        )
        self._gradient_watch.close()
        self._watch_gradients()

    def _moved_without_step(self) -> None:
        if not self._needs_steps:
            return
        steps = "monitor.step() was never called" if not self._optimizers else f"{self._clock}() was never seen"
        self._failures.warn(
            f"lipcore has counted no step, although the parameters move: {steps}. Pass as optimizer= the object whose "
            "step() the loop calls (a wrapper, or what is inside it); or pass none and call monitor.step() after every "
            "step"
        )

    def _after_skipped_step(self) -> None:
        if self._scaled is not None:
            self._scaled.ticked = True
        self._capture.tick()
        self._call(self.metrics.values(), lambda metric: metric.observe_skipped_step())

    def _after_step(self) -> None:
        if self._scaled is not None:
            self._scaled.ticked = True
        if self._failures.all_stopped:
            return
        if self._capture.pending:
            self._capture.tick()
        for capture in self._layer_captures:
            capture.flush()
        for metric, call, settle in self._step_calls:
            try:
                if call():
                    settle()
            except Exception as error:  # noqa: PERF203
                self._stop_metric(metric, error)
        try:
            self._windows.step += 1
            self._steps_here += 1
            if self._steps_here == 2:
                for capture in self._layer_captures:
                    capture.check_that_something_came()
                if self._tapping:
                    self._check_that_something_came()
            if self._windows.is_over:
                self._close()
        except Exception as error:
            self._stop_all(error)
        self._all_counted = True

    def _check_that_something_came(self) -> None:
        if not self._capture.nothing_came:
            return
        if self.refused:
            names = " and ".join(metric.name for metric in self._tapping)
            self._failures.warn(f"lipcore has recorded no sample for {names} so far: {'; '.join(self.refused)}")
            return
        self._capture.fail(
            ValueError(
                f"{never_called(self.model)}; name input= and output= when the model's own first layer and output are "
                "not used"
            )
        )

    @ordinary
    def step(self) -> None:
        """Count a step by hand, after the parameters were updated: for loops without an optimizer object."""
        self._all_counted = False
        self._failures.raise_kept()
        self._stepped_once()
        self._failures.raise_kept()

    # ---- gradients

    def _watch_gradients(self) -> None:
        wanted = self._scaled is not None or self._step_end.late or bool(self._wanting["gradients"])
        trained = self._trained()  # one tells that a backward pass begins, nearly always: the last one's is the first
        self._gradient_watch = GradientWatch(
            trained if wanted else trained[-1:], self._after_backward, self._before_backward
        )

    def _stepped(self) -> list[torch.Tensor]:
        """Return parameters that a step moves: without those that follow the master copies that a metric reads."""
        trained = self._trained()
        if not any(metric.reads_masters for metric in self.metrics.values()):
            return trained
        moved = {id(p) for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}
        return [parameter for parameter in trained if id(parameter) in moved]

    def _trained(self) -> list[torch.Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]
