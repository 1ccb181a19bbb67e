"""The base of metrics of single samples' gradients: the last micro-batch, windows, results, states."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lipcore.capture.layers.tapped import TappedLayers
from lipcore.distributed.group import AUTO
from lipcore.distributed.partners import Partners
from lipcore.distributed.rank_axis import Place
from lipcore.metric.distribution import on_device
from lipcore.metric.host_reads import OnDevice
from lipcore.metric.plan_lines import PlanLines
from lipcore.metric.protocol import PlanLine
from lipcore.metric.rank_distributions import RankDistributions
from lipcore.metric.rank_part import FSDP1_PIECES, RankPart
from lipcore.metric.rank_states import RankStates
from lipcore.metric.results import MetricResult
from lipcore.metric.show import Shown
from lipcore.metric.state import check_version
from lipcore.metric.values import Value
from lipcore.models.names import with_prefix
from lipcore.models.ranks import is_fsdp1
from lipcore.per_sample.added_up import add_up_waiting
from lipcore.per_sample.methods import layer_lines
from lipcore.per_sample.open_step import PassNumbers
from lipcore.per_sample.part_rows import IN_PARTS, OTHER_PARTS, OTHER_SCORES, has_rows
from lipcore.per_sample.rank_part import COUNTS, PerSamplePart
from lipcore.per_sample.results import add_noise, passes_unrecorded
from lipcore.per_sample.sample_names import NamedSamples
from lipcore.per_sample.sample_observer import SampleObserver
from lipcore.per_sample.scores.rank_scores import scores_of_all
from lipcore.per_sample.scores.sample_scores import SampleScores
from lipcore.per_sample.scores.score_columns import ScoreColumns
from lipcore.per_sample.show import shown
from lipcore.per_sample.total import total_of

_RESTS = "its hooks are off until an alarm (Alarms(per_sample=...))"


class PerSampleMetric(SampleObserver):
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
    """

    _version = 1

    # ---- what a subclass says

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

    # ---- statistics per sample id

    @property
    def scores(self) -> Any:
        """Statistics per sample id, when `ids` are given. Where ranks hold parts of parameters (tensor parallelism),
        those of samples that global_window() or :meth:`sync_scores` has added up."""
        self._window.read_scores()
        return self._window.scores

    @property
    def loss_scores(self) -> SampleScores:
        """Statistics of the losses per sample id, when :meth:`set_losses` gives them too."""
        self._window.read_scores()
        return self._window.loss_scores

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
        self._name_samples(ids)

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
        self._next.set_losses(losses)

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
        what = f"{self.name}.sync_scores({'losses=True' if losses else ''})"
        partners, rows = Partners(group, timeout), self._window.in_parts
        if rows is not None:
            add_up_waiting(rows, what, self._window.steps, timeout)
        scores: Any = self.loss_scores if losses else self.scores
        several = not isinstance(scores, SampleScores)
        own = list(scores) if several else [scores]
        parts, met = self._window.parts, partners.find()
        if parts is not None and not parts.counts and met is not None and parts.ranks[0] in met.ranks:
            own = [SampleScores()]  # another rank has those of the same samples
        found = scores_of_all(partners, own, what, self._window.steps)
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
        size = 2048 * (len(self._layers) + 1) * self._window.columns
        lines = [PlanLine("all", f"{self._reduction}{every}{proofs}", size)]
        lines += self._own_plan()
        if self._capture is None:
            return PlanLines(lines)
        return PlanLines([*lines, *layer_lines(self._capture, self._methods)])

    def _facts(self) -> dict[str, Any]:
        """Return what was not recorded, not proved, taken back and not covered."""
        if self._capture is None:
            return {} if self._window.parts is None else {"in_parts": IN_PARTS}
        doubts, taken_back = self._window.doubts.counts(), self._window.unproved.taken_back.counts()
        uncovered = dict(self._capture.coverage.uncovered)
        facts: dict[str, Any] = {"unrecorded": passes_unrecorded(self.unrecorded, self._model)}
        facts["proved"] = not doubts
        if self._window.in_parts is not None:
            facts["in_parts"] = IN_PARTS
        more = {"taken_back": taken_back, "not_proved": doubts, "not_covered": uncovered}
        return facts | {name: found for name, found in more.items() if found}

    def _follow(self, part: RankPart, result: MetricResult) -> None:
        """Have a failed proof reach what a rank adds to a window of all, and what that has become."""
        if self._waits and self._window.distributions.unproved:
            self._window.unproved.handed_out.add(part)
            self._window.unproved.handed_out.add(result)

    def on_device(self) -> list[OnDevice]:
        return on_device(self._window.distributions.open)

    def finalize(self) -> MetricResult:
        """Return the distributions over the window, in total and per layer, and the noise scale."""
        capture = self._capture
        result = MetricResult(self.name, dropped_samples=self._window.dropped)
        result.details.update(self._facts())
        doubts = self._window.doubts.counts()
        self._add_numbers(result, self._share_note, next(iter(doubts), ""))
        window = self._window
        if window.noise is not None:
            add_noise(result, self._layers, total_of(capture), window.noise, window.open_step.sums)
        if self._waits and window.distributions.unproved:
            window.unproved.handed_out.add(result)
        return result

    def observe_divided_gradients(self) -> None:
        """Leave it: the sums over samples are of gradients as backward passes add them up."""

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
            dropped=self._window.dropped,
            empty=empty,
            columns=self._window.columns,
            prefix=self.prefix,
        )
        self._follow(part, empty)
        return part

    def reset(self) -> None:
        """Start a new window."""
        self._window.reset()
        self._renew_sink()

    def advance(self) -> None:
        """Slide the window by a block; the noise scale's window is the open block, its moving average goes on."""
        self._window.advance()
        self._renew_sink()

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return version, layers, distributions of the window, noise scale and scores."""
        return {"version": self._version, "layers": list(self._layers), **self._window.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Where it does not fit, raise a ValueError and change nothing."""
        check_version(state, self._version, "metric")
        if state.get("layers") != self._layers:
            raise ValueError(f"layers: the state has {state.get('layers')!r}, this metric has {self._layers!r}")
        window = self._window
        window.load_state_dict(state, len(self._layers), window.unlike(lacks=self._lacks_noise))
        self._renew_sink()
        if self._capture is not None and not self._resting:
            self._capture.active = window.steps % self._every == 0

    def split_state(self, state: dict[str, Any], place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return its state, with what its steps add to the noise scale of all ranks, and whether it is that of all."""
        held = None if self._capture is None or self._holding is None else self._holding.held
        share = {} if held is None else self._window.share(held, place)
        return {}, {**state, "alone": place.ranks == 1, "share": share}

    def empty_state(self, rest: dict[str, Any]) -> dict[str, Any]:
        """Return its state without samples."""
        return self._window.empty_state(rest)

    def add_states(self, begin: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the state with the samples of all of these."""
        return self._window.add_states(begin, others)

    def load_ranks(self, saved: RankStates) -> str:
        """Continue from states that ranks have saved, and return what the open window lacks then; "" for nothing."""
        in_parts = any(state.get("in_parts") for state in saved.by_rank.values())
        if saved.own is None and saved.alike is not None and (in_parts or self._window.in_parts is not None):
            return self._load_others(saved)
        why = super().load_ranks(saved)
        if saved.place.ranks == 1:
            self._window.settle()
        return why

    def _load_others(self, saved: RankStates) -> str:
        """Go on from ranks that held other parts of the parameters: with their scores, and without the open window."""
        begin, parts = saved.alike, self._window.parts
        assert begin is not None
        if saved.complete:
            scores = self._window.added_scores(saved.others)
            if parts is None or parts.counts:
                begin = {**begin, **scores}
            elif len(scores["scores"]["ids"]):
                warnings.warn(OTHER_SCORES.format(len(scores["scores"]["ids"])), stacklevel=2)
        self.load_state_dict(begin)
        lacks = any(has_rows(state.get("in_parts", {})) for state in saved.by_rank.values())
        return OTHER_PARTS.format(saved.ranks) if lacks or parts is not None or not saved.complete else ""

    def merge(self, other: PerSampleMetric) -> None:
        """Add the open window of another one of the same layers (of another rank or interval): distributions, noise
        scale, scores and dropped samples."""
        if not isinstance(other, type(self)):
            raise TypeError(f"other: expected a {type(self).__name__}, got {type(other).__name__}")
        if other._layers != self._layers:
            raise ValueError(f"other: it measures the layers {other._layers!r}, this one {self._layers!r}")
        mine, theirs = self._window, other._window
        if mine.parts is not None or theirs.parts is not None:
            raise ValueError(
                "other: ranks hold parts of these samples' gradients (tensor parallelism); global_window() adds them up"
            )
        if theirs.columns != mine.columns:
            raise ValueError(f"other: it has {theirs.columns} distributions per layer, this one {mine.columns}")
        if (theirs.noise is None) != (mine.noise is None):
            raise ValueError(f"other: it {mine.unlike(lacks=self._lacks_noise)}")
        mine.merge(theirs)

    def __getstate__(self) -> dict[str, Any]:
        """Make what a copy or a pickle has: the settings and all numbers, and no model. What the open step brought
        stays with the original."""
        if self._last is not None:
            self._last_norms()  # takes in what has not been delivered yet
        attached = dict.fromkeys(("_capture", "_engine", "_scaler", "_model", "_holding"))
        own = {"_stands_alone": False, "_next": NamedSamples(), "_window": self._window.apart()}
        return self.__dict__ | attached | own

    def __repr__(self) -> str:
        return self._shown().text()

    def _repr_html_(self) -> str:
        return self._shown().html()

    def _shown(self) -> Shown:
        window, capture = self._window, self._capture
        sums = window.open_step.sums
        return shown(
            *(self, self._shown_rows(), self._measured, capture, str(self._reduction), window.doubts.counts()),
            {} if sums is None else sums.skipped(),
        )
