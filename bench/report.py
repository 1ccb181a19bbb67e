"""What the benchmarks measured: rows held against targets, merged by name into bench/results/<machine>.json."""

from __future__ import annotations

import ast
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

import lipcore

FOLDER = Path(__file__).parent


@dataclass
class Row:
    """One measured number and, where there is one, the target it is held against."""

    name: str
    measured: float
    unit: str
    target: float | None
    better: Literal["higher", "lower"] | None
    details: dict[str, Any] = field(default_factory=dict)
    benchmark: str = ""  # file::function[parameters]

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.measured >= self.target if self.better == "higher" else self.measured <= self.target

    @property
    def line(self) -> str:
        """Target, unit and verdict as the table shows them."""
        sign = {"higher": ">=", "lower": "<=", None: "  "}[self.better]
        target = f"{sign}{self.target:>8.3g}" if self.target is not None else " " * 10
        return f"{target}  {self.unit}{'   MISSED' if self.met is False else ''}"


class Report:
    """Rows of one session."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.running = ""  # the benchmark that adds now
        self.finished: set[str] = set()

    def add(
        self,
        name: str,
        measured: float,
        unit: str,
        *,
        target: float | None = None,
        better: Literal["higher", "lower"] | None = None,
        **details: Any,
    ) -> None:
        """`target` and `better` go together; a row without them is a finding, not a promise."""
        if (target is None) != (better is None):
            raise ValueError(f"{name}: expected target and better together, got {target=}, {better=}")
        if any(row.name == name for row in self.rows):
            raise ValueError(f"{name}: two rows of this name; results are merged by name, so it has to be unique")
        self.rows.append(Row(name, measured, unit, target, better, details, self.running))


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
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=FOLDER, check=False
    )
    return run.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """Where and with what this session measured."""
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


# What may differ between the rows of one file, because they were measured on different days.
_OF_A_ROW = ("commit", "date", "torch", "isa")


def path_for(here: dict[str, Any], folder: Path = FOLDER / "results") -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", f"{here['cpu']} {here['cores']} cores".lower()).strip("-")
    return folder / f"cpu-{slug}.json"


@cache
def _functions(file: Path) -> frozenset[str]:
    if not file.exists():
        return frozenset()
    return frozenset(node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef))


def _is_stale(row: dict[str, Any], finished: Iterable[str], folder: Path) -> bool:
    """No benchmark of today's sources makes it, or the one that did has just run without doing so."""
    file, _, function = row.get("benchmark", "").partition("[")[0].partition("::")
    return function not in _functions(folder / file) or row["benchmark"] in finished


def merge(
    path: Path, report: Report, here: dict[str, Any], *, drop_stale: bool = False, folder: Path = FOLDER
) -> list[str]:
    """Write the session's rows over those of the same name; return the names of rows that were dropped.

    Rows that were not measured now stay, each with the commit, date, torch and ISA of its own session. Only with
    `drop_stale` do those go that no benchmark makes any more.
    """
    kept: list[dict[str, Any]] = []
    if path.exists():
        before = json.loads(path.read_text())
        # A file from before rows had their own: what the session had is true of each.
        kept = [{key: before["machine"].get(key) for key in _OF_A_ROW} | row for row in before["rows"]]
    own = {key: here[key] for key in _OF_A_ROW}
    measured = {row.name: asdict(row) | {"met": row.met} | own for row in report.rows}
    dropped = []
    if drop_stale:
        dropped = [
            row["name"] for row in kept if row["name"] not in measured and _is_stale(row, report.finished, folder)
        ]
    rows = {row["name"]: row for row in kept if row["name"] not in dropped} | measured  # an old row keeps its place
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"machine": here, "rows": list(rows.values())}, indent=1) + "\n"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)  # never half a file
    return dropped
