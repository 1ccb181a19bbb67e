"""Collects what the benchmarks measure, prints it beside the targets and writes bench/results/<machine>.json."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import lipcore

_RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One measured number and the target it is held against."""

    name: str
    measured: float
    unit: str
    target: float
    better: Literal["higher", "lower"]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        return self.measured >= self.target if self.better == "higher" else self.measured <= self.target


class Report:
    """Rows of one session."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(
        self,
        name: str,
        measured: float,
        unit: str,
        *,
        target: float,
        better: Literal["higher", "lower"],
        **details: Any,
    ) -> None:
        self.rows.append(Row(name, measured, unit, target, better, details))


_report = Report()


@pytest.fixture(scope="session")
def report() -> Iterator[Report]:
    return _report


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    family = re.search(r"cpu family\s*:\s*(\d+)", text)
    name = found.group(1).strip() if found else platform.machine()
    return f"{name} (family {family.group(1)})" if family else name


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=_RESULTS.parent, check=False
    )
    return run.stdout.strip() or "unknown"


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "isa": lipcore._core.isa(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lipcore": lipcore.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table, each target beside what was measured."""
    if not _report.rows:
        return
    write = terminalreporter.write_line
    write("")
    width = max(len(row.name) for row in _report.rows)
    write(f"{'benchmark':<{width}}  {'measured':>10}  {'target':>10}  unit")
    for row in _report.rows:
        sign = ">=" if row.better == "higher" else "<="
        mark = "" if row.met else "   MISSED"
        write(f"{row.name:<{width}}  {row.measured:>10.3g}  {sign}{row.target:>8.3g}  {row.unit}{mark}")
    machine = _machine()
    _RESULTS.mkdir(exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['cores']} cores".lower()).strip("-")
    path = _RESULTS / f"cpu-{slug}.json"
    rows = [asdict(row) | {"met": row.met} for row in _report.rows]
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    write(f"written: {path}")
