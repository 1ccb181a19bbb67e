"""``lipcore demo``: fitting a harder task takes larger local Lipschitz constants and a longer normalised length."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

from lipcore.demo.output import DemoError, staging
from lipcore.models.arguments import check_count

__all__ = ["DemoError", "run"]

NEXT = """
What to do next:
  look at a recorded run  lipcore report {run} -o run.html   (pip install "lipcore[report]")
  take its numbers        lipcore export {run} --csv numbers.csv
  record your own         lipcore.watch(model, optimizer, run="runs/a") before the loop: docs/record.md"""
_NEEDED = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "rich": "rich"}


def run(out: Path, *, seeds: int | None = None, quick: bool = False, force: bool = False) -> None:
    """Train, write ``out/figure.png``, ``out/metrics.json`` and records of some runs in ``out/runs``, print the table.

    Args:
        out: the folder; the files appear in it at the very end, or not at all.
        seeds: runs per task and difficulty; default: each task's own number.
        quick: a few epochs only.
        force: write into a folder that is not empty.

    Raises:
        DemoError: a package is missing, or `out` cannot be written or would be overwritten. Nothing was trained then.
    """
    check_count("seeds", seeds, optional=True)
    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise DemoError(f"{', '.join(missing)} not installed; run: pip install 'lipcore[demo]'")
    from lipcore.demo import figure, metrics, table, tasks, train

    chosen = [task.quick() if quick else task for task in tasks.TASKS]
    chosen = [task.with_seeds(seeds) if seeds is not None else task for task in chosen]
    with staging(out, force=force) as folder:
        start = time.perf_counter()
        results = train.train_all(chosen, folder / "runs")
        seconds = time.perf_counter() - start
        figure.draw(results, folder / "figure.png", quick=quick)
        metrics.write(results, folder / "metrics.json", quick=quick, seconds=seconds)
    table.show(results, quick=quick)
    print(f"\nTrained in {seconds:.0f} s. Wrote {out / 'figure.png'}, {out / 'metrics.json'} and {out / 'runs'}.")
    hardest = out / "runs" / f"{chosen[0].name}-{chosen[0].levels[-1]:g}"
    print(NEXT.format(run=hardest))
