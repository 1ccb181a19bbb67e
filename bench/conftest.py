"""Prints what the benchmarks measured beside the targets and merges it into bench/results/<machine>.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report import Report, machine, merge, path_for

_report = Report()


@pytest.fixture(scope="session")
def report() -> Iterator[Report]:
    return _report


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lipcore")
    group.addoption("--drop-stale", action="store_true", help="drop result rows that no benchmark makes any more")
    group.addoption("--results", type=Path, help="folder for the results instead of bench/results")


def pytest_runtest_setup(item: pytest.Item) -> None:
    _report.running = f"{item.path.name}::{item.name}"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _report.finished.add(_report.running)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table, each target beside what was measured."""
    if not _report.rows:
        return
    config, write = terminalreporter.config, terminalreporter.write_line
    write("")
    width = max(len(row.name) for row in _report.rows)
    write(f"{'benchmark':<{width}}  {'measured':>10}  {'target':>10}  unit")
    for row in _report.rows:
        write(f"{row.name:<{width}}  {row.measured:>10.3g}  {row.line}")
    here = machine()
    folder = config.getoption("--results")
    path = path_for(here, folder) if folder else path_for(here)
    for name in merge(path, _report, here, drop_stale=config.getoption("--drop-stale")):
        write(f"dropped: {name}")
    write(f"written: {path}")
