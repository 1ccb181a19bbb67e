"""Of how many ranks the steps of a record are, and of whole parameters or parts: a start may change that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lipcore.report.source import Started

#: Key of the fact about a start that says whose numbers single steps are: {"scope": "shard", "rank": 0, "ranks": 2},
#: and "stage": "stages.0", the prefix= of the Monitor, where there are several ranks and it has one.
SINGLE_STEPS = "single_steps"
_SCOPES = {"rank": "whole parameters", "shard": "parts of the parameters", "global": "whole parameters"}


@dataclass(frozen=True)
class OtherParts:
    """A step behind which the numbers of single steps are of another number of ranks, or of another scope."""

    last: int  #: the last step before
    before: str  #: in words: "2 ranks, parts of the parameters"
    after: str

    def __str__(self) -> str:
        return f"steps up to {self.last:,} were made on {self.before}, later ones on {self.after}"


def said_by(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a start says, nothing where that is another's: a run may be told any facts."""
    found = config.get(SINGLE_STEPS)
    if not isinstance(found, dict) or found.get("scope") not in _SCOPES:
        return {}
    known = {"stage": "", **found}
    there = isinstance(known["stage"], str) and all(isinstance(found.get(key), int) for key in ("rank", "ranks"))
    return known if there else {}


def named_stage(prefix: str) -> str:
    """Return what a stage of a pipeline is called, by the prefix of its Monitor."""
    return f"the stage '{prefix}'"


def other_parts(starts: Sequence[Started]) -> list[OtherParts]:
    """Return where that changes, by step; a start that does not say it changes nothing."""
    kept: list[tuple[int, int, str]] = []
    for start in starts:  # a rewind removes what came later
        kept = [one for one in kept if one[0] < start.step]
        said = said_by(start.config)
        kept += [(start.step, said["ranks"], said["scope"])] if said else []
    return [
        OtherParts(here[0], _words(*one[1:]), _words(*here[1:])) for one, here in pairwise(kept) if one[1:] != here[1:]
    ]


def _words(ranks: int, scope: str) -> str:
    return f"{ranks} rank{'' if ranks == 1 else 's'} ({_SCOPES[scope]})"
