"""The trackers of a Trajectory, made from what was asked for and the parameters that are watched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor
from torch.optim import Optimizer

from lipcore.trajectory.describe import GRADIENTS
from lipcore.trajectory.gradient_norms import BEFORE, Gradients, GradientTracker
from lipcore.trajectory.mode import Choice, choose
from lipcore.trajectory.parameters import WatchedParameter
from lipcore.trajectory.sketch_tracker import SketchTracker
from lipcore.trajectory.tracker import Tracker
from lipcore.trajectory.unexplained import Unexplained
from lipcore.trajectory.update_tracker import UpdateTracker

#: A quantity that a Trajectory can report.
Stat = Literal[
    "update_norm",
    "update_ratio",
    "max_abs_update",
    "path_length",
    "weight_norm",
    "unmoved_steps",
    "nonfinite_steps",
    "nonfinite_elements",
    "distance",
    "directness",
    "variance",
    "update_cosine",
    "normalized_update_rms",
    "rms_t",
    "momentum_norm",
    "second_moment_norm",
    "grad_norm",
    "clipped_grad_norm",
    "element_variance",
]
ALL: tuple[Stat, ...] = get_args(Stat)


@dataclass(frozen=True)
class Wanted:
    """Settings of a Trajectory that decide which trackers it has."""

    stats: tuple[Stat, ...] | None  #: None: all but those on request
    choice: Choice
    ring: int
    keep_every: int | None
    keep_limit: int
    explains: bool = False  #: look for movement that the optimizers did not make
    normalizes: bool = False  #: have the RMS of normalised updates of each step, where the state is read


@dataclass(frozen=True)
class Built:
    """Trackers by what they are made from, the norms of gradients, and the choice of mode and source behind them."""

    choice: Choice
    trackers: dict[str, Tracker]
    gradients: Gradients | None
    unexplained: Unexplained | None = None

    @property
    def first(self) -> Tracker:
        """The tracker that has seen every step as the others have, and has a row for every place."""
        return next(iter(self.trackers.values()))

    @property
    def main(self) -> Tracker:
        """The tracker that knows where the parameters are; without one, the tracker of updates."""
        return list(self.trackers.values())[-1]

    @property
    def of_gradients(self) -> dict[str, GradientTracker]:
        """Trackers of gradients by quantity."""
        return self.gradients.trackers if self.gradients else {}

    @property
    def step_rings(self) -> dict[str, Tensor]:
        """Rings beside that of the updates, by quantity, whose entries are of the same steps."""
        rings = {stage: tracker.table.recent for stage, tracker in self.of_gradients.items()}
        updates = self.trackers.get("updates")
        if isinstance(updates, UpdateTracker) and updates.ratios is not None:
            rings["rms_t"] = updates.ratios.recent
        if isinstance(updates, UpdateTracker) and updates.normalized is not None:
            rings["normalized_update_rms"] = updates.normalized.recent
        if self.unexplained is not None:
            rings["unexplained_movement"] = self.unexplained.ring.recent
        return rings

    @property
    def all_trackers(self) -> list[Tracker]:
        """Trackers of parameters, then those of gradients."""
        return [*self.trackers.values(), *self.of_gradients.values()]

    def align(self) -> None:
        """Bring the gradients' rings to the parameters' last step."""
        for tracker in self.of_gradients.values():
            tracker.catch_up()


def build(
    wanted: Wanted,
    watched: list[WatchedParameter],
    optimizers: Sequence[Optimizer],
    window_blocks: int,
    others: Sequence[WatchedParameter] = (),
) -> Built:
    """Make the trackers of these parameters, which start at the values they have now; `others`: what is here too and
    other ranks watch.

    Raises:
        ValueError: a quantity that the mode and source do not have; what choose() refuses.
    """
    stats = wanted.stats or ()
    choice = choose(wanted.choice, watched, optimizers, window_blocks)
    trackers: dict[str, Tracker] = {}
    settings: dict[str, Any] = {"ring": wanted.ring, "window_blocks": window_blocks}
    if choice.mode == "exact":
        trackers["exact"] = Tracker(watched, per_element="element_variance" in stats, **settings)
    elif choice.mode == "sketch":
        kept: dict[str, Any] = {"keep_every": wanted.keep_every, "keep_limit": wanted.keep_limit}
        trackers["sketch"] = SketchTracker(watched, choice.buckets, choice.seed, **kept, **settings)
    if choice.source != "difference":
        asked = {"ratios": "rms_t" in stats, "normalized": wanted.normalizes}
        updates = UpdateTracker(watched, choice.source, optimizers, **asked, **settings)
        trackers = {"updates": updates, **trackers}
    known = [name for tracker in trackers.values() for name in tracker.quantities]
    for name in stats:
        if name not in known and name not in GRADIENTS:
            raise ValueError(
                f"stats: {name!r} is not known in mode {choice.mode!r} with source {choice.source!r}, which has "
                f"{', '.join(dict.fromkeys(known))}"
            )
    by_name = wanted.stats is not None
    stages = set(GRADIENTS) & set(stats if by_name else (BEFORE,))
    first = next(iter(trackers.values()))
    gradients = None
    if stages:
        gradients = Gradients(
            watched, wanted.ring, window_blocks, stages, first, by_name=by_name, others=others, optimizers=optimizers
        )
    unexplained = None
    exact = trackers.get("exact")
    if wanted.explains and exact is not None and exact.copies is not None:
        unexplained = Unexplained(watched, optimizers, exact.copies.prev, exact.table)
    elif wanted.explains and "tensor" in first.places.levels:
        unexplained = Unexplained(watched, optimizers, None, first.table)
    return Built(choice, trackers, gradients, unexplained)


def checked_stats(stats: Iterable[Stat]) -> tuple[Stat, ...]:
    """Return the argument `stats` as a tuple; ValueError when it names no quantity, or one that there is not."""
    names: tuple[Stat, ...] = (stats,) if isinstance(stats, str) else tuple(stats)  # type: ignore[assignment]
    for name in names:
        if name not in ALL:
            raise ValueError(f"stats: {name!r} is not a quantity of Trajectory; it has {', '.join(ALL)}")
    if not names:
        raise ValueError(f"stats: expected at least one of {', '.join(ALL)}")
    return names
