"""The base of metrics of single samples' gradients: passes, proofs, micro-batches, ids, windows, states."""

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
from lipcore.distributed.group import AUTO
from lipcore.distributed.partners import Partners
from lipcore.distributed.rank_axis import Place
from lipcore.metric.blocks import BlockWindow, added_blocks, empty_blocks
from lipcore.metric.distribution import on_device
from lipcore.metric.hook_warnings import warn_in_hook
from lipcore.metric.host_reads import OnDevice
from lipcore.metric.plan_lines import PlanLines
from lipcore.metric.protocol import Needs, PlanLine
from lipcore.metric.rank_distributions import RankDistributions
from lipcore.metric.rank_part import FSDP1_PIECES, Holding, RankPart
from lipcore.metric.rank_states import RankStates
from lipcore.metric.results import MetricResult
from lipcore.metric.show import Shown
from lipcore.metric.standalone import StandaloneMetric
from lipcore.metric.state import check_version, checked_count, under_key
from lipcore.metric.values import Value
from lipcore.models.capturing import is_capturing
from lipcore.models.names import with_prefix
from lipcore.models.ranks import is_fsdp1
from lipcore.per_sample.doubts import Doubts
from lipcore.per_sample.layer_index import LayerIndex, tied_names
from lipcore.per_sample.loss_factor import LossFactor
from lipcore.per_sample.loss_reduction import Reduction
from lipcore.per_sample.methods import check_methods, how
from lipcore.per_sample.noise.noise_scale import NoiseScale
from lipcore.per_sample.noise.noise_sums import HOOKED, NoiseSums
from lipcore.per_sample.noise.shared_gradient import SharedGradient, checked_shared, noise_of_all, with_steps
from lipcore.per_sample.open_step import MicroBatch, OpenStep, PassNumbers, take_in
from lipcore.per_sample.rank_part import COUNTS, PerSamplePart
from lipcore.per_sample.results import add_noise
from lipcore.per_sample.sample_names import checked_ids, checked_losses
from lipcore.per_sample.scores.rank_scores import scores_of_all
from lipcore.per_sample.scores.sample_scores import SampleScores
from lipcore.per_sample.scores.score_columns import ScoreColumns, Scores
from lipcore.per_sample.show import shown
from lipcore.per_sample.step_listener import StepListener
from lipcore.per_sample.total import total_of
from lipcore.per_sample.unproved import Unproved

_RESTS = "its hooks are off until an alarm (Alarms(per_sample=...))"
_SILENT = 4  # steps without a number after which the user is told why


