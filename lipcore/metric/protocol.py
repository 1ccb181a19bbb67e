"""The protocol of a metric: what it needs, what it observes, how windows merge, and torchmetrics' verbs on top.

A metric never hooks a model. It says what it needs; :mod:`lipcore.capture` brings it; the Monitor (or the metric's own
private one, when it stands alone) keeps the clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lipcore.capture.taps.tap import Record, SingleSample, Tap
from lipcore.metric.results import MetricResult


@dataclass(frozen=True)
class PlanLine:
    """One line of `plan()`: what is measured where, by which rule, and what it costs in persistent bytes."""

    what: str
    rule: str
    bytes: int = 0


class Metric(ABC):
    """Base of all metrics. Subclasses implement the abstract part; users call update, compute, reset and state_dict."""

    name: str  #: first part of every key
    optional: bool = False  #: where it does not apply it turns itself off instead of raising
    off: str = ""  #: why it is off; an off metric observes nothing and has no results

    #: Which of observe_gradients(), before_step(), observe_used_gradients() and after_step_of() should be called.
    wants_gradients: bool = False
    wants_before_step: bool = False
    wants_used_gradients: bool = False
    wants_each_step: bool = False

    def prepare(self, optimizers: Sequence[Optimizer], scaler: Any, window_blocks: int) -> None:  # noqa: B027
        """What the Monitor was given; called once, before bind()."""

    @abstractmethod
    def bind(self, model: nn.Module) -> None:
        """Look at the model (parameters, layers); called once, before the first step."""

    def taps(self) -> dict[Tap, str]:
        """What it needs of the backward pass: taps and the modules they go to (a canonical name, FIRST_LAYER or "")."""
        return {}

    @property
    def single_sample(self) -> SingleSample | None:
        """What the batch-1 shortcut may fill instead of the taps; None: always tap."""
        return None

    @abstractmethod
    def plan(self) -> list[PlanLine]:
        """What will be measured, by which rule, for how many bytes."""

    @property
    def layer_options(self) -> dict[str, Any] | None:
        """How it wants all layers tapped (arguments of capture.LayerCapture); None: not at all."""
        return None

    def tapped(self, capture: Any) -> None:  # noqa: B027
        """The LayerCapture that taps the layers for it; called before its hooks are registered."""

    def observe_layers(self, record: Any) -> None:  # noqa: B027
        """One backward pass's LayerRecord. No host synchronisation here."""

    def observe_unrecorded(self, samples: int, reason: str) -> None:  # noqa: B027
        """A backward pass of so many samples through the tapped layers, which could not be recorded. In that pass."""

    def observe_skipped_step(self) -> None:  # noqa: B027
        """A GradScaler skipped the step: what the backward passes since the last one brought does not count."""

    def observe_record(self, record: Record) -> None:  # noqa: B027
        """One micro-batch's tapped values. No host synchronisation here."""

    def observe_gradients(self) -> None:  # noqa: B027
        """A backward pass has ended. No host synchronisation here."""

    def before_step(self) -> None:  # noqa: B027
        """The optimizer is about to step. No host synchronisation here."""

    def observe_used_gradients(self, optimizer: Optimizer) -> None:  # noqa: B027
        """The gradients of this optimizer are as its step uses them. No host synchronisation here."""

    def after_step_of(self, optimizer: Optimizer) -> None:  # noqa: B027
        """This one of the optimizers has stepped; called before observe_step(). No host synchronisation here."""

    def rebase(self) -> None:  # noqa: B027
        """The parameters were changed by something else than a step: load_state_dict(), an EMA swapped in."""

    def rebind(self) -> None:  # noqa: B027
        """Parameters were added, removed or reshaped: look at the model anew."""

    def observe_step(self) -> None:  # noqa: B027
        """One optimizer step has been made. No host synchronisation here."""

    @property
    def step_call(self) -> Callable[[], object]:
        """What the clock calls at every step; when it returns True, settle() is called too."""
        return self.observe_step

    def take_error(self) -> Exception | None:
        """What a callback of the user's raised in a hook, once; the Monitor raises it in the user's next call."""
        return None

    def flush(self) -> None:  # noqa: B027
        """Hand on what waits to be handed on. The Monitor is being closed."""

    def settle(self) -> None:  # noqa: B027
        """Rare housekeeping between steps."""

    @abstractmethod
    def finalize(self) -> MetricResult:
        """The open window's results; changes nothing."""

    @abstractmethod
    def reset(self) -> None:
        """Start a new window; what counts since the start of training goes on."""

    def advance(self) -> None:
        """Slide the window by one of the `window_blocks` it consists of; the same as reset() when that is one."""
        raise NotImplementedError(f"{type(self).__name__} has no sliding windows")

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit: tensors, numbers and strings only."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; nothing changes when it does not fit."""

    def compute(self) -> MetricResult:
        """The open window's results; changes nothing."""
        return self.finalize()
