"""Windows of shards of one model (FSDP, tensor parallelism) as one, from summaries that lie in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lipcore.distributed.packed import Packed, folded
from lipcore.metric.results import MetricResult
from lipcore.trajectory.shard_sums import ShardSums
from lipcore.trajectory.whole import Whole, places_of


def merge_shards(summaries: Sequence[dict[str, Any]]) -> MetricResult:
    r"""Return the numbers of whole parameters from :meth:`Trajectory.summary` of every shard (each rank's, say).

    :math:`\sum_t \|\Delta w_t\| = \sum_t \sqrt{\sum_s \|\Delta w_t^{(s)}\|^2}`: adding up the shards' path lengths
    would be up to sqrt(shards) too large. Places of the same name are one parameter in shards; pass every shard exactly
    once (replicated parameters from one rank only). A step in which one shard has non-finite values is left out.

    Raises:
        ValueError: the summaries are not of the same steps, or of different settings.
    """
    if not summaries:
        raise ValueError("summaries: expected at least one")
    first = summaries[0]
    for i, other in enumerate(summaries):
        for key in ("version", "every_steps", "quantities"):
            if other.get(key) != first[key]:
                raise ValueError(f"summaries[{i}]: {key} is {other.get(key)!r}, that of summaries[0] {first[key]!r}")
        if len(other["steps"]) != len(first["steps"]):
            raise ValueError(
                f"summaries[{i}]: {len(other['steps'])} steps in the window, summaries[0] has {len(first['steps'])}"
            )
    found = {name: group for s in summaries for name, group in zip(s["names"], s["groups"], strict=True)}
    index = {name: i for i, name in enumerate(found)}
    places = places_of(list(found), list(found.values()))

    def parts() -> Iterator[Packed]:
        for summary in summaries:
            shard = ShardSums.of_rows(summary["rows"], summary["steps"], len(places))
            where = [index[name] for name in summary["names"]]
            yield shard.spread(where, range(len(where)), len(index)).packed()

    result = MetricResult("trajectory", every_steps=first["every_steps"], shards=len(summaries))
    length = "path_length" if first["every_steps"] == 1 else "chord_length"
    (sums,) = ShardSums.of_packed(folded(parts), [])
    whole = Whole(sums, places, len(first["steps"]))
    whole.add_to(result, frozenset(first["quantities"]), length)
    return result
