"""When a step is over: at once; where it was made within a backward pass, when that is over; where weights go on moving
afterwards, when the next backward pass begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from lipcore.capture.training_pass import in_backward
from lipcore.metric.late_moves import LateMoves
from lipcore.models.torch_internals import queue_callback

# Callbacks at the end of a backward pass that stand before that of a step: another's may put one behind it, which reads
# what the ranks have reduced.
_BEHIND = 2


@dataclass(frozen=True)
class StepEndCalls:
    """Functions that a StepEnd calls.

    Attributes:
        over: a step is over, and is to be taken in now.
        safely: calls a function in which nothing may be raised.
        may_wait: returns whether steps may be read late.
        became_late: weights were seen to move after a step; from now on steps are read late where they may be.
        without_step: weights move, but no step was ever counted.
    """

    over: Callable[[], None]
    safely: Callable[[Callable[[], None]], None]
    may_wait: Callable[[], bool]
    became_late: Callable[[], None]
    without_step: Callable[[], None]


class StepEnd:
    """Decides at which moment the engine takes in a step.

    A wrapper around the optimizer, clipped or averaged weights move parameters after the optimizer's own step. Once
    that is seen, a step waits until the next backward pass begins, until the user moves parameters by hand, or until
    results are asked for, whichever is first.

    Optimizers that step in hooks of their parameters have made a step before the backward pass is over, whose samples
    are known when it is: such a step waits until then.

    Args:
        parameters: those that a step moves, as they are now.
        calls: what is called.
        compare: whether weights are to stay where they are after a step; not so where steps are counted by hand, since
            who counts them knows when they are over.
    """

    def __init__(self, parameters: Callable[[], Iterable[Tensor]], calls: StepEndCalls, *, compare: bool) -> None:
        self._calls, self._compare = calls, compare
        self._moves = LateMoves(parameters, self._became_late, calls.without_step)
        self.waits = False  #: a step was made, and is not taken in yet
        self.late = False  #: whether steps are read late

    def _became_late(self) -> None:
        self.late = self._calls.may_wait()
        self._calls.became_late()

    def step(self) -> None:
        """Take in a step, or let it wait."""
        self.take_waiting()
        if self.late:
            self.waits = True
        elif in_backward() != -1:
            self.waits = True
            self._wait_for_backward(_BEHIND)
        else:
            self._take()

    def _take(self) -> None:
        self.waits = False
        self._calls.over()
        self._moves.step(compare=self._compare)

    def _wait_for_backward(self, times: int) -> None:
        """Take in the step that waits when the backward pass under way is over, and what others do then."""

        def over() -> None:
            if times:
                self._wait_for_backward(times - 1)
            elif self.waits:
                self._calls.safely(self._take)

        queue_callback(over)

    def take_waiting(self) -> None:
        """Take in the step that waits, if there is one."""
        if self.waits:
            self.waits = False
            self._calls.over()

    def drop_waiting(self) -> None:
        """Leave out the step that waits: the user's loop has raised in the middle of it."""
        self.waits = False

    def step_begins(self) -> None:
        """Look where the last step left the parameters, if no backward pass has come since."""
        self.take_waiting()
        if self._compare:
            self._moves.step_begins()

    def backward_begins(self) -> None:
        """Look the same way when a backward pass begins."""
        self.take_waiting()
        self._moves.backward_begins()

    def moved_by_hand(self) -> None:
        """Take in the step before, and look for no late move in what the user says is about to change."""
        self.take_waiting()
        self._moves.forget()
