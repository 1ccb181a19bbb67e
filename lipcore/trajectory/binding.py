"""A Trajectory's settings, and what they become with a model: watched parameters and their trackers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lipcore.distributed.group import AUTO
from lipcore.distributed.partners import Partners
from lipcore.distributed.shares import Shares
from lipcore.metric.protocol import Metric
from lipcore.metric.rank_part import FSDP1_PIECES, Holding
from lipcore.metric.results import MetricResult
from lipcore.models.arguments import check_count
from lipcore.models.gathered import between_steps
from lipcore.models.ranks import is_fsdp1, world_size
from lipcore.trajectory.building import ALL, Built, Stat, Wanted, build, checked_stats
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
)
from lipcore.trajectory.shard_sums import ShardSums
from lipcore.trajectory.single_steps import SingleSteps
from lipcore.trajectory.step_stream import OnStep
from lipcore.trajectory.tracker import Tracker
from lipcore.trajectory.trouble import Trouble
from lipcore.trajectory.update_tracker import UpdateTracker
from lipcore.trajectory.whole import PathSoFar


def _held(parameters: Sequence[WatchedParameter]) -> list[tuple[str, str, Tensor]]:
    """Return name, group and tensor of parameters that this rank holds. A window that waits has those of its time,
    whatever is watched by now."""
    return [(one.name, one.group, one.owner[one.key]) for one in parameters]


ONLY_NUMBERS = (
    "this Trajectory is a copy, which holds the numbers of compute() and no model; to go on, make a new Trajectory and "
    "load_state_dict() of the original"
)

_NONE_TO_SHARE = (
    "split_replicas: with group=None each rank trains a model of its own, which no other rank holds; leave it out"
)


class Bound(Metric):
    """Base of a Trajectory: what it was asked for, and the model it is bound to."""

    name = "trajectory"
    counts_samples = False
    _version = 4

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
        with between_steps(self._model):
            self._build(find_watched(self._model, self._groups, self._masters, self.prefix))

    def _refuse_bound(self) -> None:
        if self._numbers is not None:
            raise RuntimeError(ONLY_NUMBERS)
        if self._watched:
            raise RuntimeError("this Trajectory is bound to a model already; make one Trajectory per model")

    def _require_bound(self) -> None:
        if self._numbers is not None:
            raise RuntimeError(ONLY_NUMBERS)
        if not self._watched:
            raise RuntimeError(
                "this Trajectory has no model; pass one to Trajectory(model) or to Monitor(model, metrics=[...])"
            )

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
        self._holding = Holding(partial(_held, held), FSDP1_PIECES if fsdp1 else "", kept, self._model)
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

    def _partners_of(self, group: Any, timeout: float) -> Partners:
        if (group, timeout) not in self._partners:
            self._partners[group, timeout] = Partners(group, timeout)
        return self._partners[group, timeout]

    @property
    def _tracker(self) -> Tracker:
        """The tracker that knows where the parameters are; without one, the tracker of updates."""
        return self._built.main

    @property
    def _stats(self) -> tuple[Stat, ...]:
        return ALL if self._wanted.stats is None else self._wanted.stats

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
