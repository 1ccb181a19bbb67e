"""The benchmarks' own bookkeeping: a session's rows join the committed ones, and the plot shows those."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_modules import imported

BENCH = Path(__file__).parents[2] / "bench"
HERE = {"cpu": "a CPU", "cores": 2, "isa": "base", "torch": "2.13.0", "commit": "new", "date": "2026-02-02"}


@pytest.fixture
def report(monkeypatch):
    with imported(monkeypatch, "report", "plots") as found:
        yield found


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "bench_a.py").write_text("def bench_one():\n    pass\n")
    return tmp_path


def session(report, *rows, benchmark="bench_a.py::bench_one[x]"):
    found = report.Report()
    found.running = benchmark
    for name, measured in rows:
        found.add(name, measured, "us", target=1.0, better="lower")
    found.finished.add(benchmark)
    return found


def merge(report, path, found, **options):
    report.merge(path, found, HERE | options.pop("here", {}), **options)
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


def test_measured_rows_replace_those_of_their_name_and_the_others_stay(report, folder):
    path = folder / "results" / "cpu.json"
    merge(report, path, session(report, ("a", 2.0), ("b", 3.0)), here={"commit": "old", "date": "2026-01-01"})
    rows = merge(report, path, session(report, ("b", 0.5), ("c", 4.0)))
    assert list(rows) == ["a", "b", "c"]
    assert {name: (row["measured"], row["commit"], row["date"]) for name, row in rows.items()} == {
        "a": (2.0, "old", "2026-01-01"),
        "b": (0.5, "new", "2026-02-02"),
        "c": (4.0, "new", "2026-02-02"),
    }
    assert not rows["a"]["met"]
    assert rows["b"]["met"]


def test_rows_of_files_without_their_own_commit_take_the_session_s(report, folder):
    path = folder / "cpu.json"
    row = {"name": "old", "measured": 1.0, "unit": "us", "target": 2.0, "better": "lower", "details": {}, "met": True}
    path.write_text(json.dumps({"machine": {"commit": "before", "date": "2025-01-01"}, "rows": [row]}))
    assert merge(report, path, session(report))["old"]["commit"] == "before"


def test_rows_that_no_benchmark_makes_go_only_when_asked(report, folder):
    path = folder / "cpu.json"
    merge(report, path, session(report, ("gone", 1.0), benchmark="bench_b.py::bench_gone"))
    merge(report, path, session(report, ("renamed", 1.0)))
    merge(report, path, session(report, ("not run now", 1.0), benchmark="bench_a.py::bench_one[y]"))
    found = session(report, ("name", 1.0))
    assert list(merge(report, path, found)) == ["gone", "renamed", "not run now", "name"]
    dropped = report.merge(path, found, HERE, drop_stale=True, folder=folder)
    assert dropped == ["gone", "renamed"]
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == ["not run now", "name"]


def test_a_row_without_target_is_neither_met_nor_missed(report):
    found = report.Report()
    found.add("ratio", 0.4, "of the path")
    assert found.rows[0].met is None
    assert "MISSED" not in found.rows[0].line
    with pytest.raises(ValueError, match="ratio: two rows of this name"):
        found.add("ratio", 0.5, "of the path")
    with pytest.raises(ValueError, match="target and better together"):
        found.add("other", 0.5, "of the path", target=1.0)


def test_the_plot_is_drawn_from_the_file_alone(report, tmp_path):
    pytest.importorskip("matplotlib")
    import plots

    rows = []
    for tensors, threads, elements in [(t, n, 10**e) for t in (1, 10) for n in (1, 2) for e in range(3, 9)]:
        shape = {"elements": elements, "tensors": tensors, "threads": threads, "dtype": "f32"}
        seconds = {name: elements * 1e-9 * (i + 1) for i, name in enumerate(plots._STYLES) if name != "cockpit"}
        rows.append({"details": shape | {"seconds": seconds}})
        rows.append({"details": shape | {"seconds": {"lipcore": 1.0, "cockpit": elements * 1e-8}}})
    rows.append({"details": {"elements": 10, "bytes_per_parameter": {}}})
    panels = plots.curves(rows)
    assert list(panels) == [(1, 1), (1, 2), (10, 1), (10, 2)]
    assert panels[1, 1]["lipcore"][0] == (1000, pytest.approx(1e-6))  # the one beside the others, not cockpit's
    assert len(panels[1, 1]["cockpit"]) == 6
    results, target = tmp_path / "cpu.json", tmp_path / "plot.png"
    results.write_text(json.dumps({"machine": {"cpu": "a CPU", "torch": "2"}, "rows": rows}))
    plots.draw(results, target)
    assert 5_000 < target.stat().st_size < 60_000
    results.write_text(json.dumps({"machine": {}, "rows": []}))
    with pytest.raises(SystemExit, match="no scaling rows"):
        plots.draw(results, target)
