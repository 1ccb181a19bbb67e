"""Whose numbers a record has: in single steps one rank's, of its part of the model where ranks hold parts of it, or of
its stage of a pipeline; in windows those of all ranks, where these were merged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lipcore.report.parts import named_stage, other_parts, said_by
from lipcore.report.source import Started


@dataclass(frozen=True)
class Covered:
    """Coverage of the single steps of a record: whose they are, and of how much of the model.

    Attributes:
        rank: whose they are.
        ranks: how many trained the model; 0 where the record does not say.
        parts: norms are those of the part of the model that the rank holds, since some step at least.
        stage: of a pipeline that the rank has, by its Monitor's prefix=; "" where it is the whole model.
        changed: the step behind which this became otherwise; None where it never did.
    """

    rank: int = 0
    ranks: int = 0
    parts: bool = False
    changed: int | None = None
    stage: str = ""

    @property
    def several(self) -> bool:
        """True where other ranks have numbers of these steps too."""
        return self.ranks > 1 or self.partial

    @property
    def partial(self) -> bool:
        """True where norms are not those of the whole model."""
        return self.parts or bool(self.stage)

    @property
    def whose(self) -> str:
        """The rank in words."""
        return f"rank {self.rank} of {self.ranks}" if self.ranks > 1 else f"rank {self.rank}"

    @property
    def model(self) -> str:
        """Name of what the norms of single steps are of."""
        whole = named_stage(self.stage) if self.stage else "the model"
        if self.parts:
            return f"rank {self.rank}'s part of {whole}"
        return whole if self.stage else "the whole model"

    def sentence(self) -> str:
        """Return what is to be known beside numbers of single steps; "" in one process."""
        if not self.several:
            return ""
        said = f"Single steps are of {self.whose}: its loss, its samples"
        said += f", and norms of {self.model} alone" if self.partial else ""
        if self.changed is not None:
            said += f"; what they cover changed behind step {self.changed:,}, where other ranks went on"
        return f"{said}."


def covered(starts: Sequence[Started], scopes: Iterable[str] = ()) -> Covered:
    """Return what the single steps cover, by what the starts of a run say, or where an older record does not, by what
    its windows cover."""
    known = [said for start in starts if (said := said_by(start.config))]
    if not known:
        config = starts[-1].config if starts else {}
        rank = config.get("rank", 0)
        return Covered(rank if isinstance(rank, int) else 0, parts="shard" in scopes)
    last, changes = known[-1], other_parts(starts)
    parts = any(one["scope"] == "shard" for one in known)
    changed = changes[-1].last if changes else None
    return Covered(last["rank"], max(one["ranks"] for one in known), parts, changed, last["stage"])
