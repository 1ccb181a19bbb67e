"""Recorded trainings with a planted fault, for what looks for its step, layer and sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import lipcore

AT = 140  #: the step of the fault
SAMPLE = 424_242  #: the id of a sample that is at fault


def faulty(
    run: Path,
    fault: str = "",
    *,
    steps: int = 160,
    at: int = AT,
    samples: bool = True,
    groups: bool = True,
    seed: int = 0,
    **watch: Any,
) -> lipcore.Monitor:
    """Train a small network, with a record, and one fault in step `at`.

    Args:
        fault: "rate" (that of the middle layer is 30 times as large, in one step), "sample" (an input that is 30 times
            too large), "label" (one that is far off), "batch" (all labels of a batch are), "nan" (in one input),
            "weights" (the middle layer's, written to between two steps), "element" (one of them, by 5 %), "raise" (an
            exception); none.
        samples: name them, and measure their gradients.
        groups: a group of parameters in the optimizer for each layer.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 1))
    layers = [{"params": layer.parameters()} for layer in model[::2]]
    optimizer = torch.optim.SGD(layers if groups else model.parameters(), lr=0.05)
    data = torch.Generator().manual_seed(seed + 1)
    norms = lipcore.PerSampleGradNorms(loss_reduction="mean", noise_scale=False)
    metrics = [lipcore.Trajectory(), norms] if samples else [lipcore.Trajectory()]
    watch = {"alarms": "default", "metrics": metrics, "window_steps": 50} | watch
    with lipcore.watch(model, optimizer, run=run, **watch) as monitor:
        for step in range(1, steps + 1):
            faulty_step, ids = step == at, torch.arange(32 * step, 32 * step + 32)
            x = torch.randn(32, 6, generator=data)
            y = x[:, 0].sin() + 0.5 * torch.randn(32, generator=data)
            if faulty_step and fault in ("sample", "nan", "label"):
                ids[7] = SAMPLE
                x[7] = {"sample": 30 * x[7], "nan": torch.full((6,), torch.nan), "label": x[7]}[fault]
                y[7] = 60.0 if fault == "label" else y[7]
            if faulty_step and fault == "batch":
                y = 12.0 - y
            each = (model(x)[:, 0] - y).square()
            monitor.log(loss=each.mean())
            if samples:
                monitor.log_batch(ids, losses=each, rng_state=torch.get_rng_state())
            each.mean().backward()
            if fault == "rate":
                optimizer.param_groups[1 if groups else 0]["lr"] = 1.5 if faulty_step else 0.05
            optimizer.step()
            optimizer.zero_grad()
            if faulty_step and fault == "weights":
                with torch.no_grad():
                    model[2].weight.mul_(3.0)
            if faulty_step and fault == "element":
                with torch.no_grad():
                    model[2].weight[3, 5] *= 1.05
            if faulty_step and fault == "raise":
                raise ValueError("enough of it")
    return monitor
