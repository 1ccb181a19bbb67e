"""Of how many ranks the steps of a record are, and of whole parameters or parts: a start may change that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lipcore.report.covered import SINGLE_STEPS
from lipcore.report.source import Started


@dataclass(frozen=True)
class OtherParts:
    """A step behind which the numbers of single steps are of another number of ranks, or of another scope."""

    last: int  #: the last step before
    before: str  #: in words: "2 ranks, parts of the parameters"
    after: str

    def __str__(self) -> str:
        return f"steps up to {self.last:,} were made on {self.before}, later ones on {self.after}"


def other_parts(starts: Sequence[Started]) -> list[OtherParts]:
    """Return where that changes, by step; a start that does not say it changes nothing."""
    kept: list[tuple[int, Any]] = []
    for start in starts:  # a rewind removes what came later
        kept = [(step, of) for step, of in kept if step < start.step]
        of = start.config.get(SINGLE_STEPS)
        kept += [(start.step, of)] if isinstance(of, dict) else []
    pairs = pairwise(kept)
    return [
        OtherParts(step, _words(one), _words(other)) for (_, one), (step, other) in pairs if _key(one) != _key(other)
    ]


def _key(of: Any) -> str:
    return json.dumps([of.get("ranks"), of.get("scope")])


_SCOPES = {"rank": "whole parameters", "shard": "parts of the parameters", "global": "whole parameters"}


def _words(of: Any) -> str:
    ranks = of.get("ranks")
    return f"{ranks} rank{'' if ranks == 1 else 's'} ({_SCOPES.get(of.get('scope'), 'unknown parts')})"