class PerSampleMetric(StandaloneMetric):
    """Base of metrics of what single samples' gradients are, taken from the layers' factors in the ordinary backward
    pass.

    A subclass says what the layers' factors become (:attr:`LayerOptions.measure`), what the numbers of a pass are
    (:meth:`_numbers_of`) and how a window of them is told (:meth:`_add_numbers`).

    Args:
        model: only when the metric stands alone.
        reduction: what the loss does over the batch.
        options: how the layers are tapped.
        every_steps: record in every k-th optimizer step.
        noise_scale: estimate the gradient noise scale, of numbers that are norms.
        columns: distributions per layer.
        make_scores: makes what keeps statistics per sample id.
        scaler: a GradScaler, when the metric stands alone.

    Attributes:
        scores: statistics per sample id, when `ids` are given.
        loss_scores: of the losses, when :meth:`set_losses` gives them too.
    """

    _version = 1

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
        self._columns, self._make_scores = columns, make_scores
        self._wants_noise = noise_scale
        self._capture: TappedLayers | None = None
        self._model: nn.Module | None = None
        self._holding: Holding | None = None
        self._shared: SharedGradient | None = None
        self._scaler = scaler
        self._stands_alone = model is not None
        self._steps = 0
        self._last: PassNumbers | None = None
        self._joint = False  # another forward pass had the same backward pass
        self._ids: Tensor | None = None
        self._losses: Tensor | None = None
        self._takes_ids = False
        self.scores: Any = make_scores()
        self.loss_scores = SampleScores()
        self._step_listeners: list[StepListener] = []
        self._on_call = False  # once it is in a Monitor, it rests until wake()
        self._resting = False  # nothing is recorded until then
        self._layer_index = LayerIndex({})
        self._open_step = OpenStep(None, make_scores)
        self._blocks = 1
        self._window = BlockWindow(0, 1)  # until the layers are known; the total is the last place
        self._unproved = Unproved(1)
        self._doubts = Doubts(1)
        self._dropped = 0
        self._without_loss: Counter[str] = Counter()  # passes whose factor is not known, by reason
        self._noise: NoiseScale | None = None
        self._told_of_hooks = self._told_of_sums = False  # of hooks on parameters, of what else comes to them
        self._heard = False  # a step has brought numbers
        self._unknown_scale = ""  # why what the loss was multiplied with is not known
        self._raised: Warning | None = None  # by a warning, where the filters make an error of it
        if model is not None:
            self._watch(model, scaler)

    # ---- what a subclass says

    @abstractmethod
    def _numbers_of(self, record: LayerRecord, factor: LossFactor) -> PassNumbers:
        """Return the numbers of a pass."""

    @abstractmethod
    def _add_numbers(self, result: MetricResult, note: str, doubt: str) -> None:
        """Add the window's distributions to a result; `note` goes with the total, `doubt`: why they are not proved."""

    @abstractmethod
    def _part_of(self, agreed: dict[str, Any], **found: Any) -> PerSamplePart:
        """Return the window's part in that of all ranks, of what ranks agree on and what was found so far."""

    @abstractmethod
    def _shown_rows(self) -> list[tuple[str, dict[str, Value]]]:
        """Return the window's reducers by place, of what is measured, the total last."""

    def _own_plan(self) -> list[PlanLine]:
        """Return the lines of plan() on what is kept beside the window."""
        return []

    def _single_sink(self, names: tuple[str, ...]) -> Sink | None:
        """Return where the compiled code may write the norms of these parameters' layers, when nothing else asks for
        them."""
        return None

    # ---- the protocol

    def prepare(self, optimizers: Sequence[Optimizer], scaler: Any, window_blocks: int) -> None:
        # Here and not in tapped(): before anything of it changes, and before the layers are tapped for other metrics.
        if self._is_taken:
            raise ValueError(
                f"metrics: this {type(self).__name__} watches a model already (alone, or in another Monitor), and "
                "would count every backward pass twice; close() that one first, or make a metric of its own for this "
                "Monitor"
            )
        self._blocks, self._resting = window_blocks, self._on_call
        self._step_listeners = []  # those of a Monitor before hear no more
        self._doubts, self._unproved = Doubts(window_blocks), Unproved(window_blocks)
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
        layer_of: dict[str, str] = {}
        for site in layers.sites:
            for parameter in site.names.values():
                layer_of.setdefault(parameter, site.name)
        owners = {name.rpartition(".")[0] for name, _ in layers.coverage.parameters()}
        root = "(root)" if "model" in owners else "model"  # a child of this name has its own place
        for parameter in layers.coverage.by_graph:
            layer_of.setdefault(parameter, parameter.rpartition(".")[0] or root)
        before, self._layer_index = self._layers, LayerIndex(layer_of, tied_names(self._model, layer_of))
        if self._layers != before or not self._window.open:
            places = (len(self._layers) + 1) * self._columns
            self._window, self._noise = BlockWindow(places, self._blocks), None
        sums, places = None, len(self._layers) + 1
        self._holding = Holding(self._held)
        if self._has_noise:
            self._noise = self._noise or NoiseScale(places)
            sums = NoiseSums(self._layer_index, layers.coverage.parameters)
            numbers = [self._layer_index.number[layer] for layer in self._layer_index.layer_of.values()]
            self._shared = SharedGradient(self._model, sums, numbers, places, self.ranks_apart, self._steps)
        self._open_step = OpenStep(sums, self._make_scores)
        self._mark()
        if self._stands_alone:
            layers.single.send_to(self._single_sink)

    def _renew_sink(self) -> None:
        if self._capture is not None:
            self._capture.single.renew_sink()

    def rebind(self) -> None:
        """Look at the model anew after parameters were frozen or unfrozen, layers added or removed; statistics start
        anew where the layers are others than before."""
        self._open_step.drop()
        self._take_ids()
        if self._capture is not None:
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
    def _unlike_noise(self) -> str:
        """Words on another one, where only one of the two has a noise scale, with what to do."""
        if self._noise is not None:
            return (
                "has none, since it was made with noise_scale=False or under Alarms(per_sample=...), and this metric "
                "has a noise scale; pass noise_scale=False, or such Alarms, here too"
            )
        if self._lacks_noise:
            return (
                "has a noise scale, and this metric has none under Alarms(per_sample=...); make the Monitor with "
                "Alarms that have no per_sample="
            )
        return "has a noise scale, and this metric has none; make it without noise_scale=False"

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
        if self._capture is not None and not self.off:
            self._open_step.drop()
            self._capture.wake()
            self._capture.active = self._steps % self._every == 0
            self.tapped(self._capture)

    @property
    def _layers(self) -> list[str]:
        return self._layer_index.layers

    @property
    def _measured(self) -> set[str]:
        """The layers of which something is measured."""
        covered = set[str]() if self._capture is None else self._capture.coverage.covered.keys()
        return {layer for name, layer in self._layer_index.layer_of.items() if name in covered}

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
                self._raised = warn_in_hook(message, UserWarning) or self._raised
            return
        norms = self._numbers_of(record, factor)
        before = None if self._last is None else self._last.record
        self._joint = before is not None and before.factors is not None and before.task == record.task
        self._last = norms
        self._note_doubt(record)
        if doubt := self._unknown_scale or record.unproved:
            self._doubts.add(doubt)
        if record.differs and not self._told_of_sums:
            self._told_of_sums = True
            message = f"lipcore does not label {self.name} exact: {record.differs}"
            self._raised = warn_in_hook(message, UserWarning) or self._raised
        if record.observed:
            return
        ids, losses = self._take_ids()
        if ids is not None and len(ids) != record.samples:
            raise ValueError(f"ids: {len(ids)} ids were given for a micro-batch of {record.samples} samples")
        batch = MicroBatch(norms, ids, losses)
        if self._stands_alone:
            self._take_in(batch)
        else:
            self._open_step.add(batch, len(self._window.open))

    def _take_in(self, batch: MicroBatch) -> None:
        take_in(batch, self._window.open, self.scores, self.loss_scores)

    def _take_ids(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the ids and the losses that were set for a backward pass, and forget them."""
        ids, losses, self._ids, self._losses = self._ids, self._losses, None, None
        return ids, losses

    def observe_unrecorded(self, samples: int, reason: str) -> None:
        """Take in a backward pass without a record: the numbers of the one before are not its numbers, nor are the ids
        set for it those of the next."""
        self._take_ids()
        self._reduction.forget()
        self._last = self._without(samples, reason)
        if (reason == STRAYED or reason in self._without_loss) and self._open_step.sums is not None:
            self._open_step.sums.spoil(reason)

    def observe_loss(self, loss: Tensor) -> None:
        if not self._resting:
            self._reduction.look_at(loss)

    def observe_batch(self, ids: Tensor, losses: Tensor | None) -> None:
        if self._resting:
            return
        self.set_ids(ids)
        if losses is not None:
            self.set_losses(losses)

    def listen(self, listener: StepListener) -> None:
        """Tell this listener of the samples of every step from now on."""
        self._step_listeners.append(listener)

    def _note_doubt(self, record: LayerRecord) -> None:
        """Note that a pass waits for a proof; a mark is made before the first of them."""
        doubtful = record.served or (self._options.prove and record.samples > 1)
        if doubtful and not self._waits and not record.observed:
            self._mark()
        self._unproved.served |= record.served
        self._unproved.tapped |= doubtful and not record.served

    @property
    def _waits(self) -> bool:
        """True where passes have come since the last good proof that a failed one would take back."""
        unproved = self._unproved
        # Alone, the norms of served passes go into the window without a record.
        into_window = self._stands_alone and self._capture is not None and self._capture.single.unsettled
        return unproved.tapped or unproved.served or into_window

    def observe_proof(self, failure: str, served: bool) -> None:
        """Keep what is proved; take back what came since the last good proof where one has failed."""
        unproved = self._unproved
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
                self._mark()  # the next ones may come without a record

    def _mark(self) -> None:
        self._unproved.mark(self._window, self.scores, self._noise)
        if self._shared is not None:
            self._shared.mark()
        for listener in self._step_listeners:
            listener.samples_proved()

    def _take_back(self, reason: str) -> None:
        count, self._noise = self._unproved.take_back(reason, self._window, self.scores, self._open_step)
        if self._shared is not None:
            self._shared.take_back(f"samples of it were taken back: {reason}")
        for listener in self._step_listeners:
            listener.samples_taken_back(reason)
        if count:
            message = (
                f"lipcore took back the gradient norms of {count} samples, all since the last good proof: {reason}; "
                "results that were made of some of them are NaN (windows of the history too)"
            )
            self._raised = warn_in_hook(message, UserWarning, stacklevel=3) or self._raised

    def observe_stop(self, reason: str) -> None:
        """Give NaN for the last pass: its numbers are those of the pass before the error."""
        self._raised = None  # the error that stops the metric says it
        self.observe_unrecorded(0 if self._last is None else self._last.samples, reason)

    def observe_unknown_scale(self, reason: str) -> None:
        """Label nothing exact from the step under way on, where the scale is not read from the loss."""
        if self._reduction.reduction != "auto":
            self._unknown_scale = reason
            if self._open_step:
                self._doubts.add(reason)

    def observe_gradients(self) -> None:
        if self._open_step.sums is not None and self._open_step:
            self._open_step.sums.read_gradients()

    def observe_step(self) -> None:
        """Count what the backward passes of the optimizer's step brought."""
        self._take_ids()  # set for a backward pass that did not come, or that was in a step without records
        self._reduction.forget()
        recorded = bool(self._open_step)
        if recorded and self._step_listeners:
            batches = self._open_step.batches()
            doubt = self._doubt_of(batches)
            for listener in self._step_listeners:
                listener.step_samples(batches, doubt)
        self._open_step.take_into(self._window.open, self.scores, self.loss_scores)
        if self._open_step.sums is not None and self._noise is not None and self._shared is not None:
            self._shared.finish(self._noise, recorded, self._steps % self._every == 0)
            if recorded and self._open_step.sums.hooked and not self._told_of_hooks:
                self._told_of_hooks = True
                message = f"lipcore leaves steps out of the gradient noise scale: {HOOKED}"
                self._raised = warn_in_hook(message, UserWarning) or self._raised
        self._steps += 1
        self._heard = self._heard or recorded
        if self._steps == _SILENT and not self._heard and not self._resting:
            self._tell_of_silence()
        if self._capture is not None and not self._resting:
            self._capture.active = self._steps % self._every == 0

    def _doubt_of(self, batches: Sequence[MicroBatch]) -> str:
        """Return why numbers of these micro-batches are not known, not proved, or not of all parameters; "" where
        they are."""
        records = [batch.norms.record for batch in batches]
        missing = next(filter(None, (record.broken or record.hidden for record in records)), "")
        unproved = self._unknown_scale or next(filter(None, (record.unproved for record in records)), "")
        return "; ".join(filter(None, (missing, unproved and f"not proved: {unproved}", self._share_note)))

    @property
    def _share_note(self) -> str:
        share = self._capture.coverage.share if self._capture is not None else ""
        return f"over the covered parameters only: {share}" if share else ""

    def _tell_of_silence(self) -> None:
        """Warn that no step has brought a number so far, where the reasons are known."""
        if reasons := self.unrecorded:
            message = f"lipcore has recorded no sample for {self.name} in {_SILENT} steps: {'; '.join(reasons)}"
            self._raised = warn_in_hook(message, UserWarning) or self._raised

    def take_error(self) -> Exception | None:
        """Return, once, a warning that the filters have made an error of."""
        raised, self._raised = self._raised, None
        return raised

    def observe_skipped_step(self) -> None:
        """Drop what the backward passes of a step brought that a GradScaler skipped. This is found out when the next
        one comes, whose ids are there already."""
        self._dropped += self._open_step.drop()

    # ---- the last micro-batch

    def _watched(self) -> TappedLayers:
        if self._capture is None:
            raise RuntimeError("this metric watches no model yet: pass model=, or give it to a Monitor")
        return self._capture

    def _last_norms(self) -> PassNumbers:
        if self._engine is not None:
            self._engine.flush()
        elif self._capture is not None:
            self._capture.flush()
        if self._resting:
            if self._last is None:
                raise RuntimeError(f"no backward pass was recorded yet: {_RESTS}")
            return self._without(self._last.samples, _RESTS)
        if self._last is None:
            unrecorded = self._watched().unrecorded
            why = "; ".join(f"{count} times: {reason}" for reason, count in unrecorded.items())
            raise RuntimeError(
                "no backward pass was recorded yet"
                + (
                    f" ({why})"
                    if why
                    else "; call the very object that was passed as model, in grad mode, and backward(); attach the "
                    "metric to torch.compile's result, before its first call (or torch._dynamo.reset())"
                )
            )
        if self._capture is not None and self._capture.skipped:
            samples = self._capture.skipped_samples
            samples = self._last.samples if samples is None else samples
            return self._without(samples, f"the step is not recorded (every_steps={self._every})")
        return self._last

    def _without(self, samples: int, reason: str) -> PassNumbers:
        """Return what a backward pass without a record has brought."""
        record = LayerRecord(samples, {}, {}, reason)
        record.explain(self._layer_index.layer_of)
        return self._numbers_of(record, LossFactor(1.0))

    @property
    def broken(self) -> str:
        """Reason why the last total is NaN, at some samples or at all; empty when it is not."""
        last = self._last_norms()
        return last.record.broken or last.factor.reason or last.record.hidden

    @property
    def unproved(self) -> str:
        """Reason why it is not proved that the last backward pass's norms are those of single samples; empty when it
        is proved: row i of every layer's gradient is that of sample i, bit for bit. Also, what else is in them where a
        GradScaler was not passed."""
        return self._last_norms().record.unproved or self._unknown_scale

    def set_ids(self, ids: Any) -> None:
        """Name the samples of the next backward pass by their ids (integers [B]); its norms are kept in
        :attr:`scores`. The ids are forgotten when that pass is not recorded, and at the end of the optimizer step."""
        self._ids, self._losses = checked_ids(ids), None
        if not self._takes_ids:
            self._takes_ids = True
            self._renew_sink()

    def set_losses(self, losses: Tensor) -> None:
        """Keep the losses of the samples of the next backward pass, in :attr:`loss_scores`, by the ids that
        :meth:`set_ids` was given before. A wrong label shows in the loss rather than in the gradient's norm, an input
        that is too large in the norm rather than in the loss. Nothing waits for a device; the losses are forgotten
        where the ids are.

        Args:
            losses: floating-point numbers [B], each sample's own: what a loss with ``reduction="none"`` returns, or its
                sum over a sample's terms.

        Raises:
            ValueError: no such tensor, no ids, or not as many.
        """
        if self._ids is None:
            raise ValueError(
                "losses: there are no ids to keep them by; call set_ids(ids) before, in the same micro-batch"
            )
        self._losses = checked_losses(losses, self._ids)

    def sync_scores(self, group: Any = AUTO, *, timeout: float = 60, losses: bool = False) -> Any:
        """Return :attr:`scores` with what all ranks of a group have observed; those of each rank stay as they are.
        Every rank of the group calls it at the same step. A sample that several ranks have seen counts once for each.

        Args:
            group: "auto" for the default process group, where there is one; a ProcessGroup or a DeviceMesh.
            timeout: seconds to wait for the other ranks.
            losses: return :attr:`loss_scores` so.

        Raises:
            RuntimeError: a rank has not come in time, or is at another step. No collective was started.
            ValueError: ranks are at different calls.
        """
        partners = Partners(group, timeout)
        scores: Any = self.loss_scores if losses else self.scores
        several = not isinstance(scores, SampleScores)
        own = list(scores) if several else [scores]
        what = f"{self.name}.sync_scores({'losses=True' if losses else ''})"
        found = scores_of_all(partners, own, what, self._steps)
        return ScoreColumns.of(found) if several else found[0]

    def set_loss(self, loss: Tensor) -> None:
        r"""Read from a loss's own graph what it was divided by; call it before ``loss.backward()``, in every
        micro-batch, with ``loss_reduction="auto"``.

        The graph says f with :math:`\nabla l_i = f \cdot` (what the backward pass of this loss alone brings of sample
        i): :math:`l_i` is the sum of sample i's terms before the reduction to one number. In the backward pass the
        gradient g comes to the loss, of whatever was made of it (a GradScaler's scale, loss / k, loss + penalty). The
        norms are those of what comes times f / g. Means, sums, torch's loss functions, smoothed labels, sums of losses
        divided by the same number, and constants that a loss is multiplied with or divided by are known.

        Raises:
            TypeError: no tensor.
            ValueError: an operation whose factor is not known (parts divided by different numbers, say), by name.
            RuntimeError: the metric has another loss_reduction.
        """
        self._reduction.read(loss)

    def coverage(self) -> Any:
        """Return which parameters are measured by which layer's rule, which are frozen, and which are not covered
        and why."""
        return self._watched().coverage

    # ---- results

    def plan(self) -> PlanLines:
        """Return what is measured of each layer, by which rule, and in which way, once a backward pass has shown the
        sizes."""
        every = f" in every {self._every}th step" if self._every > 1 else ""
        proofs = f"; {self._capture.proofs}" if self._capture is not None else ""
        proofs = f"; {_RESTS}{proofs}" if self._resting else proofs
        proofs += "; it has no noise scale, since it is on after alarms alone" * self._lacks_noise
        lines = [PlanLine("all", f"{self._reduction}{every}{proofs}", 2048 * (len(self._layers) + 1) * self._columns)]
        lines += self._own_plan()
        if self._capture is None:
            return PlanLines(lines)
        by_graph = self._capture.coverage.by_graph
        for site in self._capture.sites:
            covered = self._capture.coverage.covered.keys() - by_graph.keys()
            keys = [key for key, name in site.names.items() if name in covered]
            way = how(site, self._methods, self._capture.fuses)
            if keys:
                rule = f"{type(site.module).__name__}: {', '.join(keys)}" + (f", {way}" if way else "")
                lines.append(PlanLine(site.name, rule))
        for name, why in by_graph.items():
            way = self._capture.graph.ways.get(name, "chosen at the first forward pass")
            lines.append(PlanLine(name, f"graph: {way}; by no rule, since {why}"))
        lines += [PlanLine(name, f"not covered: {why}") for name, why in self._capture.coverage.uncovered.items()]
        return PlanLines(lines)

    @property
    def unrecorded(self) -> dict[str, int]:
        """Reasons why backward passes were not recorded, each with how many there were."""
        return ({} if self._capture is None else dict(self._capture.unrecorded)) | self._without_loss

    def _facts(self) -> dict[str, Any]:
        """Return what was not recorded, not proved, taken back and not covered."""
        if self._capture is None:
            return {}
        doubts, taken_back = self._doubts.counts(), self._unproved.taken_back.counts()
        uncovered = dict(self._capture.coverage.uncovered)
        facts: dict[str, Any] = {"unrecorded": self.unrecorded}
        facts["proved"] = not doubts
        more = {"taken_back": taken_back, "not_proved": doubts, "not_covered": uncovered}
        return facts | {name: found for name, found in more.items() if found}

    def _follow(self, part: RankPart, result: MetricResult) -> None:
        """Have a failed proof reach what a rank adds to a window of all, and what that has become."""
        if self._waits and self._window.unproved:
            self._unproved.handed_out.add(part)
            self._unproved.handed_out.add(result)

    def _held(self) -> list[tuple[str, str, Tensor]]:
        """Return name, layer and tensor of all measured parameters, as this rank has them."""
        assert self._capture is not None
        found = dict(self._capture.coverage.parameters())
        known = [(name, layer) for name, layer in self._layer_index.layer_of.items() if name in found]
        return [(with_prefix(self.prefix, n), with_prefix(self.prefix, layer), found[n]) for n, layer in known]

    def on_device(self) -> list[OnDevice]:
        return on_device(self._window.open)

    def finalize(self) -> MetricResult:
        """Return the distributions over the window, in total and per layer, and the noise scale."""
        capture = self._capture
        result = MetricResult(self.name, dropped_samples=self._dropped)
        result.details.update(self._facts())
        doubts = self._doubts.counts()
        self._add_numbers(result, self._share_note, next(iter(doubts), ""))
        if self._noise is not None:
            add_noise(result, self._layers, total_of(capture), self._noise, self._open_step.sums)
        if self._waits and self._window.unproved:
            self._unproved.handed_out.add(result)
        return result

    def rank_part(self) -> RankPart | str:
        """Return what the open window adds to that of all ranks, or why there is nothing to add."""
        if self._capture is None or self._holding is None or self._model is None:
            return "it watches no model: this is a copy, or no Monitor has bound it"
        if is_fsdp1(self._model):
            return FSDP1_PIECES
        facts, coverage = self._facts(), self._capture.coverage
        empty = MetricResult(self.name)
        if coverage.uncovered:
            empty.details["not_covered"] = facts["not_covered"]
        part = self._part_of(
            {"every_steps": self._every, "share": coverage.share},
            holding=self._holding,
            layers=[with_prefix(self.prefix, layer) for layer in self._layers],
            total=total_of(self._capture),
            distributions=RankDistributions(self._window.merged()),
            details={name: facts.get(name, {}) for name in COUNTS},
            dropped=self._dropped,
            empty=empty,
            columns=self._columns,
        )
        self._follow(part, empty)
        return part

    def reset(self) -> None:
        """Start a new window."""
        self._window.reset()
        self._doubts.reset()
        self._unproved.reset()
        self._start_block()

    def advance(self) -> None:
        """Slide the window by a block; the noise scale's window is the open block, its moving average goes on."""
        self._window.advance()
        self._doubts.advance()
        self._unproved.advance()
        self._start_block()

    def _start_block(self) -> None:
        self._renew_sink()
        if self._shared is not None:
            self._shared.reset(self._steps)
        if self._noise is not None:
            self._noise.reset()
        if self._open_step.sums is not None:
            self._open_step.sums.reset()

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return version, layers, distributions of the window, noise scale and scores."""
        return {
            "version": self._version,
            "layers": list(self._layers),
            "steps": self._steps,
            "dropped": self._dropped,
            **self._window.state_dict(),
            "noise": self._noise.state_dict() if self._noise is not None else {},
            "shared": self._shared.state_dict() if self._shared is not None else {},
            "scores": self.scores.state_dict(),
            "loss_scores": self.loss_scores.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Where it does not fit, raise a ValueError and change nothing."""
        check_version(state, self._version, "metric")
        if state.get("layers") != self._layers:
            raise ValueError(f"layers: the state has {state.get('layers')!r}, this metric has {self._layers!r}")
        steps, dropped = checked_count(state, "steps"), checked_count(state, "dropped")
        window = self._window.loaded(state)
        scores = self._make_scores()
        noise = state.get("noise")
        if not isinstance(noise, dict) or bool(noise) != (self._noise is not None):
            raise ValueError(f"noise: the state {self._unlike_noise}")
        shared = checked_shared(state.get("shared"), len(self._layers) + 1)
        with under_key("scores"):
            scores.load_state_dict(state.get("scores"))  # type: ignore[arg-type]
        loss_scores = SampleScores()
        with under_key("loss_scores"):
            loss_scores.load_state_dict(state.get("loss_scores"))  # type: ignore[arg-type]
        if self._noise is not None:
            with under_key("noise"):  # last: it checks itself wholly, then takes over
                self._noise.load_state_dict(noise)
        self._window, self.scores, self.loss_scores = window, scores, loss_scores
        self._steps, self._dropped = steps, dropped
        self._mark()
        self._renew_sink()
        if self._shared is not None and self._noise is not None:
            self._shared.load(self._steps, shared, bool(self._noise.steps))
        if self._capture is not None and not self._resting:
            self._capture.active = self._steps % self._every == 0

    def split_state(self, state: dict[str, Any], place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return its state, with what its steps add to the noise scale of all ranks, and whether it is that of all."""
        share: dict[str, Any] = {}
        if self._shared is not None and self._capture is not None:
            share = self._shared.share(self._held(), self._steps, place)
        return {}, {**state, "alone": place.ranks == 1, "share": share}

    def empty_state(self, rest: dict[str, Any]) -> dict[str, Any]:
        """Return its state without samples. The averages of the noise scale go on from the last window that is that of
        all ranks; the open window's begins anew, since it is made of the steps of all ranks."""
        state = {**rest, "dropped": 0, "scores": self._make_scores().state_dict(), **empty_blocks(rest)}
        state["loss_scores"] = SampleScores().state_dict()
        if rest["noise"]:
            state |= noise_of_all(rest["noise"], rest["shared"], rest["share"], rest["steps"], alone=rest["alone"])
        return {**state, "share": {}}

    def add_states(self, begin: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the state with the samples of all of these."""
        dropped = sum(state["dropped"] for state in others)
        shared = with_steps(begin["shared"], [state["share"] for state in others if state["share"]])
        found = {"dropped": dropped, "shared": shared}
        for key, make in (("scores", self._make_scores), ("loss_scores", SampleScores)):
            scores = make()
            for state in others:
                one = make()
                one.load_state_dict(state[key])
                scores.merge(one)  # type: ignore[arg-type]
            found[key] = scores.state_dict()
        return {**begin, **found, **added_blocks([begin, *others])}

    def load_ranks(self, saved: RankStates) -> str:
        """Continue from states that ranks have saved, and return what the open window lacks then; "" for nothing."""
        why = super().load_ranks(saved)
        if saved.place.ranks == 1 and self._shared is not None and self._noise is not None:
            self._shared.settle(self._noise, self._open_step.sums)
        return why

    def merge(self, other: PerSampleMetric) -> None:
        """Add the open window of another one of the same layers (of another rank or interval): distributions, noise
        scale, scores and dropped samples."""
        if not isinstance(other, type(self)):
            raise TypeError(f"other: expected a {type(self).__name__}, got {type(other).__name__}")
        if other._layers != self._layers:
            raise ValueError(f"other: it measures the layers {other._layers!r}, this one {self._layers!r}")
        if other._columns != self._columns:
            raise ValueError(f"other: it has {other._columns} distributions per layer, this one {self._columns}")
        if (other._noise is None) != (self._noise is None):
            raise ValueError(f"other: it {self._unlike_noise}")
        if self._noise is not None and other._noise is not None:
            self._noise.merge(other._noise)
            self._unproved.merge(other._noise)
        if self._shared is not None:
            self._shared.interrupt("another window was merged into this one, without its single steps")
        self._window.merge(other._window)
        self._doubts.merge(other._doubts)
        self.scores.merge(other.scores)
        self.loss_scores.merge(other.loss_scores)
        self._dropped += other._dropped

    def __getstate__(self) -> dict[str, Any]:
        """Make what a copy or a pickle has: the settings and all numbers, and no model. What the open step brought
        stays with the original."""
        if self._last is not None:
            self._last_norms()  # takes in what has not been delivered yet
        attached: dict[str, Any] = {
            "_capture": None,
            "_engine": None,
            "_scaler": None,
            "_stands_alone": False,
            "_ids": None,
        }
        attached |= {"_model": None, "_holding": None, "_shared": None, "_losses": None, "_step_listeners": []}
        return self.__dict__ | attached | {"_open_step": OpenStep(None, self._make_scores)}

    def __repr__(self) -> str:
        return self._shown().text()

    def _repr_html_(self) -> str:
        return self._shown().html()

    def _shown(self) -> Shown:
        sums = self._open_step.sums
        return shown(
            *(self, self._shown_rows(), self._measured, self._capture, str(self._reduction), self._doubts.counts()),
            {} if sums is None else sums.skipped(),
        )
