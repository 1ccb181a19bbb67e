"""What a metric of single samples' gradients observes: layers, passes, proofs and steps; and how it rests."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lipcore.capture.layers.batch_of_one import Sink
from lipcore.capture.layers.layer_pass import LayerRecord
from lipcore.capture.layers.options import LayerOptions
from lipcore.capture.layers.passes import STRAYED
from lipcore.capture.layers.tapped import TappedLayers
from lipcore.metric.hook_warnings import warn_in_hook
from lipcore.metric.protocol import Needs
from lipcore.metric.rank_part import Holding
from lipcore.metric.standalone import StandaloneMetric
from lipcore.models.capturing import is_capturing
from lipcore.models.names import with_prefix
from lipcore.per_sample.doubts import doubt_of
from lipcore.per_sample.layer_index import LayerIndex, layers_of_parameters, tied_names
from lipcore.per_sample.loss_factor import LossFactor
from lipcore.per_sample.loss_reduction import Reduction
from lipcore.per_sample.methods import check_methods
from lipcore.per_sample.noise.noise_sums import HOOKED
from lipcore.per_sample.open_step import MicroBatch, PassNumbers
from lipcore.per_sample.part_rows import IN_PARTS
from lipcore.per_sample.sample_names import NamedSamples
from lipcore.per_sample.sample_window import SampleWindow
from lipcore.per_sample.scores.score_columns import Scores
from lipcore.per_sample.step_listener import StepListener

_SILENT = 4  # steps without a number after which the user is told why


class SampleObserver(StandaloneMetric):
    """Base of metrics that are fed with what tapped layers bring of single samples; what is made of that is another
    class's.

    Args: those of :class:`PerSampleMetric`.
    """

    def __init__(
        self,
        model: nn.Module | None,
        reduction: Reduction,
        options: LayerOptions,
        *,
        every_steps: int,
        noise_scale: bool,
        columns: int,
        make_scores: Callable[[], Scores],
        scaler: Any,
    ) -> None:
        self._reduction, self._options, self._every = reduction, options, every_steps
        self._methods = dict(options.methods)
        self._wants_noise = noise_scale
        self._capture: TappedLayers | None = None
        self._model: nn.Module | None = None
        self._holding: Holding | None = None
        self._scaler = scaler
        self._stands_alone = model is not None
        self._last: PassNumbers | None = None
        self._joint = False  # another forward pass had the same backward pass
        self._next = NamedSamples()
        self._on_call = self._resting = False  # rests until wake(), once it is in a Monitor; nothing is recorded
        self._layer_index = LayerIndex({})
        self._window = SampleWindow(columns, make_scores)
        self._without_loss: Counter[str] = Counter()  # passes whose factor is not known, by reason
        self._told_of_hooks = self._told_of_sums = False  # of hooks on parameters, of what else comes to them
        self._heard = False  # a step has brought numbers
        self._unknown_scale = ""  # why what the loss was multiplied with is not known
        self._raised: Warning | None = None  # by a warning, where the filters make an error of it
        if model is not None:
            self._watch(model, scaler)

    @abstractmethod
    def _numbers_of(self, record: LayerRecord, factor: LossFactor) -> PassNumbers:
        """Return the numbers of a pass."""

    def _single_sink(self, names: tuple[str, ...]) -> Sink | None:
        """Return where the compiled code may write the norms of these parameters' layers, when nothing else asks for
        them."""
        return None

    # ---- the layers that it watches

    def prepare(self, optimizers: Sequence[Optimizer], scaler: Any, window_blocks: int) -> None:
        # Here and not in tapped(): before anything of it changes, and before the layers are tapped for other metrics.
        if self._is_taken:
            raise ValueError(
                f"metrics: this {type(self).__name__} watches a model already (alone, or in another Monitor), and "
                "would count every backward pass twice; close() that one first, or make a metric of its own for this "
                "Monitor"
            )
        self._resting = self._on_call
        self._window.prepare(window_blocks)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._unknown_scale = ""

    @property
    def _is_taken(self) -> bool:
        """True while it watches a model, or rests beside one."""
        return self._capture is not None and (self._capture.watches or self._capture.resting)

    def bind(self, model: nn.Module) -> None:
        """Bind to no parameters yet: they and the layers are found when the layers are tapped."""
        self._model = model

    def needs(self) -> Needs:
        """Say that all layers are to be tapped; and of the gradients, for the noise scale."""
        return Needs(layers=self._options, gradients=self._has_noise and not self._stands_alone)

    def tapped(self, layers: TappedLayers) -> None:
        """Take the tapped layers, and start anew where they are others than before."""
        check_methods(self._methods, layers.sites, fused=self._options.fused)
        if self._capture is None and not layers.coverage.covered:
            layers.coverage.check()
            raise ValueError(
                "model: nothing in it is trainable, so there are no gradients to measure; unfreeze what is trained "
                "(requires_grad_(True)) first"
            )
        self._capture = layers
        layer_of = layers_of_parameters(layers)
        before, self._layer_index = self._layers, LayerIndex(layer_of, tied_names(self._model, layer_of))
        self._window.begin(len(self._layers), layers.parts, anew=self._layers != before, noise=self._has_noise)
        self._holding = Holding(self._held, model=self._model)
        if self._has_noise:
            measured = layers.coverage.measured
            self._window.estimate_noise(self._model, self._layer_index, measured, apart=self.ranks_apart)
        self._window.mark()
        if self._stands_alone:
            layers.single.send_to(self._single_sink)

    def _renew_sink(self) -> None:
        if self._capture is not None:
            self._capture.single.renew_sink()

    def rebind(self) -> None:
        """Look at the model anew after parameters were frozen or unfrozen, layers added or removed; statistics start
        anew where the layers are others than before."""
        self._window.open_step.drop()
        self._next.take()
        if self._capture is not None and self._holding is not None:
            self._holding.settle()
            self._capture.rebind()
            self.tapped(self._capture)
            if self._resting:
                self._capture.rest()

    # ---- at rest, until something asks for numbers

    def on_call(self, called: bool) -> None:
        """Be one that rests until :meth:`wake`, or one that does not; called before prepare(), which refuses one that
        is taken: that stays what it is."""
        if not self._is_taken:
            self._on_call = called

    @property
    def _has_noise(self) -> bool:
        """True where it estimates the noise scale; not on call, since windows of ranks of which some rest have no
        steps in common."""
        return self._wants_noise and not self._on_call

    @property
    def _lacks_noise(self) -> bool:
        """True where it was to have one, and is on call."""
        return self._wants_noise and self._on_call

    @property
    def warns_only(self) -> bool:  # type: ignore[override]
        """True on call: alarms are to end no training, and what stops the metric comes to light after one alone."""
        return self._on_call

    @property
    def rests(self) -> bool:
        """True while nothing is recorded, until :meth:`wake`."""
        return self._resting

    def rest(self) -> None:
        """Record nothing from the next pass on, with the hooks off; between two steps."""
        self._resting = True
        if self._capture is not None:
            self._capture.rest()

    def wake(self) -> None:
        """Record again; between two steps.

        Raises:
            ValueError: a parameter that no rule covers is there now.
        """
        self._resting = False
        if self._capture is not None and self._holding is not None and not self.off:
            self._window.open_step.drop()
            self._holding.settle()
            self._capture.wake()
            self._capture.active = self._window.steps % self._every == 0
            self.tapped(self._capture)

    @property
    def _layers(self) -> list[str]:
        return self._layer_index.layers

    @property
    def _measured(self) -> set[str]:
        """The layers of which something is measured."""
        covered = set[str]() if self._capture is None else self._capture.coverage.covered.keys()
        return {layer for name, layer in self._layer_index.layer_of.items() if name in covered}

    def _held(self) -> list[tuple[str, str, Tensor]]:
        """Return name, layer and tensor of all measured parameters, as this rank has them."""
        assert self._capture is not None
        found = dict(self._capture.coverage.parameters())
        known = [(name, layer) for name, layer in self._layer_index.layer_of.items() if name in found]
        return [(with_prefix(self.prefix, n), with_prefix(self.prefix, layer), found[n]) for n, layer in known]

    # ---- what it observes

    def observe_layers(self, record: LayerRecord) -> None:
        """Take in the norms of one backward pass."""
        if torch.cuda.is_initialized() and any(map(is_capturing, record.norms_sq.values())):
            raise RuntimeError(
                f"{self.name}: a backward pass is captured into a CUDA graph, and no replay of it would be recorded; "
                "run the steps that are to be measured without the graph, or capture them without this metric"
            )
        factor = self._reduction.factor(record.samples, self._scaler, record.note, record.loss, record.task)
        if factor is None:
            self._without_loss[self._reduction.missing] += 1
            self.observe_unrecorded(record.samples, self._reduction.missing)
            if self._reduction.untold:
                message, self._reduction.untold = f"lipcore has no {self.name}: {self._reduction.untold}", ""
                self._warn(message)
            return
        norms = self._numbers_of(record, factor)
        before = None if self._last is None else self._last.record
        self._joint = before is not None and before.factors is not None and before.task == record.task
        self._last = norms
        self._heard = self._heard or self._stands_alone  # which holds nothing until a step is made
        self._note_doubt(record)
        if doubt := self._unknown_scale or record.unproved:
            self._window.doubts.add(doubt)
        if record.differs and not self._told_of_sums:
            self._told_of_sums = True
            self._warn(f"lipcore does not label {self.name} exact: {record.differs}")
        if record.observed:
            return
        ids, losses = self._next.take()
        if ids is not None and len(ids) != record.samples:
            raise ValueError(f"ids: {len(ids)} ids were given for a micro-batch of {record.samples} samples")
        batch = MicroBatch(norms, ids, losses)
        if self._stands_alone:
            self._window.take_in(batch)
        else:
            self._window.hold(batch)

    def _warn(self, message: str, stacklevel: int = 1) -> None:
        """Warn from inside a hook; what the user's filters make an error of is kept."""
        self._raised = warn_in_hook(message, UserWarning, stacklevel + 1) or self._raised

    def observe_unrecorded(self, samples: int, reason: str) -> None:
        """Take in a backward pass without a record: the numbers of the one before are not its numbers, nor are the ids
        set for it those of the next."""
        self._next.take()
        self._reduction.forget()
        self._last = self._without(samples, reason)
        sums = self._window.open_step.sums
        if (reason == STRAYED or reason in self._without_loss) and sums is not None:
            sums.spoil(reason)

    def observe_loss(self, loss: Tensor) -> None:
        if not self._resting:
            self._reduction.look_at(loss)

    def observe_batch(self, ids: Tensor, losses: Tensor | None) -> None:
        if not self._resting:
            self._name_samples(ids)
        if losses is not None and not self._resting:
            self._next.set_losses(losses)

    def listen(self, listener: StepListener) -> None:
        """Tell this listener of the samples of every step from now on."""
        self._window.listeners.append(listener)

    def _note_doubt(self, record: LayerRecord) -> None:
        """Note that a pass waits for a proof; a mark is made before the first of them."""
        doubtful = record.served or (self._options.prove and record.samples > 1)
        if doubtful and not self._waits and not record.observed:
            self._window.mark()
        self._window.unproved.served |= record.served
        self._window.unproved.tapped |= doubtful and not record.served

    @property
    def _waits(self) -> bool:
        """True where passes have come since the last good proof that a failed one would take back."""
        unproved = self._window.unproved
        # Alone, the norms of served passes go into the window without a record.
        into_window = self._stands_alone and self._capture is not None and self._capture.single.unsettled
        return unproved.tapped or unproved.served or into_window

    def observe_proof(self, failure: str, served: bool) -> None:
        """Keep what is proved; take back what came since the last good proof where one has failed."""
        unproved = self._window.unproved
        if failure:
            if unproved.tapped or unproved.served or served:
                self._take_back(failure)
            return
        if served:
            unproved.served = False
        else:
            unproved.tapped = False
        if not self._waits:
            unproved.handed_out.settle()
            if self._stands_alone and served:
                self._window.mark()  # the next ones may come without a record

    def _take_back(self, reason: str) -> None:
        if count := self._window.take_back(reason):
            self._warn(
                f"lipcore took back the gradient norms of {count} samples, all since the last good proof: {reason}; "
                "results that were made of some of them are NaN (windows of the history too)",
                stacklevel=3,
            )

    def observe_stop(self, reason: str) -> None:
        """Give NaN for the last pass: its numbers are those of the pass before the error."""
        self._raised = None  # the error that stops the metric says it
        self.observe_unrecorded(0 if self._last is None else self._last.samples, reason)

    def observe_unknown_scale(self, reason: str) -> None:
        """Label nothing exact from the step under way on, where the scale is not read from the loss."""
        if self._reduction.reduction != "auto":
            self._unknown_scale = reason
            if self._window.open_step:
                self._window.doubts.add(reason)

    def observe_gradients(self) -> None:
        self._window.open_step.read_gradients()

    def observe_taken_gradients(self) -> None:
        self._window.open_step.lose_gradients()

    def step_made(self) -> None:
        self._next.take()  # set for a backward pass that did not come, or that was in a step without records
        self._reduction.forget()

    def observe_step(self) -> None:
        """Count what the backward passes of the optimizer's step brought."""
        window = self._window
        recorded = window.finish_step(self._doubt_of, wanted=window.steps % self._every == 0)
        if recorded and window.open_step.hooked and not self._told_of_hooks:
            self._told_of_hooks = True
            self._warn(f"lipcore leaves steps out of the gradient noise scale: {HOOKED}")
        self._heard = self._heard or recorded
        if window.steps == _SILENT and not self._heard and not self._resting and self.unrecorded:
            reasons = "; ".join(self.unrecorded)
            self._warn(f"lipcore has recorded no sample for {self.name} in {_SILENT} steps: {reasons}")
        if self._capture is not None and not self._resting:
            self._capture.active = window.steps % self._every == 0

    def _doubt_of(self, batches: Sequence[MicroBatch]) -> str:
        """Return why numbers of these micro-batches are not known, not proved, or not of all parameters; "" where
        they are."""
        return doubt_of([batch.norms.record for batch in batches], self._unknown_scale, self._share_note)

    @property
    def _share_note(self) -> str:
        share = self._capture.coverage.share if self._capture is not None else ""
        note = f"over the covered parameters only: {share}" if share else ""
        return "; ".join(filter(None, [note, "" if self._window.in_parts is None else IN_PARTS]))

    def take_error(self) -> Exception | None:
        """Return, once, a warning that the filters have made an error of."""
        raised, self._raised = self._raised, None
        return raised

    def observe_skipped_step(self) -> None:
        """Drop what the backward passes of a step brought that a GradScaler skipped. This is found out when the next
        one comes, whose ids are there already."""
        self._window.dropped += self._window.open_step.drop()

    def _name_samples(self, ids: Any) -> None:
        """Name the samples of the next backward pass."""
        if self._next.set_ids(ids):
            self._renew_sink()

    def _without(self, samples: int, reason: str) -> PassNumbers:
        """Return what a backward pass without a record has brought."""
        record = LayerRecord(samples, {}, {}, reason)
        record.explain(self._layer_index.layer_of)
        return self._numbers_of(record, LossFactor(1.0))

    @property
    def unrecorded(self) -> dict[str, int]:
        """Reasons why backward passes were not recorded, each with how many there were."""
        return ({} if self._capture is None else dict(self._capture.unrecorded)) | self._without_loss
