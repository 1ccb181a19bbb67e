"""The Trajectory metric: what users see."""

from __future__ import annotations

import functools
from typing import Any

from lipcore.distributed.group import AUTO
from lipcore.metric.merging import merge_open
from lipcore.metric.rank_part import RankPart
from lipcore.metric.results import MetricResult
from lipcore.models.ranks import under_process_group
from lipcore.trajectory.rank_part import TrajectoryPart
from lipcore.trajectory.sketch_history import SketchHistory
from lipcore.trajectory.sketch_part import SketchPart, kept_part
from lipcore.trajectory.sketch_tracker import SketchTracker
from lipcore.trajectory.stepping import Stepped


class Trajectory(Stepped):
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
    step, in the distance and in the next update. Nothing is divided by a learning rate. The loss reduction matters only
    as far as it changes the updates.

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

    >>> import torch
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> trajectory = Trajectory(layer)
    >>> with torch.no_grad():
    ...     _ = layer.weight.add_(torch.tensor([3.0, 4.0]))
    >>> trajectory.update()
    >>> round(trajectory.compute().path_length["total"].sum.value, 5)
    5.0
    """

    def __enter__(self) -> Trajectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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

        def part() -> RankPart | str:
            made = self.rank_part()
            if isinstance(made, (TrajectoryPart, SketchPart)):
                made.open = True
            return made

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
            steps, what = (0, self._steps_seen), "trajectory.sync_sketches()"
            part = functools.partial(kept_part, tracker, self._holding, tracker.agreed)
            matrix = merge_open(partners, found, what, self._steps_seen, steps, part, self.name).details["matrix"]
        whole.load(mine.steps, matrix)
        return whole

    def summary(self) -> dict[str, Any]:
        """Return what :func:`merge_shards` needs of the open window: scalars of rows and steps, no copies."""
        self._require_bound()
        return self._built.first.summary(self.every_steps)
