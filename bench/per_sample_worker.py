"""One fresh process of bench_per_sample: what a contender's step takes beside the plain one, or how much memory."""

from __future__ import annotations

import copy
import gc
import json
import resource
import statistics
import sys
import time

import torch
from measure import interleave
from per_sample_contenders import COMPILED, CONTENDERS, UNPROVED, Cannot, Step
from per_sample_models import COMPILED as COMPILED_MODELS
from per_sample_models import MODELS, Task

_CHECKED = 2  # samples that are compared with the truth


def _made(model: str, contender: str) -> tuple[Task, Step]:
    torch.manual_seed(0)
    task = (MODELS | COMPILED_MODELS)[model]()
    return task, (CONTENDERS | UNPROVED | COMPILED)[contender](task, torch.optim.SGD(task.model.parameters(), lr=1e-4))


def _error(model: str, contender: str) -> float:
    """Of the norms, relative to single samples in float64."""
    task, _ = _made(model, "plain")
    exact = copy.deepcopy(task.model).double()
    found = _made(model, contender)[1]()  # the same weights and batch
    if found is None:
        return 0.0
    parameters, worst = list(exact.parameters()), 0.0
    for i in range(min(_CHECKED, len(task.x))):
        x, y = (t[i : i + 1].double() if t.is_floating_point() else t[i : i + 1] for t in (task.x, task.y))
        grads = torch.autograd.grad(task.losses(exact(x), y).sum(), parameters)
        truth = float(torch.stack([g.square().sum() for g in grads]).sum().sqrt())
        worst = max(worst, abs(float(found[i]) - truth) / truth)
    return worst


def _time(model: str, contender: str, seconds: float) -> dict[str, float]:
    error = _error(model, contender)
    plain = "plain compiled" if contender in COMPILED else "plain"
    calls = {name: _made(model, kind)[1] for name, kind in (("plain", plain), ("control", plain), ("it", contender))}
    for call in calls.values():
        start = time.perf_counter()
        for _ in range(8):
            call()
            if time.perf_counter() - start > 1:
                break
    times = interleave(calls, seconds=seconds)
    ratio = {name: statistics.median(a / b for a, b in zip(times[name], times["plain"], strict=True)) for name in calls}
    return {
        "ratio": ratio["it"],
        "control": ratio["control"],
        "error": error,
        "plain": statistics.median(times["plain"]),
    }


def _memory(model: str, contender: str) -> dict[str, float]:
    """Peak of resident memory over what there was before the first step. A small model's step comes before, so that
    code which is loaded then is not counted as memory of the steps."""
    _made("paper", contender)[1]()
    _, step = _made(model, contender)
    gc.collect()
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    for _ in range(4):
        step()
    return {"growth": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, "before": before}


def main() -> None:
    what, model, contender, seconds = sys.argv[1:]
    torch.set_num_threads(1)
    try:
        found = _memory(model, contender) if what == "memory" else _time(model, contender, float(seconds))
    except Cannot as error:
        print(json.dumps({"cannot": str(error)}))
        return
    print(json.dumps(found))


if __name__ == "__main__":
    main()
