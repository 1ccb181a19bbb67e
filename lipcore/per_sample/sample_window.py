"""The window of a metric of single samples' gradients: its numbers, which of them are proved, and its state."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lipcore.distributed.rank_axis import Place
from lipcore.metric.blocks import Block, BlockWindow, added_blocks, empty_blocks
from lipcore.metric.state import checked_count, under_key
from lipcore.models.reduction import Reduction
from lipcore.models.tensor_parallel import PartRanks
from lipcore.models.wrapped import outermost
from lipcore.per_sample.doubts import Doubts, added_doubts
from lipcore.per_sample.layer_index import LayerIndex
from lipcore.per_sample.noise.noise_scale import NoiseScale
from lipcore.per_sample.noise.noise_sums import NoiseSums
from lipcore.per_sample.noise.shared_gradient import SharedGradient, checked_shared, noise_of_all, with_steps
from lipcore.per_sample.open_step import Intake, MicroBatch, OpenStep
from lipcore.per_sample.part_rows import PartRows, PassRows, check_part_rows
from lipcore.per_sample.scores.sample_scores import SampleScores
from lipcore.per_sample.scores.score_columns import Scores
from lipcore.per_sample.step_listener import StepListener
from lipcore.per_sample.unproved import Unproved

_DOUBTS = ("doubts", "taken_back")  # in a state: of passes that are not proved, and of samples


class SampleWindow:
    """The numbers of samples since a window began, and what goes on beyond it: scores, averages of the noise scale.

    Args:
        columns: distributions per layer.
        make_scores: makes what keeps statistics per sample id.

    Attributes:
        blocks: that it consists of.
        steps: optimizer steps so far.
        dropped: samples whose step was skipped.
        distributions: per layer, and in total as the last, by block; none until the layers are known.
        scores, loss_scores: statistics per sample id, of the numbers and of the losses.
        open_step: the micro-batches of the step under way.
        noise, shared: the gradient noise scale, and whose samples are in the gradient; None where there is none.
        doubts: why passes are not proved.
        unproved: what a failed proof takes back.
        listeners: are told of the samples of every step.
        in_parts: what ranks that hold parts of samples' gradients have not added up; None where this one has whole
            ones. Then the distributions are those of its parts, and the scores those of what was added up.
        parts: the ranks that hold such parts, also in a copy, which has nothing to add up.
    """

    def __init__(self, columns: int, make_scores: Callable[[], Scores]) -> None:
        self.columns, self._make_scores = columns, make_scores
        self.blocks = 1
        self.steps = self.dropped = 0
        self.distributions = BlockWindow(0, 1)
        self.scores: Any = make_scores()
        self.loss_scores = SampleScores()
        self.open_step = OpenStep(None, make_scores)
        self.noise: NoiseScale | None = None
        self.shared: SharedGradient | None = None
        self.doubts, self.unproved = Doubts(1), Unproved(1)
        self.listeners: list[StepListener] = []
        self.in_parts: PartRows | None = None
        self.parts: PartRanks | None = None

    def prepare(self, blocks: int) -> None:
        """Consist of so many blocks; listeners of before hear no more."""
        self.blocks, self.listeners = blocks, []
        self.doubts, self.unproved = Doubts(blocks), Unproved(blocks)

    def begin(self, layers: int, parts: PartRanks | None, *, anew: bool, noise: bool) -> None:
        """Take numbers of so many layers; start `anew` where they are others than before.

        Args:
            parts: the ranks that hold parts of samples' gradients; None where this one has whole ones.
            noise: :meth:`estimate_noise` follows. Else there is none, also where there was one in a Monitor before.
        """
        anew |= self.parts is not None and self.in_parts is None  # a copy lacks what makes its window whole
        anew |= self.distributions.blocks != self.blocks  # of a Monitor before, with other windows
        self.parts = parts
        if parts is None:
            self.in_parts = None
        elif anew or self.in_parts is None or self.in_parts.ranks != parts:
            before, self.in_parts = self.in_parts, PartRows(parts, layers + 1, self.blocks)
            self.in_parts.go_on_scoring(before)
        else:
            self.in_parts.ranks = parts  # whose process group may be another one
        if anew or not self.distributions.open:
            self.distributions, self.noise = BlockWindow((layers + 1) * self.columns, self.blocks), None
        self.noise, self.shared = self.noise if noise else None, None
        self.open_step = OpenStep(None, self._make_scores, in_parts=parts is not None)

    def estimate_noise(
        self,
        model: nn.Module | None,
        layers: LayerIndex,
        measured: Callable[[], Mapping[str, nn.Parameter]],
        *,
        apart: bool,
    ) -> None:
        """Estimate the noise scale; `measured` returns the parameters, `apart`: each rank trains a model of its own."""
        model = None if model is None else outermost(model)
        sums = NoiseSums(layers, measured, Reduction(model))
        places = len(layers.layers) + 1
        self.noise = self.noise or NoiseScale(places)
        numbers = [layers.number[layer] for layer in layers.layer_of.values()]
        parts = None if self.in_parts is None else self.in_parts.ranks
        self.shared = SharedGradient(model, sums, numbers, places, apart, self.steps, parts)
        self.open_step = OpenStep(sums, self._make_scores, in_parts=parts is not None)

    def unlike(self, *, lacks: bool) -> str:
        """Return words on another one, where only one of the two has a noise scale, with what to do; `lacks`: this one
        was to have it."""
        if self.noise is not None:
            return (
                "has none, since it was made with noise_scale=False or under Alarms(per_sample=...), and this metric "
                "has a noise scale; pass noise_scale=False, or such Alarms, here too"
            )
        if lacks:
            return (
                "has a noise scale, and this metric has none under Alarms(per_sample=...); make the Monitor with "
                "Alarms that have no per_sample="
            )
        return "has a noise scale, and this metric has none; make it without noise_scale=False"

    # ---- what passes and steps bring

    def take_in(self, batch: MicroBatch) -> None:
        """Take in a micro-batch, whatever becomes of its step."""
        into = self._intake()
        into.take_in(batch)
        self._keep(into)

    def _intake(self) -> Intake:
        rows: list[PassRows] | None = None if self.in_parts is None else []
        return Intake(self.distributions.open, self.scores, self.loss_scores, rows)

    def _keep(self, into: Intake) -> None:
        """Keep what has to be added up over ranks."""
        for rows in into.rows or ():
            assert self.in_parts is not None
            self.in_parts.add(rows)

    def score(self) -> None:
        """Take into the scores what ranks have added up since."""
        if self.in_parts is not None:
            self.in_parts.score(self._score)

    def read_scores(self) -> None:
        """Do so for a user who reads them, with a warning where they lack some."""
        self.score()
        if self.in_parts is not None and (lost := self.in_parts.tell_lost()):
            warnings.warn(lost, stacklevel=3)

    def _score(self, rows: PassRows) -> None:
        assert rows.ids is not None
        self.scores.observe(rows.ids, rows.norms())
        if rows.losses is not None:
            self.loss_scores.observe(rows.ids, rows.losses)

    def hold(self, batch: MicroBatch) -> None:
        """Hold a micro-batch until its step is made."""
        self.open_step.add(batch, len(self.distributions.open))

    def finish_step(self, doubt_of: Callable[[Sequence[MicroBatch]], str], *, wanted: bool) -> bool:
        """Take in the micro-batches of a step that was made, and return whether there were any.

        Args:
            doubt_of: returns why their numbers are not known or not proved.
            wanted: the step was to be recorded.
        """
        recorded = bool(self.open_step)
        if recorded and self.listeners:
            batches = self.open_step.batches()
            doubt = doubt_of(batches)
            for listener in self.listeners:
                listener.step_samples(batches, doubt)
        into = self._intake()
        self.open_step.take_into(into)
        self._keep(into)
        if self.noise is not None and self.shared is not None:
            self.shared.finish(self.noise, recorded, wanted)
        self.steps += 1
        return recorded

    # ---- what is proved

    def mark(self) -> None:
        """Note that everything so far is right."""
        self.score()
        if self.in_parts is not None:
            self.in_parts.mark()
        self.unproved.mark(self.distributions, self.scores, self.noise)
        if self.shared is not None:
            self.shared.mark()
        for listener in self.listeners:
            listener.samples_proved()

    def take_back(self, reason: str) -> int:
        """Take back everything since the last mark; return how many samples that were."""
        count, self.noise = self.unproved.take_back(reason, self.distributions, self.scores, self.open_step)
        if self.in_parts is not None:
            self.in_parts.take_back(self._score)
        if self.shared is not None:
            self.shared.take_back(f"samples of it were taken back: {reason}")
        for listener in self.listeners:
            listener.samples_taken_back(reason)
        return count

    # ---- windows

    def merged(self) -> Block:
        """Return the distributions of all blocks, those in total last."""
        return self.distributions.merged()

    def reset(self) -> None:
        """Start a new window."""
        self.distributions.reset()
        if self.in_parts is not None:
            self.in_parts.reset()
        self.doubts.reset()
        self.unproved.reset()
        self._start_block()

    def advance(self) -> None:
        """Slide the window by a block; the noise scale's window is the open block, its moving average goes on."""
        self.distributions.advance()
        if self.in_parts is not None:
            self.in_parts.advance()
        self.doubts.advance()
        self.unproved.advance()
        self._start_block()

    def _start_block(self) -> None:
        if self.shared is not None:
            self.shared.reset(self.steps)
        if self.noise is not None:
            self.noise.reset()
        if self.open_step.sums is not None:
            self.open_step.sums.reset()

    def merge(self, other: SampleWindow) -> None:
        """Add another one of the same layers, as good as proved."""
        if self.noise is not None and other.noise is not None:
            self.noise.merge(other.noise)
            self.unproved.merge(other.noise)
        if self.shared is not None:
            self.shared.interrupt("another window was merged into this one, without its single steps")
        self.distributions.merge(other.distributions)
        self.doubts.merge(other.doubts)
        self.scores.merge(other.scores)
        self.loss_scores.merge(other.loss_scores)
        self.dropped += other.dropped

    def apart(self) -> SampleWindow:
        """Return what a copy or a pickle of the metric has: the same numbers without the step under way."""
        self.score()
        found = copy.copy(self)
        found.in_parts = None
        found.shared, found.listeners, found.open_step = None, [], OpenStep(None, self._make_scores)
        return found

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return its numbers: tensors, numbers and strings only."""
        self.score()
        return {
            "steps": self.steps,
            "dropped": self.dropped,
            **self.distributions.state_dict(),
            "doubts": self.doubts.state(),
            "taken_back": self.unproved.taken_back.state(),
            "noise": self.noise.state_dict() if self.noise is not None else {},
            "shared": self.shared.state_dict() if self.shared is not None else {},
            "scores": self.scores.state_dict(),
            "loss_scores": self.loss_scores.state_dict(),
            "in_parts": {} if self.in_parts is None else self.in_parts.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], layers: int, unlike: str) -> None:
        """Go on from a state. Where it does not fit, raise a ValueError and change nothing.

        Args:
            layers: how many there are.
            unlike: words on a state, where only one of the two has a noise scale.
        """
        steps, dropped = checked_count(state, "steps"), checked_count(state, "dropped")
        distributions = self.distributions.loaded(state)
        doubts = {key: state.get(key, []) for key in _DOUBTS}  # a state of an earlier lipcore has none
        for each in doubts.values():
            self.doubts.checked(each)
        in_parts = state.get("in_parts", {})  # the same
        check_part_rows(in_parts, self.in_parts)
        scores = self._make_scores()
        noise = state.get("noise")
        if not isinstance(noise, dict) or bool(noise) != (self.noise is not None):
            raise ValueError(f"noise: the state {unlike}")
        shared = checked_shared(state.get("shared"), layers + 1)
        with under_key("scores"):
            scores.load_state_dict(state.get("scores"))  # type: ignore[arg-type]
        loss_scores = SampleScores()
        with under_key("loss_scores"):
            loss_scores.load_state_dict(state.get("loss_scores"))  # type: ignore[arg-type]
        if self.noise is not None:
            with under_key("noise"):  # last: it checks itself wholly, then takes over
                self.noise.load_state_dict(noise)
        self.distributions, self.scores, self.loss_scores = distributions, scores, loss_scores
        self.steps, self.dropped = steps, dropped
        self.doubts.load(doubts["doubts"])
        self.unproved.taken_back.load(doubts["taken_back"])
        if self.in_parts is not None:
            self.in_parts.load_state_dict(in_parts)
        self.mark()
        if self.shared is not None and self.noise is not None:
            self.shared.load(self.steps, shared, bool(self.noise.steps))

    def share(self, held: Callable[[], Sequence[tuple[str, str, Any]]], place: Place) -> dict[str, Any]:
        """Return what its steps add to the noise scale of all ranks; `held` returns name, layer and tensor of
        parameters."""
        return {} if self.shared is None else self.shared.share(held(), self.steps, place)

    def empty_state(self, rest: dict[str, Any]) -> dict[str, Any]:
        """Return a state without samples. The averages of the noise scale go on from the last window that is that of
        all ranks; the open window's begins anew, since it is made of the steps of all ranks."""
        state = {**rest, "dropped": 0, "scores": self._make_scores().state_dict(), **empty_blocks(rest)}
        state |= {key: [] for key in _DOUBTS} | {"in_parts": {}}
        state["loss_scores"] = SampleScores().state_dict()
        if rest["noise"]:
            state |= noise_of_all(rest["noise"], rest["shared"], rest["share"], rest["steps"], alone=rest["alone"])
        return {**state, "share": {}}

    def add_states(self, begin: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the state with the samples of all of these."""
        dropped = sum(state["dropped"] for state in others)
        shared = with_steps(begin["shared"], [state["share"] for state in others if state["share"]])
        found = {"dropped": dropped, "shared": shared}
        found |= {key: added_doubts([state.get(key, []) for state in others]) for key in _DOUBTS}
        found |= self.added_scores(others)
        return {**begin, **found, **added_blocks([begin, *others])}

    def added_scores(self, others: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the scores of all of these states, as a state has them."""
        found = {}
        for key, make in (("scores", self._make_scores), ("loss_scores", SampleScores)):
            scores = make()
            for state in others:
                if state.get("in_parts", {}).get("place"):
                    continue  # another rank has the scores of the same samples
                one = make()
                one.load_state_dict(state[key])
                scores.merge(one)  # type: ignore[arg-type]
            found[key] = scores.state_dict()
        return found

    def settle(self) -> None:
        """Take into the noise scale the steps that other ranks have made, in the one process that goes on from all of
        them."""
        if self.shared is not None and self.noise is not None:
            self.shared.settle(self.noise, self.open_step.sums)
