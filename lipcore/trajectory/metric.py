"""The Trajectory metric: what users see."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lipcore.distributed.group import AUTO
from lipcore.distributed.partners import Partners
from lipcore.distributed.rank_axis import Place
from lipcore.distributed.shares import Shares
from lipcore.metric.host_reads import OnDevice
from lipcore.metric.merging import merge_open
from lipcore.metric.plan_lines import PlanLines
from lipcore.metric.protocol import Metric, Needs, PlanLine
from lipcore.metric.rank_part import FSDP1_PIECES, Holding, RankPart
from lipcore.metric.rank_states import RankStates
from lipcore.metric.results import MetricResult
from lipcore.metric.state import check_same, under_key
from lipcore.models.arguments import check_count
from lipcore.models.ranks import is_fsdp1, under_process_group, world_size
from lipcore.trajectory.building import ALL, Built, Stat, Wanted, build, checked_stats
from lipcore.trajectory.gradient_norms import BEFORE
from lipcore.trajectory.groups import Groups, by_block
from lipcore.trajectory.mode import Choice, Mode, Source, check_splits, choose
from lipcore.trajectory.module_links import ModuleLinks
from lipcore.trajectory.parameters import (
    Masters,
    Model,
    WatchedParameter,
    find_watched,
    of_modules,
    piece_of,
    values_of,
)
from lipcore.trajectory.rank_part import TrajectoryPart, part_of
from lipcore.trajectory.results import add_quantities, plan_lines
from lipcore.trajectory.saved import check_pieces, prepared_loads
from lipcore.trajectory.saved_ranks import (
    ANEW,
    added_up,
    counters_of,
    in_parts,
    in_whole,
    joined,
    nothing_of,
    paths_before,
    shares_of,
    split,
)
from lipcore.trajectory.shard_sums import ShardSums
from lipcore.trajectory.single_steps import SingleSteps
from lipcore.trajectory.sketch_history import SketchHistory
from lipcore.trajectory.sketch_part import SketchPart, kept_part
from lipcore.trajectory.sketch_places import first_indices
from lipcore.trajectory.sketch_tracker import SketchTracker
from lipcore.trajectory.step_ring import StepHistory
from lipcore.trajectory.step_stream import OnStep, checked_callback
from lipcore.trajectory.table import points_of
from lipcore.trajectory.tracker import Tracker
from lipcore.trajectory.trouble import Trouble
from lipcore.trajectory.update_tracker import UpdateTracker
from lipcore.trajectory.whole import PathSoFar

_ONLY_NUMBERS = (
    "this Trajectory is a copy, which holds the numbers of compute() and no model; to go on, make a new Trajectory and "
    "load_state_dict() of the original"
)


_SPLIT = "split_replicas has each rank keep other parameters"
_NONE_TO_SHARE = (
    "split_replicas: with group=None each rank trains a model of its own, which no other rank holds; leave it out"
)
_OTHER_SHARES = (
    "{0}: the state was saved by {1} ranks of which each kept its share of the parameters (split_replicas), or all of "
    "them, and {2} has another share now. Load it with as many ranks, and with split_replicas as it was{3}"
)

_NOT_ALL = (
    "ranks: this is what one of {0} ranks has written by itself, and parameters were or are in parts. Load a "
    "checkpoint that all of them have saved together (torch.distributed.checkpoint), or on each rank the file that it "
    "has written"
)


def _held(parameters: Sequence[WatchedParameter]) -> list[tuple[str, str, Tensor]]:
    """Return name, group and tensor of parameters that this rank holds. A window that waits has those of its time,
    whatever is watched by now."""
    return [(one.name, one.group, one.owner[one.key]) for one in parameters]


class Trajectory(Metric):
    r"""Statistics of the path that the parameters take through training, kept as the run goes.

    They are given for every parameter, for every group and in total. Let w_t be the parameters after step t, w_0 the
    reference point (their values when the metric was bound to the model, or those of :meth:`set_reference`), and n the
    number of steps in the window:

    * ``update_norm`` :math:`\|w_t - w_{t-1}\|` and ``update_ratio`` :math:`\|w_t - w_{t-1}\| / \|w_t\|` (last, mean,
      max, p50, p99); ``max_abs_update`` (last, max); ``weight_norm`` (last)
    * ``path_length`` :math:`\sum_t \|w_t - w_{t-1}\|`, over the window (sum) and since the reference (cumulative). With
      `every_steps` > 1 it is called ``chord_length``: it is then a lower bound of the path length, and no factor
      corrects it
    * ``distance`` :math:`\|w_t - w_0\|`, and ``directness``, the distance over the cumulative path length (last)
    * ``variance`` :math:`\frac{1}{n+1} \sum_{t=0}^{n} \|w_t - \bar w\|^2` over the window's n + 1 points, its start
      included (Corollary 2 of Loukas et al., NeurIPS 2021). A sliding window that has lost its first block has the n
      points after its steps. The value's count is the number of points
    * ``unmoved_steps``: steps in which not one element changed; ``nonfinite_steps`` and ``nonfinite_elements`` (sum)
    * ``grad_norm``: the norm of the batch's gradient as the backward pass left it, where a Monitor or
      :meth:`observe_gradients` says when that is
    * of an optimizer's state, by tensor, with ``source="optimizer"``: ``normalized_update_rms`` of Adam and AdamW,
      :math:`\sqrt{\mathrm{mean}(u^2)}` of :math:`u = \hat m / (\sqrt{\hat v} + \epsilon)`; ``momentum_norm``, of the
      first moment or of the buffer of momentum; ``second_moment_norm`` (last, mean, max)
    * on request, by `stats`: ``rms_t`` of Adam and AdamW, :math:`\sqrt{\mathrm{mean}(g^2 / \max(\hat v, \epsilon^2))}`
      of the gradient that the optimizer finds, with the second moment :math:`\hat v` after the step, without its bias
      (Wortsman et al., NeurIPS 2023), from ``source="optimizer"``; ``clipped_grad_norm``, that of the gradient as the
      optimizer got it; ``element_variance`` (see :meth:`element_variance`)

    The norm of a group is that of its parameters taken together. A parameter with NaN or infinite elements is left out
    of that step and counted, and those elements stand still: they count as what they last were, in the variance of that
    step as in the next update. Nothing is divided by a learning rate. The loss reduction matters only as far as it
    changes the updates.

    `mode` chooses what is kept of the parameters, and :meth:`plan` says how many bytes that takes:

    * ``"exact"``: three copies of each parameter (the previous one and the reference in its own dtype, the mean in
      float32), and a fourth one (float64) once a window is longer than 512 steps.
    * ``"sketch"``: a CountSketch of `buckets` float64 numbers per group. Norms, path length, distance, variance and
      ``update_cosine`` (the cosine between successive updates) follow from it with a standard error (``Value.error``),
      per group and in total, not per parameter.
    * ``"updates"``: nothing. The update comes from `source`; distance, directness and variance are not known.
    * ``"auto"``: exact where that fits `memory_budget`, else the largest sketch that does.

    Args:
        model: a module, whose trainable parameters are looked up at every step, so that replaced ones, and those of
            replaced modules, are seen; a dict of modules; or an iterable of (name, tensor), which stands for those very
            tensor objects and not for what replaces them.
        groups: a function from parameter name to group name, default :func:`lipcore.by_block`; or a dict {group:
            regular expression}. The first expression that is found in the name counts; a name that matches none belongs
            to "other".
        stats: which quantities to report; default all but those on request.
        every_steps: look only at every k-th step.
        window_blocks: of how many blocks a sliding window consists; :meth:`advance` slides it by one block. Each block
            keeps a mean (float32) per parameter.
        ring: how many recent steps are kept one by one for :meth:`drain`.
        on_step: see :attr:`on_step`.
        mode: see above; default "exact", or "updates" when `source` is one that needs no copies.
        source: where updates come from: "difference" of stored copies or sketches; "optimizer", recomputed from the
            state of torch.optim.SGD, Adam or AdamW; "snapshot", a copy that lives only during the steps that are looked
            at; "explicit", given to :meth:`update`; "auto": the difference, or in mode "updates" the optimizer, or a
            snapshot where that has no closed form.
        optimizer: for a metric that stands alone; a Monitor passes its own.
        masters: float32 master copies of half-precision parameters, {name: tensor} or a function of (name, parameter);
            they are measured in place of the parameters.
        buckets, seed: of the sketch; a power of two from 256 to 65536. The relative standard deviation of a squared
            norm is at most sqrt(2 / (buckets * groups)).
        keep_every, keep_limit: keep the sketch of every so many steps, and at most so many sketches: see
            :attr:`sketches`.
        memory_budget: bytes, for mode "auto".
        split_replicas: the ranks that hold parameters alike (DDP, HSDP) share them: each keeps copies of its share and
            measures that alone, so memory and work fall by their number. Whole parameters go to a rank, so that all
            have about as many elements. This rank's own window has its share, and no more; the windows of all ranks
            (:meth:`lipcore.Monitor.global_window`, :meth:`sync`) are as without. For modes "exact" and "updates".

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> trajectory = Trajectory(layer)
    >>> with torch.no_grad():
    ...     _ = layer.weight.add_(torch.tensor([3.0, 4.0]))
    >>> trajectory.update()
    >>> round(trajectory.compute().path_length["total"].sum.value, 5)
    5.0
    """

    name = "trajectory"
    counts_samples = False
    _version = 3

    def __init__(
        self,
        model: Model | None = None,
        *,
        groups: Groups = by_block,
        stats: Iterable[Stat] | None = None,
        every_steps: int = 1,
        window_blocks: int = 1,
        ring: int = 1024,
        mode: Mode | None = None,
        source: Source = "auto",
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        masters: Masters | None = None,
        buckets: int = 4096,
        seed: int = 0,
        keep_every: int | None = None,
        keep_limit: int = 1000,
        memory_budget: int | None = None,
        split_replicas: bool = False,
        on_step: OnStep | None = None,
    ) -> None:
        check_count("every_steps", every_steps)
        check_count("window_blocks", window_blocks)
        check_count("ring", ring, 512)
        check_count("keep_every", keep_every, optional=True)
        check_count("keep_limit", keep_limit)
        if not (callable(groups) or isinstance(groups, Mapping)):
            raise TypeError(f"groups: expected a callable or a dict of expressions, got {type(groups).__name__}")
        names = None if stats is None else checked_stats(stats)
        choice = Choice(mode, source, buckets, seed, memory_budget)
        choice.check()
        if not isinstance(split_replicas, bool):
            raise TypeError(f"split_replicas: expected True or False, got {split_replicas!r}")
        if split_replicas:
            check_splits(choice)
        self._shares = Shares() if split_replicas else None
        self._wanted = Wanted(names, choice, ring, keep_every, keep_limit)
        self._groups, self._masters = groups, masters
        self.reads_masters = masters is not None
        self.every_steps, self._window_blocks = every_steps, window_blocks
        self._optimizers: list[Optimizer] = []
        self._given_optimizer = optimizer
        self._scaler: Any = None
        self._watched: list[WatchedParameter] = []
        self._all: list[WatchedParameter] = []  # with those that are left to ranks that hold them too
        self._numbers: MetricResult | None = None  # of a copy, which has nothing else
        self._built = Built(choice, {}, None)  # until it is bound
        self._single = SingleSteps(on_step)
        self._steps_seen = self._rebased = 0
        self._skipped: deque[int] = deque([0], maxlen=window_blocks)  # steps that a GradScaler skipped, by block
        #: After how many of the window's steps something else changed the parameters: the last two such places, since
        #: the last one may be the window's end.
        self._jumps: list[int] = []
        self._late_moves = 0  # of the window's steps: after how many the parameters moved once more
        self._apart = ""  # by what the distance is not between the ends of the path since the reference
        self._trouble = Trouble()
        self._path_so_far = PathSoFar()
        self._carried: ShardSums | None = None  # steps of the open window that ranks with other parts have made
        self._partners: dict[Any, Partners] = {}  # of sync(), by what was asked for
        if model is not None:
            self.bind(model)

    # ---- binding

    def prepare(self, optimizers: Sequence[Optimizer], scaler: Any, window_blocks: int) -> None:
        """Take the optimizers, the GradScaler and the blocks per window of the Monitor."""
        self._refuse_bound()  # before anything of it changes
        if self._window_blocks not in (1, window_blocks):
            raise ValueError(
                f"window_blocks: the Monitor slides its windows, with {window_blocks} blocks; set it there alone, not "
                f"to {self._window_blocks} here"
            )
        self._optimizers, self._scaler, self._window_blocks = list(optimizers), scaler, window_blocks
        self._skipped = deque([0], maxlen=window_blocks)

    def bind(self, model: Model) -> None:
        """Take the reference point."""
        self._refuse_bound()
        if self._given_optimizer is not None:
            given = self._given_optimizer
            self._optimizers = [given] if isinstance(given, Optimizer) else list(given)
        # An iterator is read once, a rebind() later must find the same pairs.
        self._model = list(model) if isinstance(model, Iterator) else of_modules(model)
        self._build(find_watched(self._model, self._groups, self._masters, self.prefix))

    def _refuse_bound(self) -> None:
        if self._numbers is not None:
            raise RuntimeError(_ONLY_NUMBERS)
        if self._watched:
            raise RuntimeError("this Trajectory is bound to a model already; make one Trajectory per model")

    def _build(self, held: list[WatchedParameter]) -> None:
        watched, wanted = self._share_of(held), self._wanted
        if self._shares is not None:  # the same on all ranks, whatever their shares
            choice = choose(wanted.choice, held, self._optimizers, self._window_blocks)
            wanted = replace(wanted, choice=choice)
        mine = {one.name for one in watched}
        others = [one for one in held if one.name not in mine]
        self._built = build(wanted, watched, self._optimizers, self._window_blocks, others)
        self._all, self._watched, self._links = held, watched, ModuleLinks(self._model)
        self._shapes = [one.tensor.shape for one in held]
        self.keeps_parts = len(watched) < len(held)
        self._pieces = [piece_of(one.owner[one.key]) for one in watched]
        kept = None
        if self.keeps_parts:
            self._pieces = [piece or "all, for several ranks" for piece in self._pieces]
            kept = mine
        self._jumps = []
        fsdp1 = isinstance(self._model, nn.Module) and is_fsdp1(self._model)
        self._holding = Holding(partial(_held, held), FSDP1_PIECES if fsdp1 else "", kept)
        self._single.start(self._built)

    def _share_of(self, held: list[WatchedParameter]) -> list[WatchedParameter]:
        """Return those of the parameters here that this rank keeps, where ranks share them."""
        if self._shares is None:
            return held
        if self.ranks_apart and world_size() > 1:
            raise ValueError(_NONE_TO_SHARE)
        group = (self.partners or self._partners_of(AUTO, 60)).find()
        mine = self._shares.mine([(one.name, one.owner[one.key]) for one in held], group)
        return [one for one in held if one.name in mine]

    def _follow(self) -> None:
        """Go on with the parameters of modules that were replaced, as with replaced parameters: what lies between them
        is an update."""
        watched = find_watched(self._model, self._groups, self._masters, self.prefix)
        names, shapes = ([one.name for one in members] for members in (watched, self._all)), self._shapes
        if len({tuple(found) for found in names}) > 1 or [one.tensor.shape for one in watched] != shapes:
            raise ValueError(
                "trajectory: a module was replaced by one with other parameters, which no state fits; call rebind()"
            )
        state, steps = self.state_dict(), self._single.before
        self._build(watched)
        self.load_state_dict(state)
        self._single.before = steps

    @property
    def _tracker(self) -> Tracker:
        """The tracker that knows where the parameters are; without one, the tracker of updates."""
        return self._built.main

    def rebind(self) -> None:
        """Look at the model anew after parameters were added, removed, resized, frozen, unfrozen, or changed dtype or
        device. A new window starts; the path since the reference, and the reference and statistics of parameters that
        kept their shape and dtype, go on; others start from now. Where ranks hold parts of parameters, or share them
        (`split_replicas`), windows of all ranks have no path since the reference from then on.

        Raises:
            ValueError: split_replicas, and nothing of some rank's share is left; on all ranks, and nothing changes.
        """
        self._require_bound()
        self.flush()
        before = self._built.trackers
        self._single.before += int(next(iter(before.values())).table.cursor[0])
        steps, rebased = self._steps_seen, self._rebased
        self._build(find_watched(self._model, self._groups, self._masters, self.prefix))
        for key, tracker in self._built.trackers.items():
            if key in before:
                tracker.inherit(before[key])
            if self._shares is not None and world_size() > 1:  # a group may have had members on other ranks
                tracker.forget_path()
        self._path_so_far = PathSoFar()  # that counts in steps of the trackers before; windows that wait have it
        self._steps_seen, self._rebased = steps, rebased
        self._trouble.forget()

    # ---- the hot path

    def needs(self) -> Needs:
        """Say what it looks at, and when."""
        # Read in each optimizer's own hook: its state and gradients, and a GradScaler's verdict, are there alone.
        each = len(self._optimizers) > 1 or self._scaler is not None
        reads_state = self._built.choice.source == "optimizer" or self._built.unexplained is not None
        return Needs(
            gradients=self._reads_gradients,
            before_step=self._built.choice.source == "snapshot",
            used_gradients=self._built.gradients is not None,
            each_optimizer=reads_state and each,
            at_step=reads_state,
        )

    @property
    def _reads_gradients(self) -> bool:
        return self._built.gradients is not None and BEFORE in self._built.gradients.trackers

    def observe_gradients(self) -> None:
        """Take the gradients as they are now, after backward and before clipping, for ``grad_norm``. A Monitor with an
        optimizer calls it; stand-alone, call it yourself."""
        self._require_bound()
        if self._built.gradients and self._due:
            scale = self._scaler._scale if self._scaler is not None and self._scaler.is_enabled() else None
            self._built.gradients.observe_before_clipping(1.0 if scale is None else scale)

    @property
    def _due(self) -> bool:
        return (self._steps_seen + 1) % self.every_steps == 0

    @property
    def knows_rms_t(self) -> bool:
        """True where `stats` asks for rms_t."""
        return "rms_t" in (self._wanted.stats or ())

    @property
    def why_no_rms_t(self) -> str:
        """Reason why rms_t has no number of any parameter, once bound; "" where some has one."""
        updates = self._built.trackers.get("updates")
        has = isinstance(updates, UpdateTracker) and updates.has_second_moments
        return "" if has else "no parameter's optimizer keeps a second moment (SGD has none)"

    def observe_late_move(self) -> None:
        """Count a step that was read before the parameters had come to rest."""
        self._late_moves += 1

    def before_step(self) -> None:
        """Copy the parameters right before the optimizer's step, where the source of updates is a snapshot."""
        for tracker in self._built.trackers.values() if self._due else ():
            tracker.before_step()

    def observe_used_gradients(self, optimizer: Optimizer) -> None:
        """Take the gradients as the optimizer's step uses them, for ``clipped_grad_norm``."""
        if self._built.gradients and self._due:
            self._built.gradients.observe_used(optimizer)

    def after_step_of(self, optimizer: Optimizer) -> None:
        """Take the update that one of several optimizers has made."""
        tracker = self._built.trackers.get("updates")
        if isinstance(tracker, UpdateTracker) and self._due:
            tracker.after_step_of(optimizer)
        if self._built.unexplained is not None and self._due:
            self._built.unexplained.after_step_of(optimizer)

    def observe_step(self) -> None:
        """Take the parameters as they are now for the next point of the trajectory."""
        if self._due:
            if not self._links.are_intact():
                self._follow()
            if self._built.unexplained is not None:
                self._built.unexplained.observe()
            for tracker in self._built.trackers.values():
                if tracker.step():  # raises before anything has changed
                    tracker.settle()
            if self._built.gradients:
                self._built.gradients.observe_step()
            self._single.step()
        self._steps_seen += 1

    @property
    def step_call(self) -> Callable[[], object]:
        """A function that does what :meth:`observe_step` does, without a look at the ways that are not taken."""
        self._require_bound()
        if self.every_steps != 1 or list(self._built.trackers) != ["exact"] or self._built.unexplained is not None:
            return self.observe_step
        tracker, step, gradients = self._tracker, self._tracker.step, self._built.gradients
        intact = self._links.are_intact

        def call() -> None:
            nonlocal tracker, step, gradients, intact
            if not intact():
                self._follow()
                tracker, step, gradients = self._tracker, self._tracker.step, self._built.gradients
                intact = self._links.are_intact
            if step():  # raises before anything has changed
                tracker.settle()
            if gradients is not None:
                gradients.observe_step()
            self._single.step()
            self._steps_seen += 1

        return call

    def observe_skipped_step(self) -> None:
        """Count a step that a GradScaler skipped, in the window in which that was found out."""
        self._skipped[-1] += 1

    def settle(self) -> None:
        """Close the open block of every parameter."""
        self._tracker.settle()

    def update(self, updates: Mapping[str, Tensor] | None = None) -> None:
        """Observe a step, when the metric stands alone: call this after every optimizer step and before zero_grad.

        Args:
            updates: with ``source="explicit"``, what was added to every parameter, by name.

        Raises:
            RuntimeError: not bound to a model.
            ValueError: a parameter was removed, or no longer fits its state (shape, dtype, device, layout); nothing was
                updated then.
        """
        self._require_bound()
        self._raise_error()
        explicit = self._built.choice.source == "explicit"
        if explicit != (updates is not None):
            raise ValueError(
                f"updates: {'expected a dict of update tensors' if explicit else 'only for source=explicit'}, got "
                f"{type(updates).__name__}"
            )
        if updates is not None:
            self._built.trackers["updates"].give(updates)  # type: ignore[attr-defined]
        if self._built.gradients and self._due:
            self._built.gradients.observe_used()
        self.observe_step()

    def __enter__(self) -> Trajectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rebase(self) -> None:
        """Go on from where the parameters are now, after something else than a step has changed them (weights
        loaded, an average of weights swapped in). A Monitor does this by itself after `load_state_dict`."""
        self._require_bound()
        if self.before_moves is not None:
            self.before_moves()
        jumps = [tracker.rebase() for tracker in self._built.trackers.values()]
        if self._built.unexplained is not None:
            self._built.unexplained.begin()
        if any(jumps):
            self._apart = self._apart or "rebase"
            self._jumps = sorted({*self._jumps, self._tracker.window_steps})[-2:]
        self._rebased += 1

    def set_reference(self, reference: nn.Module | Mapping[str, Tensor] | None = None) -> None:
        """Measure distance, and path length since the reference, from another point: from now, from another model's
        parameters, or from those in a state_dict.

        Offsets are kept in float32 from the reference: the variance of a trajectory that stays x standard deviations
        away from it has a relative error of about 1e-7 x.

        Raises:
            ValueError: in mode "updates"; or a parameter is missing there, of another shape or not finite.
        """
        self._require_bound()
        tracker = self._tracker
        if tracker.copies is None:
            raise ValueError("reference: mode 'updates' keeps no reference point; use mode 'exact' or 'sketch'")
        here = {parameter.own_name: parameter.tensor for parameter in self._watched}
        values = values_of(here if reference is None else reference, self._watched, "reference")
        tracker.set_reference(values)
        self._apart = "" if all(map(torch.equal, values, here.values())) else "set_reference"

    def __getstate__(self) -> dict[str, Any]:
        """Make what a copy or a pickle has: as it is before it is bound, then the open window's numbers and nothing
        else."""
        if not self._watched:
            return self.__dict__
        nothing: dict[str, Any] = {"_watched": [], "_all": [], "_model": None, "_masters": None, "partners": None}
        nothing |= {"_built": Built(self._built.choice, {}, None), "_single": SingleSteps(None)}
        nothing |= {
            "_holding": None,
            "_partners": {},
            "_optimizers": [],
            "_given_optimizer": None,
            "_scaler": None,
            "_groups": by_block,
        }
        return self.__dict__ | nothing | {"_numbers": self.finalize()}

    # ---- single steps

    @property
    def on_step(self) -> OnStep | None:
        """A callback ``on_step(first_step, arrays)`` for the steps from now on, each once and in order, in blocks of at
        least 64 (from a CUDA device 256, one block later); what is left comes with :meth:`flush`, :meth:`close`,
        :meth:`state_dict` and the close of a Monitor.

        ``first_step`` is the number of the block's first step, from 1; ``arrays`` a dict of float64 arrays [steps,
        places] with "update_norm", "weight_norm" (after the step), "grad_norm" and "clipped_grad_norm", NaN where a
        step has none, with "rms_t" where `stats` has it, and with "normalized_update_rms" where alarms look at an
        optimizer's state; ``arrays.places`` names the columns. The arrays are the
        callback's to keep. No step waits for a device; the callback itself runs in the training thread. What it raises
        is kept and raised by your next call, a warning says so, and it is not called any more.
        """
        return self._single.on_step

    @on_step.setter
    def on_step(self, on_step: OnStep | None) -> None:
        on_step = checked_callback(on_step)
        self.flush()
        self._raise_error()
        self._single.on_step = on_step
        if self._watched:
            self._single.start(self._built)

    def listen(self, listener: OnStep, *, prompt: bool = False) -> None:
        """Call this too for the steps from now on, as `on_step` is and before it, without its being the user's; a
        `prompt` one as soon as it costs little, and not in blocks."""
        self.flush()
        (self._single.prompt if prompt else self._single.listeners).append(listener)
        if self._watched:
            self._single.start(self._built)

    def look_for(self, *, movement: bool, normalized: bool) -> None:
        """Look, once bound, in every step for movement that the optimizers did not make; keep, with
        ``source="optimizer"``, the RMS of normalised updates of each step. One that is bound stays as it is."""
        if not self._watched:
            self._wanted = replace(self._wanted, explains=movement, normalizes=normalized)

    def look_no_more(self) -> None:
        """End the look for movement, whose copies go: no step comes any more, behind a rebind() neither."""
        self._wanted = replace(self._wanted, explains=False)
        if self._built.unexplained is not None:
            self._built.unexplained.end()

    @property
    def checks_movement(self) -> bool:
        """True where some parameter is checked for it."""
        return self._built.unexplained is not None and self._built.unexplained.checked > 0

    @property
    def movement_turns(self) -> int:
        """Number of steps in which each parameter is checked for it once."""
        return 1 if self._built.unexplained is None else self._built.unexplained.turns

    @property
    def why_unchecked(self) -> str:
        """Reasons why parameters are not checked for it, each once; "" where all are."""
        check = self._built.unexplained
        if check is None:
            choice = self._built.choice
            return (
                f"mode {choice.mode!r} with source {choice.source!r} has numbers of groups, not of "
                'parameters; pass metrics=[lipcore.Trajectory()], whose mode is "exact", or Trajectory(mode="updates")'
            )
        return "; ".join(dict.fromkeys(check.why_not.values()))

    def hurry(self) -> None:
        """Hand what waits to the listeners of :meth:`listen` at the next steps, not only when there is a block."""
        self._single.hurry()

    def flush(self) -> None:
        """Hand all steps so far to :attr:`on_step`. Waits for a device."""
        self._single.flush()

    def close(self) -> None:
        """Hand over what is left of the steps and call :attr:`on_step` no more; what it raised is raised here."""
        self._single.stop()
        self._raise_error()

    def take_error(self) -> Exception | None:
        return self._single.take_error()

    def _raise_error(self) -> None:
        error = self.take_error()
        if error is not None:
            raise error

    def compute(self) -> MetricResult:
        self._raise_error()
        return super().compute()

    def _require_bound(self) -> None:
        if self._numbers is not None:
            raise RuntimeError(_ONLY_NUMBERS)
        if not self._watched:
            raise RuntimeError(
                "this Trajectory has no model; pass one to Trajectory(model) or to Monitor(model, metrics=[...])"
            )

    # ---- results

    def plan(self) -> PlanLines:
        """Return what was chosen, the groups, and the bytes of every kind of state."""
        if self._numbers is not None:
            return PlanLines([PlanLine("copy", "holds numbers, and watches nothing")])
        self._require_bound()
        return PlanLines(plan_lines(self._built, self._watched, self._all))

    def on_device(self) -> list[OnDevice]:
        if self._numbers is not None:
            return []
        self._require_bound()
        return [part for tracker in self._built.all_trackers for part in tracker.on_device()]

    def finalize(self) -> MetricResult:
        """Return the open window's numbers; the class's docstring says what they are."""
        if self._numbers is not None:
            return self._numbers
        self._require_bound()
        result = self._empty_result()
        if self.keeps_parts:
            result.details["kept_by_other_ranks"] = len(self._all) - len(self._watched)
        add_quantities(result, self._built, self._stats, self.every_steps)
        self._trouble.look(self._model, self._all, self._tracker, self._built.gradients)
        return result

    @property
    def _stats(self) -> tuple[Stat, ...]:
        return ALL if self._wanted.stats is None else self._wanted.stats

    def _empty_result(self) -> MetricResult:
        """Return the open window's details without its numbers."""
        result = MetricResult(self.name, every_steps=self.every_steps, mode=self._built.choice.mode)
        result.details["source"] = self._built.choice.source
        if self._rebased:
            result.details["rebased"] = self._rebased
        if skipped := sum(self._skipped):
            result.details["skipped_steps"] = skipped
        if self._jumps and any(0 < steps < self._tracker.window_steps for steps in self._jumps):
            result.details["jumped"] = True
        if self._late_moves:
            result.details["moved_after_steps"] = self._late_moves
        if self._apart:
            result.details["distance_apart_by"] = self._apart
        if self._carried is not None:
            result.details["steps_of_other_parts"] = len(self._carried.steps)
        return result

    def rank_part(self) -> RankPart | str:
        """Return what the open window adds to that of all ranks, or why there is nothing to add."""
        if self._numbers is not None:
            return _ONLY_NUMBERS
        return part_of(
            self._built, self._watched, self._stats, self.every_steps, self._holding, self._empty_result(),
            self._path_so_far, self._carried,
        )  # fmt: skip

    def element_variance(self) -> dict[str, Tensor]:
        """Return the variance of every element over the open window's points, 1 / (n + 1) sum (w_t - mean)^2, by
        parameter name (NaN before the first step). It needs ``stats=[..., "element_variance"]``, which keeps one
        more number per element, and two in long windows."""
        self._require_bound()
        copies = self._tracker.copies
        if copies is None or not copies.per_element:
            raise RuntimeError('element_variance: ask for it with stats=["element_variance", ...] in mode "exact"')
        counts = points_of(self._tracker.window_rows()).long().tolist()
        out = {}
        for i, parameter in enumerate(self._watched):
            m2 = self._tracker.merged(i)[1]
            assert m2 is not None
            points = counts[i]
            out[parameter.name] = (m2 / points).clamp(min=0) if points else torch.full_like(m2, torch.nan)
        return out

    def drain(self) -> StepHistory:
        """Return the norms of updates, weights and gradients of every single step since the last call, as far as the
        ring still has them; NaN where a step had no gradient. This waits for the device."""
        self._require_bound()
        self._raise_error()
        self._built.align()
        of_gradients = {stage: tracker.recent for stage, tracker in self._built.of_gradients.items()}
        return self._built.first.drain(of_gradients)

    @property
    def sketches(self) -> SketchHistory:
        """Sketches that were kept, for distances and angles between any two steps."""
        self._require_bound()
        tracker = self._built.trackers.get("sketch")
        if not isinstance(tracker, SketchTracker) or self._wanted.keep_every is None:
            raise RuntimeError('sketches: kept only with mode="sketch" and keep_every=')
        return tracker.history

    def reset(self) -> None:
        """Start a new window at the parameters' last observed values; cumulative path and reference stay."""
        self._require_bound()
        for tracker in self._built.all_trackers:
            tracker.reset()
        self._carried = None
        self._jumps, self._late_moves = [], 0
        self._skipped = deque([0], maxlen=self._window_blocks)

    def advance(self) -> None:
        """Slide the window by a block."""
        self._require_bound()
        before = self._tracker.window_steps if self._jumps else 0
        for tracker in self._built.all_trackers:
            tracker.advance()
        lost = before - self._tracker.window_steps if self._jumps else 0
        self._jumps = [steps - lost for steps in self._jumps if steps > lost]
        self._skipped.append(0)

    # ---- state

    def _settings(self) -> dict[str, Any]:
        choice = self._built.choice
        return {
            "version": self._version,
            "mode": choice.mode,
            "source": choice.source,
            "sketch": [choice.buckets, choice.seed] if choice.mode == "sketch" else [],
            "names": [parameter.name for parameter in self._watched],
            "groups": [parameter.group for parameter in self._watched],
            "every_steps": self.every_steps,
            "window_blocks": self._window_blocks,
            "ring": self._wanted.ring,
            **({"split_replicas": True} if self.keeps_parts else {}),
        }

    @property
    def _numbered(self) -> list[int]:
        """Numbers of the first elements here in sketches of parts; none in others."""
        return first_indices(self._watched) if "sketch" in self._built.trackers and any(self._pieces) else []

    def _check_fits(self, state: Any) -> None:
        check_same(state, self._settings())
        check_pieces(state.get("pieces"), self._pieces, [parameter.name for parameter in self._watched])
        if state.get("numbered", []) != self._numbered:
            raise ValueError("numbered: the state's sketches number the elements of parts in another way; start anew")

    def state_dict(self) -> dict[str, Any]:
        """Return settings, counters, scalars and copies by canonical names: tensors, numbers and strings only."""
        self._require_bound()
        self.flush()
        trackers = {key: tracker.state_dict() for key, tracker in self._built.trackers.items()}
        gradients = self._built.gradients.state_dict() if self._built.gradients else {}
        counts: dict[str, Any] = {"steps_seen": self._steps_seen, "rebased": self._rebased}
        counts |= {"apart": self._apart, "jumps": list(self._jumps), "pieces": list(self._pieces)}
        counts["numbered"] = self._numbered
        counts |= {"so_far": self._path_so_far.state(), "carried": self._carried.state() if self._carried else {}}
        return {**self._settings(), **counts, "trackers": trackers, "gradients": gradients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same model; ValueError naming the first difference, and nothing changed,
        otherwise."""
        self._require_bound()
        self._check_fits(state)
        loads, jumps = prepared_loads(state, self._built)
        so_far, carried = PathSoFar.of_state(state.get("so_far")), self._checked_carried(state.get("carried"))
        for load in loads:
            load()
        self._steps_seen, self._rebased = state["steps_seen"], state["rebased"]
        self._apart, self._jumps = state.get("apart", ""), jumps
        self._path_so_far, self._carried = so_far, carried
        self._single.before = 0  # the state's own numbers
        if self._built.unexplained is not None:
            self._built.unexplained.begin()
        self._single.start(self._built)

    def _checked_carried(self, state: Any) -> ShardSums | None:
        if state == {}:
            return None
        with under_key("carried"):
            found = ShardSums.of_state(state)
            if found.steps.shape[1] != len(self._watched) or found.gradients.keys() != self._built.of_gradients.keys():
                raise ValueError(f"sums: of {found.steps.shape[1]} parameters, and there are {len(self._watched)}")
        return found

    # ---- its state among those of other ranks

    def split_state(self, state: dict[str, Any], place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split its state into copies that lie as the parameters do, and the rest, with what this rank counts of the
        open window."""
        tensors, rest = split(state, self._watched)
        self._built.align()
        share = {"tied": _SPLIT} if self.keeps_parts else None
        rest["share"] = share or shares_of(self._built, self._watched, place, self._carried)
        steps = self._built.first.window_steps
        missed = {stage: steps - found.window_steps for stage, found in self._built.of_gradients.items()}
        if self._carried is not None:
            steps += len(self._carried.steps)
            missed = {stage: count + int(self._carried.no_gradients[stage]) for stage, count in missed.items()}
        whole = not any(self._pieces) and self._carried is None
        rest["window"] = {
            "steps": steps,
            "missed": missed,
            "paths": paths_before(self._built, self._path_so_far, steps, whole),
            "bits": rest["trackers"].get("exact", {}).get("bits", {}),
        }
        return tensors, rest

    def joined_state(self, tensors: Mapping[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in joined(tensors, rest).items() if key not in ("share", "window")}

    def empty_state(self, rest: dict[str, Any]) -> dict[str, Any]:
        """Return what all ranks have alike: where each holds whole parameters, everything."""
        counts = {key: value for key, value in rest.items() if key not in ("trackers", "gradients", "share", "pieces")}
        whole = not any(rest["pieces"]) and not rest["carried"]
        state = {key: value for key, value in rest.items() if key != "share"} if whole else {}
        why = {key: why for key, why in rest["share"].items() if key != "sums"}
        return {**counts, **why, "carried": {}, "counters": counters_of(rest), "whole": state}

    def continues(self, rest: dict[str, Any]) -> bool:
        """Return whether this rank holds the parts of parameters that it held then."""
        return bool(rest.get("pieces") == self._pieces)

    def load_ranks(self, saved: RankStates) -> str:
        """Continue from states that ranks have saved, and return what the open window lacks then; "" for nothing."""
        self._require_bound()
        own, alike = saved.own, saved.alike
        if own is not None and self.continues(own):
            self.load_state_dict(self.joined_state(saved.tensors, own))
            return ""
        if self.keeps_parts or (isinstance(alike, dict) and "split_replicas" in alike):
            raise ValueError(_OTHER_SHARES.format(self.name, saved.ranks, saved.place, ANEW))
        check_same(alike, self._settings())
        assert alike is not None
        if alike.get("whole") and not any(self._pieces):
            self.load_state_dict(self.joined_state(saved.tensors, alike["whole"]))
            return ""
        if not saved.complete:
            theirs = next((state.get("pieces") for state in saved.by_rank.values()), None)
            check_pieces(theirs, self._pieces, [parameter.name for parameter in self._watched])
            raise ValueError(_NOT_ALL.format(saved.ranks))
        if "tied" in alike:
            raise ValueError(
                f"{self.name}: the state was saved by {saved.ranks} ranks that held other parts of the parameters than "
                f"{saved.place} does, and cannot be cut anew: {alike['tied']}. Load it with the ranks, meshes and "
                f"placements of then{ANEW}"
            )
        return self._go_on(saved, alike)

    def _go_on(self, saved: RankStates, alike: dict[str, Any]) -> str:
        """Continue with other parts of the parameters than those that have saved had."""
        window, counters = alike["window"], alike["counters"]
        gone = str(alike.get("gone", ""))
        steps = 0 if gone else window["steps"]
        nothing = nothing_of(steps, len(self._watched), window["missed"])
        sums = nothing if gone else added_up([state["share"] for state in saved.others], nothing)
        here = split(self.state_dict(), self._watched)[1]
        keys = ("steps_seen", "rebased", "apart")
        state = {**here, **{key: alike[key] for key in keys}, "jumps": [], "carried": {}, "so_far": window["paths"]}
        if "exact" in counters["trackers"] and not any(self._pieces):
            counters["trackers"]["exact"]["bits"] = window["bits"]
        if saved.place.ranks == 1 and not gone:
            paths = PathSoFar.of_state(window["paths"])
            state = in_whole(counters, state, sums, self._watched, paths) | {"jumps": alike["jumps"]}
        else:
            state = in_parts(counters, state) | {"carried": sums.state() if steps else {}}
        self.load_state_dict(joined(saved.tensors, state))
        for tracker in self._built.trackers.values():
            if tracker.copies:
                tracker.measure()
        return gone

    def merge(self, other: Trajectory | dict[str, Any]) -> None:
        """Add the window of the interval that follows this one (another Trajectory of the same parameters, or its
        state). The result is that of one window over both. For shards see :func:`merge_shards`.

        The other one must go on where this one ended: continued from this one's state, or started anew there.

        Raises:
            ValueError: another kind of trajectory, or not the next interval; nothing was changed.
        """
        self._require_bound()
        state = other.state_dict() if isinstance(other, Trajectory) else other
        self._check_fits(state)
        choice = self._built.choice
        twin = Trajectory(
            groups=self._groups, stats=self._wanted.stats, every_steps=self.every_steps, masters=self._masters,
            window_blocks=self._window_blocks, ring=self._wanted.ring, mode=choice.mode, source=choice.source,
            buckets=choice.buckets, seed=choice.seed, split_replicas=self._shares is not None,
        )  # fmt: skip
        twin._shares, twin.partners = self._shares, self.partners
        twin.prepare(self._optimizers, None, self._window_blocks)
        twin.bind(self._model)
        twin.load_state_dict(state)
        pairs = zip(self._built.all_trackers, twin._built.all_trackers, strict=True)
        merges = [mine.prepare_merge(theirs) for mine, theirs in pairs]
        self.flush()
        behind = self._tracker.window_steps
        continued = [merge() for merge in merges]  # every one of them, whatever the first says
        self._jumps = [*self._jumps, *(steps + behind for steps in twin._jumps)][-2:]
        self._single.skip()  # the other one's are its own callback's
        self._steps_seen = twin._steps_seen + (0 if all(continued) else self._steps_seen)

    def sync(self, group: Any = AUTO, *, timeout: float = 60) -> MetricResult:
        """Return the open window of whole parameters, from what the ranks of a group hold of them (DDP, FSDP2, tensor
        parallelism and all of these together). Every rank of the group calls it at the same step and gets the same
        numbers. What several ranks hold alike counts once.

        No rank starts a collective before all have come. Of a window that is longer than the `ring` the steps before
        are kept beside it, up to 64 MiB, since only the squares of single steps add up over shards.

        Args:
            group: "auto" for the default process group; a ProcessGroup or a DeviceMesh.
            timeout: seconds to wait for the other ranks.

        Raises:
            RuntimeError: torch.distributed is not initialised; a rank has not come in time, or is at another step.
            ValueError: steps of the window are gone; ranks have other windows; their parameters are not parts of
                one model.
        """
        self._require_bound()
        if not under_process_group():
            raise RuntimeError("sync: torch.distributed is not initialised; use compute() in a single process")
        partners = self._partners_of(group, timeout)
        found = partners.find()
        if found is None:
            return self.compute()
        part = self.rank_part()
        if isinstance(part, (TrajectoryPart, SketchPart)):
            part.open = True
        last = int(self._built.first.table.cursor[0])
        steps = last - self._built.first.window_steps + 1, last
        return merge_open(partners, found, "trajectory.sync()", self._steps_seen, steps, part, self.name)

    def sync_sketches(self, group: Any = AUTO, *, timeout: float = 60) -> SketchHistory:
        """Return :attr:`sketches` of whole parameters, from those of all ranks of a group; each rank's own stay as they
        are. Every rank of the group calls it at the same step and gets the same. What several ranks hold alike counts
        once. One collective of as many bytes as the sketches have.

        Args:
            group: "auto" for the default process group, where there is one; a ProcessGroup or a DeviceMesh.
            timeout: seconds to wait for the other ranks.

        Raises:
            RuntimeError: no sketches are kept; a rank has not come in time, or is at another step.
            ValueError: ranks have kept other steps, or sketches of other parameters.
        """
        mine = self.sketches
        tracker = self._built.trackers["sketch"]
        assert isinstance(tracker, SketchTracker)
        partners = self._partners_of(group, timeout)
        found, whole = partners.find(), SketchHistory(mine.buckets, self._wanted.keep_limit)
        matrix = mine.matrix
        if found is not None:
            part, steps = kept_part(tracker, self._holding, tracker.agreed), (0, self._steps_seen)
            merged = merge_open(partners, found, "trajectory.sync_sketches()", self._steps_seen, steps, part, self.name)
            matrix = merged.details["matrix"]
        whole.load(mine.steps, matrix)
        return whole

    def _partners_of(self, group: Any, timeout: float) -> Partners:
        if (group, timeout) not in self._partners:
            self._partners[group, timeout] = Partners(group, timeout)
        return self._partners[group, timeout]

    def summary(self) -> dict[str, Any]:
        """Return what :func:`merge_shards` needs of the open window: scalars of rows and steps, no copies."""
        self._require_bound()
        return self._built.first.summary(self.every_steps)
