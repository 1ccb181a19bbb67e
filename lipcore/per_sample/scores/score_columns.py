"""Statistics per sample id of several values of each sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from lipcore.per_sample.scores.sample_scores import SampleScores


class ScoreColumns(Sequence[SampleScores]):
    """A :class:`SampleScores` for each of K values per sample, observed together.

    Args:
        columns: K.
    """

    def __init__(self, columns: int) -> None:
        self._columns = [SampleScores() for _ in range(columns)]

    @classmethod
    def of(cls, columns: Sequence[SampleScores]) -> ScoreColumns:
        """Return these scores as one."""
        found = cls(0)
        found._columns = list(columns)
        return found

    def __getitem__(self, column: Any) -> Any:
        return self._columns[column]

    def __len__(self) -> int:
        return len(self._columns)

    def __iter__(self) -> Iterator[SampleScores]:
        return iter(self._columns)

    def __repr__(self) -> str:
        return f"{type(self).__name__}: scores[k] of {len(self)} references, the first: {self._columns[0]!r}"

    def observe(self, ids: Tensor, values: Tensor) -> None:
        """Add the values [B, K] of samples with these ids [B]."""
        for scores, column in zip(self._columns, values.unbind(1), strict=True):
            scores.observe(ids, column)

    def mark(self) -> None:
        """Note that everything so far is right."""
        for scores in self._columns:
            scores.mark()

    def take_back(self) -> None:
        """Forget what was observed since the last mark."""
        for scores in self._columns:
            scores.take_back()

    def merge(self, other: ScoreColumns) -> None:
        """Add the statistics of another one of as many columns."""
        for mine, theirs in zip(self._columns, other, strict=True):
            mine.merge(theirs)

    def state_dict(self) -> dict[str, Any]:
        return {"columns": [scores.state_dict() for scores in self._columns]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; where it does not fit, raise a ValueError and change nothing."""
        states = state.get("columns") if isinstance(state, dict) else None
        if not isinstance(states, list) or len(states) != len(self):
            raise ValueError(f"columns: expected the states of {len(self)} columns, got {type(states).__name__}")
        loaded = [SampleScores() for _ in states]
        for scores, each in zip(loaded, states, strict=True):
            scores.load_state_dict(each)
        self._columns = loaded


Scores = SampleScores | ScoreColumns
