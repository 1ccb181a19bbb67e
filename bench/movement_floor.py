"""How far steps of torch's optimizers are from their formulas, for the limits of unexplained movement.

    python bench/movement_floor.py [--steps 300]

Trains a small network with every rule, implementation and dtype, with a schedule, and writes the largest difference of
a parameter, in half ulps of w and dw together, to results/movement-floor.json. A limit has to be far above it.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lipcore.functional.update_sums import MOMENTUM, UNEXPLAINED
from lipcore.trajectory.sources import OptimizerSource
from lipcore.trajectory.unexplained import LIMITS

RULES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD, weight decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "SGD, maximize": (torch.optim.SGD, {"lr": 1e-3, "weight_decay": 0.1, "maximize": True}),
    "momentum": (torch.optim.SGD, {"lr": 0.03, "momentum": 0.9}),
    "momentum, weight decay, dampening": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1, "dampening": 0.3},
    ),
    "Nesterov": (torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "nesterov": True}),
    "Nesterov, weight decay": (
        torch.optim.SGD,
        {"lr": 0.03, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "Adam": (torch.optim.Adam, {"lr": 1e-2}),
    "Adam, weight decay": (torch.optim.Adam, {"lr": 1e-3, "weight_decay": 0.1}),
    "Adam, amsgrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "AdamW, fast": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.5, "eps": 1e-3}),
    "AdamW, slow": (torch.optim.AdamW, {"lr": 1e-7}),
    "AdamW, maximize, amsgrad": (torch.optim.AdamW, {"lr": 1e-4, "maximize": True, "amsgrad": True}),
}
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def largest(rule: str, implementation: str, dtype: torch.dtype, steps: int) -> float | None:
    """Return the largest difference of a run; None where this is not checked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 24), nn.LayerNorm(24), nn.Linear(24, 64), nn.GELU(), nn.Linear(64, 1))
    model.append(nn.Linear(1, 1))  # single elements, which go through 0
    nn.init.zeros_(model[-1].bias)
    model = model.to(dtype)
    kind, settings = RULES[rule]
    optimizer = kind(model.parameters(), **settings, **IMPLEMENTATIONS[implementation])  # type: ignore[arg-type]
    owner: dict[str, Any] = dict(model.named_parameters())
    try:
        source = OptimizerSource(optimizer, [(name, owner, name) for name in owner])
    except ValueError:
        return None
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(step / 30))
    unit = torch.finfo(dtype).eps / 2
    found = 0.0
    for step in range(steps):
        ids = torch.randint(0, 40, (32,))
        loss = (model(ids).squeeze(-1) - torch.sin(ids.to(dtype))).square().mean()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        (loss * (1000 if step == steps // 2 else 1)).backward()
        if step % 3 == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        previous = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        rows, squares = source.sums(previous=previous)
        schedule.step()
        sizes = rows[:, 0] + rows[:, 4]
        for mix in source.mixes():
            sizes = sizes + squares[MOMENTUM].nan_to_num(0) * mix**2
        score = (squares[UNEXPLAINED] / (unit**2 * sizes)).sqrt()
        found = max(found, float(score.nan_to_num(0, posinf=math.inf).max()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    rows = []
    for dtype in DTYPES:
        for rule in RULES:
            for implementation in IMPLEMENTATIONS:
                found = largest(rule, implementation, dtype, steps)
                name = str(dtype).removeprefix("torch.")
                rows.append(
                    {
                        "dtype": name,
                        "rule": rule,
                        "implementation": implementation,
                        "half_ulps": found and round(found, 3),
                    }
                )
                print(f"{name:9} {rule:34} {implementation:9} {found if found is None else format(found, '.3g')}")
    limits = {str(dtype).removeprefix("torch."): limit for dtype, limit in LIMITS.items()}
    data = {"torch": torch.__version__, "steps": steps, "limits": limits, "rows": rows}
    path = Path(__file__).parent / "results" / "movement-floor.json"
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
