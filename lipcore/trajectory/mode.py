"""Which mode and source a Trajectory works with, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch.optim import Optimizer

from lipcore.models.arguments import check_choice, check_count, is_integer
from lipcore.trajectory.copies import bytes_of
from lipcore.trajectory.parameters import WatchedParameter
from lipcore.trajectory.update_tracker import closed_form_everywhere

Mode = Literal["exact", "sketch", "updates", "auto"]
Source = Literal["auto", "difference", "optimizer", "snapshot", "explicit"]
_FEWEST, _MOST = 256, 65536  # buckets


@dataclass(frozen=True)
class Choice:
    """Mode, source and sketch of a Trajectory: as asked for, or as choose() has settled them."""

    mode: Mode | None
    source: Source
    buckets: int
    seed: int
    memory_budget: int | None
    why: str = ""

    def check(self) -> None:
        """Raise ValueError naming the argument that is not possible."""
        check_choice("mode", self.mode, get_args(Mode), optional=True)
        check_choice("source", self.source, get_args(Source))
        if not is_integer(self.buckets) or self.buckets not in [1 << i for i in range(8, 17)]:
            raise ValueError(f"buckets: expected a power of two from {_FEWEST} to {_MOST}, got {self.buckets!r}")
        if not is_integer(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer from 0 to 2**63 - 1, got {self.seed!r}")
        check_count("memory_budget", self.memory_budget, optional=True)
        if (self.mode == "auto") != (self.memory_budget is not None):
            raise ValueError(
                "memory_budget: "
                + ("mode 'auto' needs one, in bytes" if self.mode == "auto" else "is for mode 'auto' only")
            )
        if self.mode == "exact" and self.source not in ("auto", "difference"):
            raise ValueError(
                f"source: mode 'exact' keeps the copies that give the difference, {self.source!r} would only cost; "
                "choose mode 'updates' or 'sketch' with it"
            )
        if self.mode == "updates" and self.source == "difference":
            raise ValueError("source: mode 'updates' keeps no copies to take the difference from")


def check_splits(asked: Choice) -> None:
    """Raise ValueError where ranks that hold parameters alike cannot share what a Trajectory keeps of them."""
    why = ""
    if asked.mode == "sketch":
        why = "mode 'sketch' keeps nothing of single parameters that ranks could share"
    elif asked.mode == "auto":
        why = "mode 'auto' may choose another mode on each rank"
    elif asked.source == "explicit":
        why = "source 'explicit' is given what has moved, and keeps nothing"
    if why:
        raise ValueError(f"split_replicas: {why}; use mode 'exact', or 'updates' with another source")


def choose(
    asked: Choice, watched: list[WatchedParameter], optimizers: Sequence[Optimizer], window_blocks: int
) -> Choice:
    """Settle mode, source and buckets for these tensors; `why` says it in words.

    Raises:
        ValueError: nothing fits the budget, or the source cannot serve these parameters.
    """
    mode: Mode = asked.mode or ("exact" if asked.source in ("auto", "difference") else "updates")
    buckets, why = asked.buckets, ""
    if mode == "auto":
        mode, buckets, why = _within_budget(asked, watched, window_blocks)
    source: Source = asked.source
    if source == "auto":
        source = "difference"
        if mode == "updates":
            source = "optimizer" if closed_form_everywhere(optimizers, watched) else "snapshot"
    words = {
        "exact": "exact copies",
        "sketch": f"sketch of {buckets} buckets per group",
        "updates": "no state per parameter",
    }[mode]
    words += f", updates from the {source}" if source in ("difference", "optimizer") else f", updates: {source}"
    return replace(asked, mode=mode, source=source, buckets=buckets, why=words + why)


def exact_bytes(watched: list[WatchedParameter], window_blocks: int) -> int:
    """Return the bytes of exact copies, the mean of earlier blocks included."""
    tensors = [parameter.tensor for parameter in watched]
    return sum(sum(bytes_of(t.numel(), t.dtype, blocks=window_blocks).values()) for t in tensors)


def sketch_bytes(groups: int, buckets: int, window_blocks: int) -> int:
    """Return the bytes of sketches: the present one, its copies, and the last two updates' for the angle between
    them."""
    copies = sum(bytes_of(buckets, torch.float64, blocks=window_blocks).values())
    return groups * (copies + 4 * 8 * buckets)


def _within_budget(asked: Choice, watched: list[WatchedParameter], window_blocks: int) -> tuple[Mode, int, str]:
    budget = asked.memory_budget
    assert budget is not None
    exact = exact_bytes(watched, window_blocks)
    if exact <= budget and asked.source in ("auto", "difference"):
        return "exact", asked.buckets, f" ({exact:,} bytes, within the budget of {budget:,})"
    groups = len({parameter.group for parameter in watched})
    buckets = _MOST
    while buckets > _FEWEST and sketch_bytes(groups, buckets, window_blocks) > budget:
        buckets //= 2
    size = sketch_bytes(groups, buckets, window_blocks)
    if size > budget:
        raise ValueError(
            f"memory_budget: {budget:,} bytes are too few: exact copies need {exact:,}, the smallest sketch of "
            f"{groups} groups {size:,}; choose fewer groups, or mode 'updates', which needs none"
        )
    why = f" ({size:,} bytes; exact copies would need {exact:,}, the budget is {budget:,})"
    return "sketch", buckets, why
