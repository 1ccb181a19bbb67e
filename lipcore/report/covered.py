"""Whose numbers a record has: in single steps one rank's, of its part of the model where ranks hold parts of it; in
windows those of all ranks, where these were merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lipcore.report.source import Started

#: Key of the fact about a start that says whose numbers single steps are: {"scope": "shard", "rank": 0, "ranks": 2}.
SINGLE_STEPS = "single_steps"


@dataclass(frozen=True)
class Covered:
    """Coverage of the single steps of a record: whose they are, and of how much of the model.

    Attributes:
        rank: whose they are.
        ranks: how many trained the model; 0 where the record does not say.
        parts: norms are those of the part of the model that the rank holds, since some step at least.
        changed: the step behind which this became otherwise; None where it never did.
    """

    rank: int = 0
    ranks: int = 0
    parts: bool = False
    changed: int | None = None

    @property
    def several(self) -> bool:
        """True where other ranks have numbers of these steps too."""
        return self.ranks > 1 or self.parts

    @property
    def whose(self) -> str:
        """The rank in words."""
        return f"rank {self.rank} of {self.ranks}" if self.ranks > 1 else f"rank {self.rank}"

    @property
    def model(self) -> str:
        """Name of what the norms of single steps are of."""
        return f"rank {self.rank}'s part of the model" if self.parts else "the whole model"

    def sentence(self) -> str:
        """Return what is to be known beside numbers of single steps; "" in one process."""
        if not self.several:
            return ""
        said = f"Single steps are of {self.whose}: its loss, its samples"
        said += f", and norms of {self.model} alone" if self.parts else ""
        if self.changed is not None:
            said += f"; what they cover changed behind step {self.changed:,}, where other ranks went on"
        return f"{said}."


def covered(starts: Sequence[Started], scopes: Iterable[str] = ()) -> Covered:
    """Return what the single steps cover, by what the starts of a run say, or where an older record does not, by what
    its windows cover."""
    said = [_said(start.config) for start in starts]
    known = [one for one in said if one]
    if not known:
        config = starts[-1].config if starts else {}
        rank = config.get("rank", 0)
        return Covered(rank if isinstance(rank, int) else 0, parts="shard" in scopes)
    last = known[-1]
    changes = [
        start.step
        for start, one, before in zip(starts[1:], said[1:], said, strict=False)
        if one and before and (one["scope"], one["ranks"]) != (before["scope"], before["ranks"])
    ]
    parts = any(one["scope"] == "shard" for one in known)
    return Covered(last["rank"], max(one["ranks"] for one in known), parts, changes[-1] if changes else None)


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a start says, nothing where that is another's: a run may be told any facts."""
    found = config.get(SINGLE_STEPS)
    if not isinstance(found, dict) or found.get("scope") not in ("rank", "shard", "global"):
        return {}
    return found if all(isinstance(found.get(key), int) for key in ("rank", "ranks")) else {}
