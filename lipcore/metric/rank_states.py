"""A monitor's state over ranks: what they have alike, tensors that lie as parameters do, and each rank's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lipcore.distributed.rank_axis import Place, packed, read_back, spread, taken_over, unpacked
from lipcore.metric.state import is_count

State = dict[str, Any]


@dataclass
class RankStates:
    """States of one metric that ranks have saved, as far as this rank reads them.

    Attributes:
        place: this rank.
        ranks: how many have saved.
        alike: what a rank begins with that goes on from none of them; None where the metric cannot say.
        tensors: those that lie as parameters do, by parameter and kind.
        by_rank: the others, by the rank that saved them.
    """

    place: Place
    ranks: int
    alike: State | None
    tensors: Mapping[str, Any]
    by_rank: Mapping[int, State]

    @property
    def own(self) -> State | None:
        """The state that this very rank has saved, among as many."""
        return self.by_rank.get(self.place.rank) if self.ranks == self.place.ranks else None

    @property
    def others(self) -> list[State]:
        """The states that this rank goes on from, and no other rank does."""
        return [self.by_rank[rank] for rank in taken_over(self.place, self.ranks) if rank in self.by_rank]

    @property
    def complete(self) -> bool:
        """True where these are all of them: not so in a file that one rank has written by itself."""
        return all(rank in self.by_rank for rank in taken_over(self.place, self.ranks))

    @property
    def why(self) -> str:
        """The words for what is missing of the open window."""
        saved = ", ".join(map(str, self.by_rank)) or "others"
        return (
            f"{self.place} goes on from the state of rank {saved} of {self.ranks}, which has the samples of that one "
            "in the open window"
        )


class SavedRanks:
    """Reader of a monitor's state of several ranks; ValueError naming the first key that is wrong."""

    def __init__(self, state: Mapping[str, Any], place: Place) -> None:
        self._place = place
        kept = state.get("alike")
        self._alike = unpacked("alike", kept.get(place.key) if isinstance(kept, Mapping) else kept)
        ranks = self._alike.get("ranks") if isinstance(self._alike, dict) else None
        if not is_count(ranks) or not ranks or not isinstance(self._alike.get("metrics"), dict):
            raise ValueError(f"alike: expected the number of ranks and the metrics, got {self._alike!r:.80}")
        self.ranks: int = ranks
        self._by_rank = read_back("ranks", state.get("ranks"))
        for rank, entry in self._by_rank.items():
            if not isinstance(entry, dict) or not isinstance(entry.get("metrics"), dict) or rank >= ranks:
                raise ValueError(f"ranks.{rank}: expected the metrics of a rank of {ranks}, got {entry!r:.80}")
            for name in self._alike["metrics"]:
                if not isinstance(found := entry["metrics"].get(name), dict):
                    raise ValueError(f"ranks.{rank}.metrics.{name}: expected a dict, got {type(found).__name__}")
        tensors = state.get("copies", {})
        tensors = tensors.get(place.key, {}) if isinstance(tensors, Mapping) else tensors
        if not isinstance(tensors, Mapping):
            raise ValueError(f"copies: expected tensors by metric, got {type(tensors).__name__}")
        self._tensors = tensors

    @property
    def names(self) -> list[str]:
        """Names of the metrics."""
        return sorted(map(str, self._alike["metrics"]))

    @property
    def first(self) -> State:
        """The entry of the rank of this one's number, or of the lowest that it goes on from; {} for none."""
        return next(iter(self.taken_over), {})

    @property
    def taken_over(self) -> list[State]:
        """Entries of the ranks that this one goes on from."""
        return [self._by_rank[r] for r in taken_over(self._place, self.ranks) if r in self._by_rank]

    def of(self, name: str) -> RankStates:
        """Return the states of one metric."""
        found = {rank: entry["metrics"].get(name) for rank, entry in self._by_rank.items()}
        return RankStates(self._place, self.ranks, self._alike["metrics"][name], self._tensors.get(name, {}), found)


def saved(metrics: Mapping[str, Any], place: Place, more: State) -> State:
    """Return the states of metrics as one rank saves them, with `more` of its own. No collective: each rank has its
    own entries, those of what all have alike, and its parts of what lies as parameters do."""
    tensors: State = {}
    own: State = {}
    alike: State = {}
    for name, metric in metrics.items():
        found, own[name] = metric.split_state(metric.state_dict(), place)
        alike[name] = metric.empty_state(own[name])
        if found:
            tensors[name] = found
    return {
        "alike": {place.key: packed({"ranks": place.ranks, "metrics": alike})},
        "copies": {place.key: tensors} if tensors else {},
        "ranks": spread({"metrics": own, **more}, place),
    }
