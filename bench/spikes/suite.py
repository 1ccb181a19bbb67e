"""The suite: which trainings there are, their recording in processes, and the results made of what was recorded."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lipcore.metric.results import json_ready
from spikes import organic
from spikes.evaluate import BUDGET, calibrated, false_alarms, faults, samples, totals
from spikes.models import TASKS
from spikes.run import AFTER, BEFORE, Series, clean, faulty

HERE = Path(__file__).parent
THRESHOLDS = HERE / "thresholds.json"
RESULTS = HERE.parent / "results" / "spikes.json"
FIGURE = RESULTS.with_suffix(".png")


@dataclass(frozen=True)
class Size:
    """Numbers of trainings of each kind, per model, and the steps of those without a fault."""

    calibration: int = 12
    clean: int = 7
    faulty: int = 7
    organic: int = 4
    steps: int = 1000
    before: int = BEFORE
    tasks: tuple[str, ...] = tuple(TASKS)


Job = tuple[str, str, int, Size]  # kind, task, seed, size
# Seeds of one kind are no other's: thresholds come from the first alone.
_FIRST_SEED = {"calibration": 1000, "clean": 2000, "faulty": 3000, "ramped": 4000, "flat": 5000, "hot": 6000}
_FINAL = ("clean", "faulty", "ramped", "flat", "hot")


def jobs(size: Size, *, calibration: bool) -> list[Job]:
    """Return the trainings to record: those that thresholds come from, or the final ones, seed by seed."""
    number = {"calibration": size.calibration, "clean": size.clean, "faulty": size.faulty}
    kinds = ("calibration",) if calibration else _FINAL
    return [
        (kind, task, _FIRST_SEED[kind] + i, size)
        for i in range(max(number.values()))
        for kind in kinds
        for task in size.tasks
        if i < number.get(kind, size.organic)
    ]


def _record(job: Job) -> dict[str, Series]:
    kind, task, seed, size = job
    if kind == "faulty":
        return faulty(task, seed, size.before, AFTER)
    if kind in ("calibration", "clean"):
        return {"": clean(task, seed, size.steps)}
    make: Callable[[str, int], Series] = getattr(organic, kind)
    return {"": make(task, seed)}


def _record_to(work: tuple[Job, Path]) -> str:
    job, folder = work
    path = path_of(job, folder)
    flat = {f"{part}/{name}": array for part, series in _record(job).items() for name, array in series.items()}
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **flat)
    os.replace(partial, path)
    return path.name


def path_of(job: Job, folder: Path) -> Path:
    """Return where a training is recorded."""
    kind, task, seed, _ = job
    return folder / f"{task}-{kind}-{seed}.npz"


def prepare() -> None:
    """Use one thread, and keep quiet: in every process that trains."""
    torch.set_num_threads(1)
    logging.getLogger("lipcore").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def record_all(work: list[Job], folder: Path, processes: int) -> None:
    """Record trainings that are not in the folder yet."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [(job, folder) for job in work if not path_of(job, folder).exists()]
    if processes == 1:
        for each in waiting:
            _record_to(each)
        return
    with multiprocessing.get_context("spawn").Pool(processes, prepare) as pool:
        for done, name in enumerate(pool.imap_unordered(_record_to, waiting), 1):
            print(f"{done} of {len(waiting)}: {name}", flush=True)


def recorded(job: Job, folder: Path) -> dict[str, Series]:
    """Return a recorded training, by its parts."""
    found: dict[str, Series] = {}
    with np.load(path_of(job, folder)) as arrays:
        for key in arrays.files:
            part, _, name = key.partition("/")
            found.setdefault(part, {})[name] = arrays[key]
    return found


def _of(kind: str, task: str, size: Size, folder: Path) -> list[dict[str, Series]]:
    work = jobs(size, calibration=kind == "calibration")
    return [recorded(job, folder) for job in work if job[:2] == (kind, task)]


def _plain(kind: str, task: str, size: Size, folder: Path) -> list[Series]:
    return [run[""] for run in _of(kind, task, size, folder)]


def calibrate(size: Size, folder: Path, path: Path) -> None:
    """Write the thresholds of every detector, by model."""
    found = {task: calibrated(_plain("calibration", task, size, folder)) for task in size.tasks}
    write(path, {"budget_per_1000": BUDGET, "runs": size.calibration, "steps": size.steps, "thresholds": found})


def results(size: Size, folder: Path, limits: Mapping[str, Any], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate what was recorded with frozen thresholds."""
    document: dict[str, Any] = {
        "machine": dict(machine),
        "size": {name: getattr(size, name) for name in ("clean", "faulty", "organic", "steps", "before")},
        "budget_per_1000": BUDGET,
        "models": {task: TASKS[task].words for task in size.tasks},
    }
    parts: dict[str, dict[str, Any]] = {
        name: {} for name in ("false_alarms", "faults", "samples", "explosions", "spikes")
    }
    for task in size.tasks:
        own = limits["thresholds"][task]
        faulty_runs = _of("faulty", task, size, folder)
        parts["false_alarms"][task] = false_alarms(_plain("clean", task, size, folder), own)
        parts["faults"][task] = faults(faulty_runs, own)
        parts["samples"][task] = samples(faulty_runs)
        ramped, flat = (_plain(kind, task, size, folder) for kind in ("ramped", "flat"))
        parts["explosions"][task] = organic.explosions(ramped, flat, own)
        parts["spikes"][task] = organic.spikes(_plain("hot", task, size, folder), own)
    return document | parts | {"totals": totals(parts["faults"].values())}


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document as JSON, numbers to six digits."""
    text = json.dumps(json_ready(document, digits=6), indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
