"""Windows of shards of one model (FSDP, tensor parallelism) as one: squares of single steps add up, lengths do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipcore.metric.distribution import Distribution
from lipcore.metric.results import Level, MetricResult, Places
from lipcore.trajectory.describe import Rows, quantiles_of
from lipcore.trajectory.table import COLUMN, FOLDED, M2, POINTS, STEPS, points_of

_SQUARED = [COLUMN["distance"], COLUMN["weight"]]
_LARGEST = [COLUMN["max_abs_last"], COLUMN["max_abs_max"]]


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
    result = MetricResult("trajectory", every_steps=first["every_steps"], shards=len(summaries))
    places: list[tuple[str, Level, Tensor, Tensor, Tensor]] = []  # rows, steps, whether something was left out of each
    members: dict[str, list[int]] = {}
    for i, (name, group) in enumerate(_names_and_groups(summaries)):
        shards = [(s, s["names"].index(name)) for s in summaries if name in s["names"]]
        steps = torch.stack([s["steps"][:, k] for s, k in shards]).sum(dim=0)  # NaN where one of them has it
        rows = torch.stack([s["rows"][k] for s, k in shards])
        rows[:, FOLDED] = points_of(rows).min()
        places.append((name, "tensor", rows, steps, steps[:, 0].isnan()))
        members.setdefault(group, []).append(i)
    tensors = len(places)
    for group, level, indices in (*((g, "group", m) for g, m in members.items()), ("total", "total", range(tensors))):
        rows = torch.cat([places[i][2] for i in indices])
        each = torch.stack([places[i][3] for i in indices])
        left_out = each[..., 0].isnan()
        # A group goes on with its finite members; without any it is left out too.
        steps = torch.where(left_out[..., None], 0.0, each).sum(dim=0)
        steps[left_out.all(dim=0)] = torch.nan
        places.append((group, level, rows, steps, left_out.any(dim=0)))  # type: ignore[arg-type]
    length = "path_length" if first["every_steps"] == 1 else "chord_length"
    table, distributions = [], []
    for _, _, rows, steps, left_out in places:
        norms = steps.sqrt()
        updates, ratios = Distribution(), Distribution()
        updates.observe(norms[:, 0])
        ratios.observe(_ratios(norms))
        table.append(_merged(rows, norms))
        table[-1][COLUMN["nonfinite_steps"]] = left_out.sum()
        distributions += [updates, ratios]
    where = Places([place for place, *_ in places], [level for _, level, *_ in places])
    window = Rows(where, torch.stack(table), quantiles_of(distributions))
    window.add_to(result, frozenset(first["quantities"]), length=length)
    return result


def gather(summary: dict[str, Any], group: Any) -> MetricResult:
    """Gather every rank's summary as one result; each rank gives the parameters that it counts (`mine`). A
    collective."""
    mine = [i for i, is_mine in enumerate(summary["mine"]) if is_mine]
    counted = {key: [summary[key][i] for i in mine] for key in ("names", "groups", "mine")}
    counted |= {"rows": summary["rows"][mine], "steps": summary["steps"][:, mine]}
    gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, summary | counted, group=group)
    return merge_shards(gathered)


def _names_and_groups(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the parameter names and groups of all shards, in their order."""
    found = {name: group for s in summaries for name, group in zip(s["names"], s["groups"], strict=True)}
    return list(found.items())


def _ratios(norms: Tensor) -> Tensor:
    return torch.where(norms[:, 0] == 0, 0.0, norms[:, 0] / norms[:, 1])


def _merged(rows: Tensor, norms: Tensor) -> Tensor:
    """Return one row from a parameter's shards (or a group's members), and the norms of its single steps."""
    counted = norms[:, 0].isfinite()
    finite, ratios = norms[counted, 0], _ratios(norms[counted])
    row = rows[0].clone()
    row[STEPS] = len(finite)
    row[COLUMN["nonfinite_elements"]] = rows[:, COLUMN["nonfinite_elements"]].sum()
    row[COLUMN["zero_steps"]] = (finite == 0).sum()
    row[M2] = rows[:, M2].sum()
    row[FOLDED] = rows[:, FOLDED].max()
    row[POINTS] = 0
    row[_SQUARED] = rows[:, _SQUARED].square().sum(dim=0).sqrt()
    row[_LARGEST] = rows[:, _LARGEST].amax(dim=0)
    row[COLUMN["path"]] = finite.sum()
    # The path before this window was not merged: what counts since the reference is known when it began there.
    since_start = rows[:, COLUMN["total_steps"]].max() <= len(norms)
    row[COLUMN["total_path"]] = finite.sum() if since_start else torch.nan
    if len(finite):
        row[COLUMN["update_last"]], row[COLUMN["update_max"]] = finite[-1], finite.max()
        row[COLUMN["ratio_last"]], row[COLUMN["ratio_sum"]] = ratios[-1], ratios.sum()
        row[COLUMN["ratio_max"]] = ratios.max()
    return row
