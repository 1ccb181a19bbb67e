"""docs/evidence.md shows the committed results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_modules import imported

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with imported(monkeypatch, "evidence_page") as found:
        yield found


def test_the_page_shows_the_results(module: Any) -> None:
    text = module.PAGE.read_text(encoding="utf-8")
    assert module.page(module.read(), text) == text, "run python bench/evidence_page.py"


def test_every_table_stands_on_the_page(module: Any) -> None:
    shown = re.findall(r"<!-- (?!end)(\w+) -->", module.PAGE.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(module.TABLES)


def test_faults_are_counted_once_per_run_and_rates_lie_within_their_intervals(module: Any) -> None:
    found = module.read()["spikes"]
    for task in found["models"]:
        for rows in found["faults"][task].values():
            assert all(row["runs"] == found["size"]["faulty"] for row in rows.values())
            assert all(
                row.get("right", 0) <= row.get("named", 0) <= row["found"] <= row["runs"] for row in rows.values()
            )
        for row in found["false_alarms"][task].values():
            assert row["low"] <= row["per_1000"] <= row["high"]
            assert row["steps"] == found["size"]["clean"] * (found["size"]["steps"] - 100)
    for total in found["totals"].values():
        assert total["low"] <= total["found"] / total["runs"] <= total["high"]


def test_trainscope_was_given_the_trainings_of_the_suite(module: Any) -> None:
    results = module.read()
    ours, theirs = results["spikes"], results["trainscope"]
    assert theirs["version"] == "1.8.1"
    for row in theirs["detectors"].values():
        assert list(row["faults"]) == list(ours["models"])
        for task, by_fault in row["faults"].items():
            assert list(by_fault) == list(ours["faults"][task])
            assert all(one["found"] <= one["runs"] == ours["size"]["faulty"] for one in by_fault.values())
            assert row["false_alarms"][task]["steps"] == ours["false_alarms"][task]["loss"]["steps"]


def test_the_default_alarm_keeps_to_its_budget(module: Any) -> None:
    found = module.read()["spikes"]
    for rows in found["false_alarms"].values():
        assert rows['alarms="default"']["low"] <= found["budget_per_1000"]
