"""What a Trajectory keeps on each rank, and what a rank sends in a logging step, by mode, of models of 7 and 70 billion
parameters on 64 and 1024 ranks (FSDP2). Nothing here was timed: plan() says the bytes of small tensors of as many
names, at two sizes, so what comes with each parameter and with each element is known; the shapes are those of models on
the meta device; and what is sent is counted in a window of small tensors, since it does not depend on their sizes.

    python bench/rank_costs.py            # writes bench/rank_costs.json and prints the table of docs/distributed.md
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipcore import Trajectory
from lipcore.distributed.group import Group
from lipcore.distributed.ownership import Ownership, describe
from lipcore.distributed.shares import Shares
from lipcore.metric.rank_part import RankPart

FILE = Path(__file__).with_suffix(".json")
RANKS, WINDOW = (64, 1024), 100
REPLICAS = (8, 64)  # of DDP
#: Hidden size, width of keys and values, width inside, layers.
MODELS = {"7B": (4096, 4096, 11008, 32), "70B": (8192, 1024, 28672, 80)}
_BOTH = ("update_norm", "update_ratio", "path_length", "weight_norm", "grad_norm", "clipped_grad_norm")
MODES: Mapping[str, dict[str, Any]] = {
    '`"exact"`': {"mode": "exact"},
    '`"sketch"`, 4096 buckets': {"mode": "sketch"},
    '`"updates"`': {"mode": "updates"},
    '`"updates"`, both gradient norms': {"mode": "updates", "stats": _BOTH},
}


def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter of a Llama, with 32,000 tokens."""
    d, kv, inside, layers = MODELS[model]
    of_layer = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (inside, d),
        "mlp.up_proj": (inside, d),
        "mlp.down_proj": (d, inside),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    found = {"embed_tokens.weight": (32000, d)}
    for i in range(layers):
        found |= {f"layers.{i}.{name}.weight": shape for name, shape in of_layer.items()}
    return found | {"norm.weight": (d,), "lm_head.weight": (32000, d)}


def part_of(shape: tuple[int, ...], ranks: int) -> int:
    """Return the elements that fully_shard() leaves on rank 0, which has the most."""
    with torch.device("meta"):
        return torch.empty(shape).chunk(ranks)[0].numel()


def trajectory_of(names: list[str], elements: int, settings: Mapping[str, Any]) -> tuple[Trajectory, list[Tensor]]:
    """Return a Trajectory of float32 tensors with these names and so many elements each."""
    tensors = [torch.nn.Parameter(torch.ones(elements)) for _ in names]
    optimizer = torch.optim.AdamW(tensors, lr=1e-3)
    return Trajectory(list(zip(names, tensors, strict=True)), optimizer=optimizer, **settings), tensors


def kept(names: list[str], settings: Mapping[str, Any]) -> tuple[int, float]:
    """Return the bytes that come with the parameters, and those that come with each element."""
    sizes = 64, 128
    plans = [sum(line.bytes for line in trajectory_of(names, size, settings)[0].plan()) for size in sizes]
    slope = (plans[1] - plans[0]) / (len(names) * (sizes[1] - sizes[0]))
    return round(plans[0] - slope * len(names) * sizes[0]), slope


def sent(names: list[str], settings: Mapping[str, Any]) -> int:
    """Return the bytes of a rank's sums and maxima over a window."""
    trajectory, tensors = trajectory_of(names, 1, settings)
    optimizer = trajectory._optimizers[0]
    for step in range(WINDOW):
        for tensor in tensors:
            tensor.grad = torch.full_like(tensor, 1.0 + step)
        trajectory.observe_gradients()
        trajectory.observe_used_gradients(optimizer)
        optimizer.step()
        trajectory.observe_step()
    part = trajectory.rank_part()
    assert isinstance(part, RankPart), part
    assert part.holding is not None
    part.holding.turn_to((0,))
    part.holding.ownership = Ownership.of([describe(part.holding._parameters())], (0,), 0)
    packed = part.packed()
    assert isinstance(packed.sums, list)
    return sum(tensor.nbytes for tensor in (*packed.sums, *packed.largest))


def rows() -> list[dict[str, Any]]:
    """Return a row for each mode and model."""
    found = []
    for mode, settings in MODES.items():
        for model in MODELS:
            shapes = shapes_of(model)
            fixed, slope = kept(list(shapes), settings)
            parts = {ranks: sum(part_of(shape, ranks) for shape in shapes.values()) for ranks in RANKS}
            found.append(
                {
                    "mode": mode,
                    "model": model,
                    "parameters": len(shapes),
                    "elements": sum(map(math.prod, shapes.values())),
                    "bytes_fixed": fixed,
                    "bytes_per_element": slope,
                    "kept": {str(ranks): round(fixed + slope * elements) for ranks, elements in parts.items()},
                    "sent": sent(list(shapes), settings),
                }
            )
    return found


def split_rows() -> list[dict[str, Any]]:
    """Return a row for each model under DDP in mode "exact", without and with split_replicas: what a rank keeps, of
    several the one that keeps most."""
    found = []
    for model in MODELS:
        shapes = shapes_of(model)
        fixed, slope = kept(list(shapes), MODES['`"exact"`'])
        with torch.device("meta"):
            held = [(name, torch.empty(shape)) for name, shape in shapes.items()]
        row: dict[str, Any] = {"model": model, "whole": round(fixed + slope * sum(t.numel() for _, t in held))}
        for ranks in REPLICAS:
            numbers = tuple(range(ranks))
            of_ranks = [Shares().mine(held, Group(None, numbers, place)) for place in numbers]
            each = [kept(sorted(share), MODES['`"exact"`'])[0] + slope * sum(math.prod(shapes[n]) for n in share)
                    for share in of_ranks]  # fmt: skip
            row[str(ranks)] = round(max(each))
        found.append(row)
    return found


def split_table(found: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of DDP in docs/distributed.md."""
    heads = [f"with `split_replicas=True`, {ranks} ranks" for ranks in REPLICAS]
    lines = [f"| model | DDP | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    keys = "whole", *map(str, REPLICAS)
    return lines + [f"| {row['model']} | {' | '.join(_mb(row[key]) for key in keys)} |" for row in found]


def table(found: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table in docs/distributed.md."""
    heads = [f"{model}, {ranks} ranks" for model in MODELS for ranks in RANKS]
    lines = [
        f"| mode | bytes per element | {' | '.join(heads)} | sent, 7B | sent, 70B |",
        "|---|---|" + "---|" * (len(heads) + 2),
    ]
    for mode in MODES:
        mine = {row["model"]: row for row in found if row["mode"] == mode}
        cells = [_mb(mine[model]["kept"][str(ranks)]) for model in MODELS for ranks in RANKS]
        cells += [_mb(mine[model]["sent"]) for model in MODELS]
        lines.append(f"| {mode} | {mine['7B']['bytes_per_element']:g} | {' | '.join(cells)} |")
    return lines


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def main() -> None:
    found = {"fsdp2": rows(), "ddp": split_rows()}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join([*table(found["fsdp2"]), "", *split_table(found["ddp"])]))


if __name__ == "__main__":
    main()
