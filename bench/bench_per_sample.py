"""A training step with the gradient norm of every sample, against the plain step: fresh processes, one thread."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from per_sample_contenders import CONTENDERS, UNPROVED
from per_sample_models import COMPILED, MODELS

_WORKER = Path(__file__).parent / "per_sample_worker.py"
_TITLES = {
    "paper": "the paper's MLP, batch 1",
    "mlp": "MLP 784-1024-1024-10, batch 256",
    "cnn": "CNN with GroupNorm, 3x32x32, batch 64",
    "gpt": "GPT-like, 4 layers of 256, T=256, batch 8",
    "gpt-long": "GPT-like, 4 layers of 256, T=2048, batch 2",
    "gpt-tied": "GPT-like, 4 layers of 256, embedding tied to the head, T=256, batch 8",
}
_TARGETS = {
    ("paper", "lipcore"): 1.05,
    ("mlp", "lipcore"): 1.05,
    ("cnn", "lipcore"): 1.3,
    ("gpt", "lipcore"): 1.35,
    ("gpt", "lipcore fused"): 1.05,
}
_OURS, _PROCESSES, _SECONDS = ("lipcore", "lipcore fused"), 3, 4


def _run(what: str, model: str, contender: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, str(_WORKER), what, model, contender, str(_SECONDS)]
    env = os.environ | environment
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_WORKER.parent, env=env)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    if "cannot" in found:
        pytest.skip(f"{contender}, {_TITLES[model]}: {found['cannot']}")
    return found


@pytest.mark.parametrize("contender", [name for name in CONTENDERS if name != "plain"])
@pytest.mark.parametrize("model", MODELS)
def bench_step(benchmark: Any, report: Any, model: str, contender: str) -> None:
    ours = contender in _OURS
    found = [benchmark.pedantic(_run, ("time", model, contender), rounds=1)]
    found += [_run("time", model, contender) for _ in range(_PROCESSES - 1 if ours else 0)]
    error = max(f["error"] for f in found)
    if ours:
        assert error <= 1e-5
    details = {
        "error": error,
        "control": statistics.median(f["control"] for f in found),
        "processes": [f["ratio"] for f in found],
        "plain_ms": 1e3 * statistics.median(f["plain"] for f in found),
    }
    target = _TARGETS.get((model, contender))
    better = None if target is None else "lower"
    ratio = statistics.median(f["ratio"] for f in found)
    title = f"per-sample norms by {contender}: {_TITLES[model]}"
    report.add(title, ratio, "x plain", target=target, better=better, **details)


@pytest.mark.parametrize("model", COMPILED)
def bench_compiled_step(benchmark: Any, report: Any, model: str) -> None:
    """The whole step, with torch.compile(model, fullgraph=True) on both sides."""
    found = benchmark.pedantic(_run, ("time", model, "lipcore compiled"), rounds=1)
    assert found["error"] <= 1e-5
    details = {"error": found["error"], "control": found["control"], "plain_ms": 1e3 * found["plain"]}
    title = f"per-sample norms by lipcore, compiled: {_TITLES[model]}"
    report.add(title, found["ratio"], "x plain", **details)


# glibc keeps freed blocks of up to 32 MiB in a heap that only shrinks from its end, so a small block behind them, of
# whoever it is, keeps all of them resident. With this threshold large blocks are mapped, and returned when freed.
_MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
_MALLOCS = {"": _MAPPED, " with glibc's own settings": {}}


@cache
def _growth(model: str, contender: str, malloc: str) -> float:
    growth: float = _run("memory", model, contender, **_MALLOCS[malloc])["growth"]
    return growth


@pytest.mark.parametrize("malloc", _MALLOCS, ids=["mapped", "glibc"])
@pytest.mark.parametrize("contender", [*_OURS, *UNPROVED, "Opacus ghost"])
@pytest.mark.parametrize("model", ["mlp", "cnn", "gpt", "gpt-long"])
def bench_memory(benchmark: Any, report: Any, model: str, contender: str, malloc: str) -> None:
    """Growth of resident memory by the steps, over that of the plain one. At batch 1 both are lost in the noise."""
    theirs = benchmark.pedantic(_growth, (model, contender, malloc), rounds=1)
    plain = _growth(model, "plain", malloc)
    target, better = (1.05, "lower") if contender.startswith("lipcore") and not malloc else (None, None)
    title = f"per-sample norms by {contender}: {_TITLES[model]}: peak memory of steps{malloc}"
    report.add(title, theirs / plain, "x plain", target=target, better=better, plain_mib=plain / 2**20)
