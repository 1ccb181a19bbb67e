"""Public architectures: how their norms are taken, how right and at what cost; writes the table of docs/models.md.

python bench/models_table.py          measure everything again, then write the page
python bench/models_table.py --page   write the page from bench/results/models.json alone
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "models.json", ROOT / "docs" / "models.md"
WARM_UP, ROUNDS = 10, 15  # steps before anything is timed: the first ones are proved

Row = dict[str, Any]


def measured(build: Any) -> Row:
    """Return the row of one model: its parameters by way, the largest error, and ratios of the whole step's time."""
    from public_cases import Case, errors

    from lipcore import PerSampleGradNorms

    torch.manual_seed(0)
    case = build()
    case.model.train()
    plain, control = (Case(copy.deepcopy(case.model), case.batch, case.terms, case.loss) for _ in range(2))
    expected = case.norms_sq()
    row: Row = {"parameters": sum(p.numel() for p in case.model.parameters())}
    with PerSampleGradNorms(case.model, loss_reduction="mean", loss_terms=case.terms(case.batch)) as metric:
        case.loss(case.model, case.batch).backward()
        row["error"] = max(errors(metric.per_parameter, expected).values())
        row["proved"] = not metric.unproved
        row |= ways(metric, case)
        times = timed([step_of(each) for each in (case, plain, control)])
    row["step_ms"] = statistics.median(times[1]) * 1e3
    for name, each in (("ratio", times[0]), ("control", times[2])):
        row[name] = statistics.median(t / p for t, p in zip(each, times[1], strict=True))
    return row


def ways(metric: Any, case: Any) -> dict[str, int]:
    """Return how many parameters are measured by rules, by sums over rows of the graph, and at its other nodes."""
    trained = {id(p) for p in case.model.parameters() if p.requires_grad}
    graph = [line.rule for line in metric.plan() if line.rule.startswith("graph: ")]
    sums = sum(rule.startswith("graph: sums over rows") for rule in graph)
    return {"rules": len(trained) - len(graph), "sums": sums, "nodes": len(graph) - sums}


def step_of(case: Any) -> Any:
    """Return a training step of a case."""
    optimizer = torch.optim.AdamW([p for p in case.model.parameters() if p.requires_grad], 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        case.loss(case.model, case.batch).backward()
        optimizer.step()

    return step


def timed(steps: list[Any]) -> list[list[float]]:
    """Return seconds of every step of several that take turns."""
    found: list[list[float]] = [[] for _ in steps]
    for _ in range(WARM_UP):
        for step in steps:
            step()
    for turn in range(ROUNDS):
        for i in range(len(steps)) if turn % 2 else reversed(range(len(steps))):
            start = time.perf_counter()
            steps[i]()
            found[i].append(time.perf_counter() - start)
    return found


def measure() -> dict[str, Any]:
    """Return the results of all models, one thread."""
    sys.path[:0] = [str(ROOT / "tests" / "helpers")]
    import peft
    import transformers
    from public_models import MODELS
    from report import machine

    torch.set_num_threads(1)
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    rows = {}
    for name, build in MODELS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows[name] = measured(build)
        print(f"{name:40} {rows[name]['error']:.0e} {rows[name]['ratio']:.2f} {rows[name]['control']:.2f}", flush=True)
    return {"machine": machine() | versions, "rows": rows}


TABLE = """## The models

Parameters are counted as tensors by the way in which they are measured: by a layer's rule, by sums over rows at a node
of the graph, or by products or replays at other nodes. The ratio is that of the whole training step (forward, backward,
AdamW) to the plain step, with the ratio of another plain step beside it as control; the steps took turns, and medians
are shown. The models are so small that a step is mostly calls, of which lipcore adds some per layer:
[benchmarks.md](benchmarks.md) has models of ordinary width, where the ratio is nearer to 1.

{models} architectures, on CPU: {cpu}, {cores} cores, of which one was used; {date}, torch {torch}, transformers
{transformers}, peft {peft}. `python bench/models_table.py` measures them again and writes this section.

| architecture | parameters | by rules | by sums | other nodes | largest error | plain step, ms | CPU ratio | control |
|---|---|---|---|---|---|---|---|---|
{rows}
"""


def page(results: dict[str, Any], text: str) -> str:
    """Return docs/models.md with the section that shows these results."""
    rows = "\n".join(
        f"| {name} | {r['parameters']:,} | {r['rules']} | {r['sums']} | {r['nodes']} | {r['error']:.0e} | "
        f"{r['step_ms']:.1f} | {r['ratio']:.2f} | {r['control']:.2f} |"
        for name, r in results["rows"].items()
    )
    table = TABLE.format(models=len(results["rows"]), rows=rows, **results["machine"])
    return text[: text.index(table.splitlines()[0])] + table


def main() -> None:
    """Measure and write the page, or write the page alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page from the committed results alone")
    if not parser.parse_args().page:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page(results, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
