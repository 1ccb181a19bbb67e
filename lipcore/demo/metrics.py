"""metrics.json: every run's values per epoch, with the settings, versions and machine they came from."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import sklearn
import torch

import lipcore
from lipcore import _core
from lipcore.demo import summary
from lipcore.demo.runs import TaskResult
from lipcore.demo.tasks import HOW_CHOSEN
from lipcore.metric.results import json_ready

_SCHEMA = 1
_UNITS = {
    "train_loss": "mean over the epoch, each batch before its update",
    "test_loss": "at the end of the epoch",
    "normalized_length": "sum over the epoch of ||dL/du|| / |dL/dyhat|, divided by the number of training samples",
    "grad_norm": "norm of the batch gradient, mean over the epoch",
    "lipschitz_mean": "||grad_x f|| at the training samples as visited in the epoch, mean",
    "lipschitz_p99": "the same, 99th percentile",
    "skipped": "samples whose dL/dyhat was exactly 0: they add nothing to the length and are left out of the "
    "Lipschitz constants",
}


def write(results: list[TaskResult], path: Path, *, quick: bool, seconds: float) -> None:
    document = {
        "schema": _SCHEMA,
        "quick": quick,
        "how_chosen": HOW_CHOSEN,
        "training_seconds": seconds,
        "versions": _versions(),
        "machine": _machine(),
        "values_per_epoch": _UNITS,
        "tasks": [_task(result) for result in results],
    }
    path.write_text(
        json.dumps(json_ready(document, digits=7), indent=1, allow_nan=False, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )


def _task(result: TaskResult) -> dict[str, Any]:
    return {
        "settings": result.task.settings(),
        "summary": [asdict(row) for row in summary.rows(result)],
        "in_order": asdict(summary.order(result)),
        "equal_loss": summary.equal_loss(result),
        "rank_correlations_with_test_loss": summary.rank_correlations(result),
        "runs": [asdict(run) | {"cumulative_length": run.cumulative_length} for run in result.runs],
    }


def _versions() -> dict[str, str]:
    return {
        "lipcore": lipcore.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "scikit-learn": sklearn.__version__,
    }


def _machine() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "lipcore_isa": _core.isa(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
