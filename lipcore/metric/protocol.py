"""The protocol of a metric: what it needs, what it observes, what it returns.

A metric never hooks a model. It says what it needs; the engine (:mod:`lipcore.metric.engine`) registers the hooks,
keeps the clock and calls the metric. Provisional: what a metric of one's own relies on may still change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from lipcore.capture.layers.layer_pass import LayerRecord
from lipcore.capture.layers.options import LayerOptions
from lipcore.capture.layers.tapped import TappedLayers
from lipcore.capture.taps.tap import Record, SingleSample, Tap
from lipcore.distributed.partners import Partners
from lipcore.distributed.rank_axis import Place
from lipcore.metric.host_reads import OnDevice
from lipcore.metric.ordinary import make_ordinary
from lipcore.metric.rank_part import NOT_MERGED, RankPart
from lipcore.metric.rank_states import RankStates
from lipcore.metric.results import MetricResult

#: How batches of one sample are measured: tapped like others, or read from the parameters' gradients.
BatchOfOne = Literal["exact", "fast"]

#: Why a metric does not know gradients as backward leaves them, after observe_taken_gradients().
TAKEN = "optimizers have stepped within the backward pass (in hooks of parameters), and so taken gradients away"


@dataclass(frozen=True)
class PlanLine:
    """One line of `plan()`: what is measured where, by which rule, and what it costs in persistent bytes."""

    what: str
    rule: str
    bytes: int = 0


@dataclass(frozen=True)
class Needs:
    """A metric's demands on the engine.

    Attributes:
        taps: numbers from the gradients at modules' outputs: each tap, and the module it goes to (a canonical name,
            FIRST_LAYER, or "" for the model's own output). They come to observe_record().
        single_sample: what batches of one may fill instead of the taps; None: always tap.
        layers: how all layers are to be tapped; their norms come to observe_layers(). None: not at all.
        outputs: what the modules of these canonical names ("" is the model itself) return in the training's forward
            passes, while wants_outputs() says so; it comes to observe_output(). None: nothing.
        gradients: call observe_gradients() at the end of every backward pass.
        before_step: call before_step().
        used_gradients: call observe_used_gradients().
        each_optimizer: call after_step_of().
        at_step: call observe_step() right when the optimizer's step is over, whatever moves the parameters later.
    """

    taps: Mapping[Tap, str] = field(default_factory=dict)
    single_sample: SingleSample | None = None
    layers: LayerOptions | None = None
    outputs: Sequence[str] | None = None
    gradients: bool = False
    before_step: bool = False
    used_gradients: bool = False
    each_optimizer: bool = False
    at_step: bool = False


class TapCounts(Protocol):
    """Counts, by the engine, of the forward passes of the open window that taps were on."""

    @property
    def unrecorded(self) -> int:
        """Forward passes in grad mode that brought no record."""

    @property
    def refused(self) -> Sequence[str]:
        """Reasons why backward passes that came were not recorded."""


class Metric(ABC):
    """Base of all metrics: subclasses implement the abstract part; users call the verbs.

    The verbs are update(), compute(), reset(), close(), state_dict(), load_state_dict(), rebind() and merge(), and
    `with`. One that has no meaning for a metric says so by name.
    """

    name: str  #: first part of every key
    optional: bool = False  #: where it does not apply it turns itself off instead of raising
    warns_only: bool = False  #: whatever stops it is a warning: what it is there for goes on without it
    reads_masters: bool = False  #: looks at master copies, which parameters follow after the step
    before_moves: Callable[[], None] | None = None  #: tells the engine that the user moves the parameters by hand
    prefix: str = ""  #: what stands before the names of parameters; the engine sets it before bind()
    counts_samples: bool = True  #: its windows hold this rank's own samples, and a state of another rank those of that
    ranks_apart: bool = False  #: each rank trains a model of its own (group=None); the engine sets it before bind()
    partners: Partners | None = None  #: the other ranks; the engine sets them before bind()
    keeps_parts: bool = False  #: of what it watches, since other ranks keep the others
    off: str = ""  #: why it is off; an off metric observes nothing and has no results

    #: For the engine, not for users: left out of dir().
    _protocol: ClassVar[frozenset[str]] = frozenset(
        {
            *("prepare", "bind", "needs", "tapped", "counted", "step_call", "settle", "finalize", "advance"),
            *(
                "observe_record",
                "observe_layers",
                "observe_unrecorded",
                "observe_step",
                "observe_skipped_step",
                "step_made",
            ),
            *("observe_proof", "observe_loss", "observe_batch", "observe_output", "wants_outputs"),
            *("observe_used_gradients", "before_step", "after_step_of", "observe_late_move"),
            *("observe_divided_gradients", "observe_taken_gradients"),
            *("observe_stop", "rank_part", "on_call", "rest", "wake", "rests", "warns_only"),
            *("split_state", "joined_state", "empty_state", "add_states", "continues", "load_ranks"),
        }
    )

    #: Called by users, under torch.inference_mode too.
    _verbs: ClassVar[frozenset[str]] = frozenset(
        {
            *("__init__", "update", "compute", "reset", "close", "state_dict", "load_state_dict", "rebind", "merge"),
            *("sync", "rebase", "set_reference", "advance", "drain", "observe_gradients", "set_ids", "bind"),
            *("weighted_sum", "gram", "sync_scores", "set_losses"),
        }
    )

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        make_ordinary(cls, cls._verbs)

    def __dir__(self) -> Iterable[str]:
        return [name for name in super().__dir__() if name not in self._protocol]

    # ---- what it needs

    def prepare(self, optimizers: Sequence[Optimizer], scaler: Any, window_blocks: int) -> None:  # noqa: B027
        """Take what the engine was given; called once, before bind()."""

    @abstractmethod
    def bind(self, model: nn.Module) -> None:
        """Look at the model (parameters, layers); called once, before the first step."""

    def needs(self) -> Needs:
        """Say what it needs; asked after bind() and after rebind()."""
        return Needs()

    @abstractmethod
    def plan(self) -> list[PlanLine]:
        """Say what will be measured, by which rule, for how many bytes: a list, or a PlanLines of one."""

    def tapped(self, layers: TappedLayers) -> None:  # noqa: B027
        """Take the layers that are tapped for it; called before its hooks are registered."""

    def counted(self, counts: TapCounts) -> None:  # noqa: B027
        """Take what counts the forward passes that its taps are on; called once, after bind()."""

    # ---- what it observes, without a host synchronisation and without raising in the user's call

    def observe_record(self, record: Record) -> None:  # noqa: B027
        """Take in one micro-batch's tapped values."""

    def observe_layers(self, record: LayerRecord) -> None:  # noqa: B027
        """Take in the per-sample norms of one backward pass."""

    def observe_unrecorded(self, samples: int, reason: str) -> None:  # noqa: B027
        """Learn, in that pass, of a backward pass of so many samples that could not be recorded."""

    def observe_proof(self, failure: str, served: bool) -> None:  # noqa: B027
        """Learn that what came so far is proved, or why what came since the last good proof may be wrong.

        Args:
            failure: the reason; "" for a good proof.
            served: the proof is about passes that were read from the parameters' gradients, else about tapped ones.
        """

    def wants_outputs(self) -> bool:
        """Say, when a forward pass of the training begins, whether its modules' outputs are wanted."""
        return True

    def observe_output(self, name: str, module: nn.Module, output: Any) -> None:  # noqa: B027
        """Look at what a module has returned, while the forward pass is under way."""

    def observe_loss(self, loss: Tensor) -> None:  # noqa: B027
        """Look at the loss whose backward pass is to come."""

    def observe_batch(self, ids: Tensor, losses: Tensor | None) -> None:  # noqa: B027
        """Take the ids [B] of the samples of the next backward pass, and their losses where they are known."""

    def observe_gradients(self) -> None:  # noqa: B027
        """Look at the gradients after a backward pass."""

    def observe_divided_gradients(self) -> None:
        """Look at the gradients once more: a pipeline's schedule has divided them, behind the last backward pass of its
        step."""
        self.observe_gradients()

    def observe_taken_gradients(self) -> None:  # noqa: B027
        """Learn that optimizers have stepped in a backward pass that is over, and so may have taken gradients away:
        called in the place of observe_gradients()."""

    def before_step(self) -> None:  # noqa: B027
        """Look at the parameters right before the optimizer's step."""

    def observe_stop(self, reason: str) -> None:  # noqa: B027
        """Learn that an error has stopped the metric: it is called no more until rebind()."""

    def observe_late_move(self) -> None:  # noqa: B027
        """Learn that the parameters moved after the last step was observed."""

    def observe_used_gradients(self, optimizer: Optimizer) -> None:  # noqa: B027
        """Look at the gradients of this optimizer as its step uses them."""

    def after_step_of(self, optimizer: Optimizer) -> None:  # noqa: B027
        """Look at the parameters of this one of several optimizers; called before observe_step()."""

    def step_made(self) -> None:  # noqa: B027
        """Learn that a step was made, which observe_step() counts at once or, where weights go on moving, later: what
        the loop says from now on is of the next one."""

    def observe_step(self) -> None:  # noqa: B027
        """Count one optimizer step."""

    @property
    def step_call(self) -> Callable[[], object]:
        """The function that the clock calls at every step; when it returns True, settle() is called too."""
        return self.observe_step

    def observe_skipped_step(self) -> None:  # noqa: B027
        """Learn that a GradScaler skipped the step: what the backward passes since the last one brought does not
        count."""

    def observe_unknown_scale(self, reason: str) -> None:  # noqa: B027
        """Learn, at the first step, that a GradScaler makes it that nobody has passed: gradients hold its scale."""

    def take_error(self) -> Exception | None:
        """Return, once, what a user's callback raised in a hook; the engine raises it in the user's next call."""
        return None

    def flush(self) -> None:  # noqa: B027
        """Hand on what waits to be handed on."""

    def settle(self) -> None:  # noqa: B027
        """Do rare housekeeping between steps."""

    def rebase(self) -> None:  # noqa: B027
        """Learn that something else than a step changed the parameters: load_state_dict(), an EMA swapped in."""

    # ---- what it returns

    @abstractmethod
    def finalize(self) -> MetricResult:
        """Make the open window's results; changes nothing."""

    def on_device(self) -> Iterable[OnDevice]:
        """Return what finalize() reads from a device: it is copied to the host before, together with that of others."""
        return ()

    def rank_part(self) -> RankPart | str:
        """Return what the open window adds to that of all ranks, or why there is nothing to add; changes nothing."""
        return NOT_MERGED

    @abstractmethod
    def reset(self) -> None:
        """Start a new window; what counts since the start of training goes on."""

    def advance(self) -> None:
        """Slide the window by one of the `window_blocks` it consists of; the same as reset() when that is one."""
        raise NotImplementedError(f"{type(self).__name__} has no sliding windows")

    # ---- the verbs

    def update(self) -> None:
        """Count an optimizer step, where the metric stands alone; call it after every step."""
        raise self._not_alone()

    def compute(self) -> MetricResult:
        """Return the open window's results; changes nothing."""
        return self.finalize()

    def close(self) -> None:
        """Remove the hooks of a metric that stands alone; numbers stay readable."""
        raise self._not_alone()

    def _not_alone(self) -> RuntimeError:
        kind = type(self).__name__
        return RuntimeError(
            f"this {kind} cannot stand alone: a Monitor drives and closes it; pass it as "
            f"Monitor(model, optimizer, metrics=[...]), and call that one's step() and close()"
        )

    def rebind(self) -> None:  # noqa: B027
        """Look at the model anew after parameters were added, removed, reshaped, frozen or unfrozen."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is needed to continue bit for bit: tensors, numbers and strings only."""
        raise NotImplementedError(f"{type(self).__name__} has no state_dict()")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; ValueError naming the first key that does not fit, and nothing changed, otherwise."""
        raise NotImplementedError(f"{type(self).__name__} has no load_state_dict()")

    # ---- its state among those of other ranks; see docs/distributed.md

    def split_state(self, state: dict[str, Any], place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split its state into tensors that lie as parameters do, {parameter: {kind: tensor}}, and the rest."""
        return {}, state

    def joined_state(self, tensors: Mapping[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
        """Return the state that :meth:`split_state` has split."""
        return rest

    def empty_state(self, rest: dict[str, Any]) -> dict[str, Any] | None:
        """Return what a rank begins with that goes on from none of those that have saved: the same on all of them. None
        where it cannot be said."""
        return None if self.counts_samples else rest

    def add_states(self, begin: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return a state that begins with an empty one and has what all others have."""
        raise NotImplementedError

    def continues(self, rest: dict[str, Any]) -> bool:
        """Return whether the state that this rank itself has saved fits as it is."""
        return True

    def load_ranks(self, saved: RankStates) -> str:
        """Continue from states that ranks have saved, and return what the open window lacks then; "" for nothing."""
        own, begin = saved.own, saved.alike
        if own is not None and self.continues(own):
            self.load_state_dict(self.joined_state(saved.tensors, own))
            return ""
        if begin is not None and not self.counts_samples:
            self.load_state_dict(self.joined_state(saved.tensors, begin))
            return ""
        if begin is not None:
            self.load_state_dict(self.add_states(begin, saved.others) if saved.complete else begin)
            return "" if saved.complete else saved.why
        for state in list(saved.by_rank.values())[:1]:
            self.load_state_dict(state)
        self.reset()
        return saved.why

    def merge(self, other: Any) -> None:
        """Add the open window of another metric of the same kind."""
        raise NotImplementedError(f"{type(self).__name__} has no merge()")
