"""Windows of shards of one model (FSDP, tensor parallelism) as one: squares of single steps add up, lengths do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipcore.distribution import Distribution
from lipcore.results import MetricResult
from lipcore.trajectory.describe import Row
from lipcore.trajectory.table import COLUMN, COLUMNS, FOLDED, M2, POINTS, STEPS

_SQUARED = [COLUMN["distance"], COLUMN["weight"]]
_LARGEST = [COLUMN["max_abs_last"], COLUMN["max_abs_max"]]


def merge_shards(summaries: Sequence[dict[str, Any]]) -> MetricResult:
    r"""The numbers of whole parameters from :meth:`Trajectory.summary` of every shard (each rank's, say).

    :math:`\sum_t \|\Delta w_t\| = \sum_t \sqrt{\sum_s \|\Delta w_t^{(s)}\|^2}`: adding up the shards' path lengths
    would be up to sqrt(shards) too large. Places of the same name are one parameter in parts; pass every part exactly
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
    places = list(dict.fromkeys(place for s in summaries for place in s["places"]))
    order = {"tensor": 0, "group": 1, "total": 2}
    level_of = {place: level for s in summaries for place, level in zip(s["places"], s["levels"], strict=True)}
    places.sort(key=lambda place: order[level_of[place]])
    result = MetricResult("trajectory", every_steps=first["every_steps"], shards=len(summaries))
    length = "path_length" if first["every_steps"] == 1 else "chord_length"
    whole: dict[str, dict[str, Tensor]] = {}  # single steps of whole tensors, per group they add to
    for place in places:
        members = [(s, s["places"].index(place)) for s in summaries if place in s["places"]]
        rows = torch.stack([s["rows"][i] for s, i in members])
        steps = torch.stack([s["steps"][:, i] for s, i in members]).sum(dim=0)
        if level_of[place] == "tensor":
            for s, i in members:
                for group in (_group_of(s, i), "total"):
                    whole.setdefault(group, {})[place] = steps
        left_out: Tensor | None = None
        if (
            level_of[place] != "tensor" and place in whole
        ):  # a tensor that is left out in one shard is left out of its group as a whole
            tensors = torch.stack(list(whole[place].values()))
            left_out = tensors[..., :1].isnan()
            steps = torch.where(left_out, 0.0, tensors).sum(dim=0)
            steps[left_out.all(dim=0).flatten()] = torch.nan
        row = _merged(rows, steps)
        if left_out is not None:
            row[COLUMN["nonfinite_steps"]] = left_out.any(dim=0).sum()
        updates, ratios = Distribution(), Distribution()
        norms = steps.sqrt()
        updates.observe(norms[:, 0])
        ratios.observe(_ratios(norms))
        described = Row(dict(zip(COLUMNS, row.tolist(), strict=True)), updates, ratios)
        described.add_to(result, place, level_of[place], frozenset(first["quantities"]), length=length)
    return result


def _group_of(summary: dict[str, Any], i: int) -> str:
    groups = [place for place, level in zip(summary["places"], summary["levels"], strict=True) if level == "group"]
    return str(groups[int(summary["rows"][i, COLUMN["group"]])])


def _ratios(norms: Tensor) -> Tensor:
    return torch.where(norms[:, 0] == 0, 0.0, norms[:, 0] / norms[:, 1])


def _merged(rows: Tensor, steps: Tensor) -> Tensor:
    """One row from a parameter's shards and the squared norms of its single steps."""
    norms = steps.sqrt()
    counted = norms[:, 0].isfinite()
    finite, ratios = norms[counted, 0], _ratios(norms[counted])
    row = rows[0].clone()
    row[STEPS] = len(finite)
    row[COLUMN["nonfinite_steps"]] = len(norms) - len(finite)
    row[COLUMN["nonfinite_elements"]] = rows[:, COLUMN["nonfinite_elements"]].sum()
    row[COLUMN["zero_steps"]] = (finite == 0).sum()
    row[M2] = rows[:, M2].sum()
    row[FOLDED] = (rows[:, FOLDED] + rows[:, POINTS].clamp(min=0)).min()
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
