"""Pictures and tables of a recorded run."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from windows_of import window_of

from lipcore.cli import main
from lipcore.recording import Run, RunRecord, open_run
from lipcore.recording.export import export_csv
from lipcore.recording.plots import heat_map
from lipcore.recording.series import Series

pytest.importorskip("matplotlib", reason="needs the extra `demo`")


def recorded(folder: Path, steps: int = 200) -> Run:
    rng = np.random.default_rng(0)
    record = RunRecord(folder, level="tensor")
    record.begin(0)
    if steps:
        values = np.exp(rng.standard_normal((steps, 4)))
        values[5] = np.nan
        record.add_steps(
            1, {"update_norm": values}, ["a", "b", "c<script>", "total"], ["group", "group", "group", "total"]
        )
    for i in range(3):
        record.add_window(window_of(i))
    record.close()
    return open_run(folder)


def test_lines_are_the_series(tmp_path: Path) -> None:
    run = recorded(tmp_path / "one")
    figure = run.plot("update_norm")
    (axis,) = figure.axes
    series = run.series("update_norm")
    assert [line.get_label() for line in axis.lines] == series.places
    for line, column in zip(axis.lines, series.values.T, strict=True):
        assert np.array_equal(line.get_ydata(), column, equal_nan=True)
        assert np.array_equal(line.get_xdata(), series.steps)
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_yscale()) == ("optimizer step", "norm", "log")
    assert axis.get_title() == "update_norm of one"
    figure.savefig(tmp_path / "x.png")


def test_a_map_has_a_row_per_place(tmp_path: Path) -> None:
    run = recorded(tmp_path / "one", steps=3000)
    figure = run.heatmap("update_norm")
    mesh = figure.axes[0].collections[0]
    cells = mesh.get_array()
    assert cells.shape == (3, 600)
    values = run.series("update_norm").values[:, :3]
    assert np.allclose(cells[:, 0], np.nanmax(values[:5], axis=0))
    assert mesh.get_coordinates()[0, [0, 1, -1], 0].tolist() == [0, 5, 3000]  # steps 1 to 5 end at 5
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b", "c<script>"]
    figure.savefig(tmp_path / "x.png")


def test_a_cell_of_a_window_ends_where_the_window_does() -> None:
    steps, values = np.array([20, 40, 60]), np.array([[1.0], [2.0], [3.0]])
    figure = heat_map(Series("x", steps, values, ["a"], values, values), "x")
    assert figure.axes[0].collections[0].get_coordinates()[0, :, 0].tolist() == [0, 20, 40, 60]


def test_two_runs_in_one_picture(tmp_path: Path) -> None:
    figure = recorded(tmp_path / "one").compare_plot(recorded(tmp_path / "two", 100), "update_norm")
    assert [line.get_label() for line in figure.axes[0].lines] == ["one", "two"]


@pytest.mark.parametrize("name", ["one/norm.mean", "norm.mean", "alone.last"])
def test_quantities_of_windows_and_of_nothing(tmp_path: Path, name: str) -> None:
    run = recorded(tmp_path / "one", steps=0)
    for figure in (run.plot(name), run.heatmap(name)):
        figure.savefig(tmp_path / "x.png")


def test_every_number_is_in_the_table(tmp_path: Path) -> None:
    run = recorded(tmp_path / "one", steps=20)
    count = export_csv(run, tmp_path / "x.csv")
    with open(tmp_path / "x.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count
    for name in run.quantities:
        series = run.series(name)
        mine = [row for row in rows if row["quantity"] == name]
        assert len(mine) == series.values.size
        found = np.array([float(row["value"]) for row in mine]).reshape(len(series.places), -1).T
        assert np.array_equal(found, series.values, equal_nan=True)


def test_a_table_reads_the_windows_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, read = recorded(tmp_path / "one", steps=20), []
    windows = Run.each_window
    monkeypatch.setattr(Run, "each_window", lambda self: read.append(1) or windows(self))
    export_csv(run, tmp_path / "x.csv")
    assert len(read) == 1


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    recorded(tmp_path / "one", steps=20)
    assert main(["export", str(tmp_path / "one"), "--parquet", str(tmp_path / "x.parquet")]) == 0
    assert parquet.read_table(tmp_path / "x.parquet").column_names[:3] == ["quantity", "place", "step"]


@pytest.mark.ci
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path / "one", steps=20)
    assert main(["export", str(tmp_path / "one"), "--csv", str(tmp_path / "x.csv")]) == 0
    assert "x.csv: " in capsys.readouterr().out
    assert main(["export", str(tmp_path / "none"), "--csv", str(tmp_path / "x.csv")]) == 2
    assert "lipcore export: error: path: there is no run" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "one"), "--csv", str(tmp_path / "no" / "x.csv")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.glob("*half"))
    assert main([]) == 0
    assert all(command in capsys.readouterr().out for command in ("demo",))
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("lipcore", "torch", "instruction set", "CUDA kernels", "extra hf"))
