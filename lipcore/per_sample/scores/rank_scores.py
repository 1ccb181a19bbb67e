"""Scores by sample id of all ranks together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipcore.distributed.agreed import Agreed
from lipcore.distributed.partners import Partners
from lipcore.per_sample.scores.sample_scores import SampleScores

_COLUMNS = 5  # id, count, mean, M2, maximum


def scores_of_all(partners: Partners, scores: Sequence[SampleScores], what: str, step: int) -> list[SampleScores]:
    """Return what all ranks have observed of every sample id; theirs and this rank's own stay as they are. A collective
    for each of the scores, where there are other ranks.

    Args:
        what: for which call, in words.
        step: the number of steps that this rank has made.

    Raises:
        RuntimeError: a rank has not come, or is elsewhere. No collective was started.
        ValueError: ranks are at different calls, or have other numbers of scores.
    """
    group = partners.find()
    if group is None:
        return [_merged([one.state_dict()]) for one in scores]
    states = [one.state_dict() for one in scores]
    tables = [_table(state) for state in states]
    header = {"version": 1, "call": what, "ids": [len(state["ids"]) for state in states]}
    header["left_out"] = [[state["missing"], state["invalid"]] for state in states]
    headers = partners.meet(group, what, step, header)
    for rank, other in zip(group.ranks, headers, strict=True):
        theirs = len(other.get("ids", []))
        if other["call"] != what or theirs != len(scores):
            raise ValueError(
                f"{what}: rank {rank} is at {other['call']}, with {theirs} scores where this rank has {len(scores)}; "
                "all ranks have to make the same call with the same metrics"
            )
    lengths = [[other["ids"][k] for other in headers] for k in range(len(scores))]
    gathered = _gathered(tables, lengths, Agreed(partners, group, what, step))
    found = []
    for k, of_ranks in enumerate(gathered):
        left_out = [other["left_out"][k] for other in headers]
        found.append(_merged([_state(table, *each) for table, each in zip(of_ranks, left_out, strict=True)]))
    return found


def _table(state: dict[str, Tensor]) -> Tensor:
    """Return ids and statistics as int64 [ids, 5]; the bits of floating-point numbers stay."""
    bits = [state[key].view(torch.int64) for key in ("mean", "m2", "max")]
    return torch.stack([state["ids"], state["count"], *bits], dim=1)


def _state(table: Tensor, missing: int, invalid: int) -> dict[str, object]:
    ids, count, *bits = (column.contiguous() for column in table.unbind(1))
    numbers = dict(zip(("mean", "m2", "max"), (column.view(torch.float64) for column in bits), strict=True))
    return {"version": 1, "ids": ids, "count": count, **numbers, "missing": missing, "invalid": invalid}


def _gathered(tables: Sequence[Tensor], lengths: Sequence[Sequence[int]], agreed: Agreed) -> list[list[Tensor]]:
    """Return the tables of all ranks, of each of which they have so many rows: one collective for each, and all memory
    before the first."""
    group, rows = agreed.group, [max(each) for each in lengths]
    room = agreed.room(sum(rows) * _COLUMNS * (1 + group.size)).view(torch.int64)
    found, at = [], 0
    for table, most in zip(tables, rows, strict=True):
        size = most * _COLUMNS
        places = room[at : at + (1 + group.size) * size].view(1 + group.size, most, _COLUMNS).unbind(0)
        places[0][: len(table)].copy_(table)
        found.append(places)
        at += (1 + group.size) * size
    for mine, *others in found:
        if mine.numel():
            torch.distributed.all_gather(others, mine, group=group.handle)
    return [
        [other[:length].to("cpu", copy=True) for other, length in zip(others, of_ranks, strict=True)]
        for (_, *others), of_ranks in zip(found, lengths, strict=True)
    ]


def _merged(states: Sequence[dict[str, object]]) -> SampleScores:
    merged = SampleScores()
    for state in states:
        one = SampleScores()
        one.load_state_dict(state)
        merged.merge(one)
    return merged
