"""What a Monitor costs a training loop: fresh processes, a plain loop against itself as control beside every ratio."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lipcore

_WORKER = Path(__file__).parent / "overhead_worker.py"
_PROCESSES = 5


def _check_numbers(model_name: str, metrics: str) -> None:
    """Correctness first: lambda of the monitored step is that of autograd (for the transformer's integers that
    at the embedding's output)."""
    from overhead_worker import METRICS, MODELS

    torch.manual_seed(0)
    model, x = MODELS[model_name]()
    if model_name == "transformer":
        expected = _at_embedding(model, x).mean()
    else:
        expected = lipcore.local_lipschitz(model, x).mean()
    with lipcore.Monitor(model, metrics=METRICS[metrics]()) as monitor:
        model(x).square().mean().backward()
        monitor.step()
        (place,) = monitor.compute()["lipschitz"].local_lipschitz
        found = monitor.compute()["lipschitz"].local_lipschitz[place].mean.value
    assert abs(found - float(expected)) <= 1e-5 * float(expected)


def _at_embedding(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Per sample ||dL/du|| / ||dL/dy||, L the mean square of the outputs y, u the embedding's output."""
    kept = []
    embedding: Any = model.embedding
    handle = embedding.register_forward_hook(lambda module, arguments, output: kept.append(output))
    out = model(x)
    handle.remove()
    upper, lower = torch.autograd.grad(out.square().mean(), [kept[0], out])
    return upper.flatten(1).double().norm(dim=1) / lower.flatten(1).double().norm(dim=1)


@pytest.mark.parametrize(
    ("model", "metrics", "target", "title"),
    [
        ("mlp", "default", 1.25, "Monitor on the paper's MLP, batch 1"),
        ("mlp", "fast", 1.05, "Monitor on the paper's MLP, batch 1, read from the gradients"),
        ("cnn", "default", 1.03, "Monitor on a small CNN, batch 64"),
        ("transformer", "default", 1.03, "Monitor on a small transformer, 16 x 32 tokens"),
    ],
)
def bench_monitor(benchmark: Any, report: Any, model: str, metrics: str, target: float, title: str) -> None:
    _check_numbers(model, metrics)

    def once() -> dict[str, float]:
        run = subprocess.run(
            [sys.executable, str(_WORKER), model, metrics],
            capture_output=True,
            text=True,
            check=True,
            cwd=_WORKER.parent,
        )
        result: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
        return result

    found = [once() for _ in range(_PROCESSES - 1)] + [benchmark.pedantic(once, rounds=1, iterations=1)]
    median = statistics.median(f["monitored"] for f in found)
    control = statistics.median(f["control"] for f in found)
    details = {"control": control, "processes": [f["monitored"] for f in found], "step_us": found[-1]["step_us"]}
    report.add(title, median, "x plain", target=target, better="lower", **details)
