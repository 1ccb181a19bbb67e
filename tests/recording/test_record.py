"""The record of a run: what is written is what is read, whatever happens in between."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from windows_of import window_of

from lipcore.metric.columns import Column, Columns, Places, words_of
from lipcore.metric.results import MetricResult, Window
from lipcore.metric.values import Level
from lipcore.recording import RecordError, RunRecord, open_run
from lipcore.recording.folding import FOLD, folded, unfolded
from lipcore.recording.location import of_a_network

NAMES, LEVELS = ["a.weight", "a", "b", "total"], ["tensor", "group", "group", "total"]


def numbers(first: int, count: int) -> np.ndarray:
    """Numbers that say which step and place they are of."""
    return (np.arange(first, first + count)[:, None] + np.arange(len(NAMES)) / 8).astype(np.float64)


def write(path: Path, blocks: list[tuple[int, int]], *, begin: int = 0, **options: object) -> None:
    record = RunRecord(path, **options)  # type: ignore[arg-type]
    record.begin(begin)
    for first, count in blocks:
        record.add_steps(first, {"update_norm": numbers(first, count)}, NAMES, LEVELS)
    record.close()
    assert not record.failed


def steps_of(path: Path, name: str = "update_norm") -> list[int]:
    with open_run(path) as run:
        series = run.series(name)
        assert np.array_equal(series["b"], series.steps + 2 / 8)
        return series.steps.tolist()


def test_steps_come_back(tmp_path: Path) -> None:
    write(tmp_path / "a", [(1, 64), (65, 64), (129, 10), (139, 500)])
    assert steps_of(tmp_path / "a") == list(range(1, 639))
    with open_run(tmp_path / "a") as run:
        assert run.series("update_norm").places == ["a", "b", "total"]
        assert run.series("update_norm", "t*").places == ["total"]
        assert run.last_step == 638
        assert [(start.kind, start.step) for start in run.starts] == [("start", 0)]


def test_every_parameter_on_request(tmp_path: Path) -> None:
    write(tmp_path / "a", [(1, 64)], level="tensor")
    with open_run(tmp_path / "a") as run:
        assert run.series("update_norm").places == NAMES
        assert np.array_equal(run.series("update_norm").values, numbers(1, 64))
        assert np.array_equal(run.series("update_norm", "a.*")["a.weight"], numbers(1, 64)[:, 0])


def test_windows_come_back(tmp_path: Path) -> None:
    windows = [window_of(i) for i in range(3)]
    record = RunRecord(tmp_path / "a", level="tensor")
    record.begin(0)
    for window in windows:
        record.add_window(window)
    record.close()
    with open_run(tmp_path / "a") as run:
        for found, window in zip(run.windows, windows, strict=True):
            assert found.to_dict() == window.to_dict()
            assert found.off == window.off
        series = run.series("norm.mean")
        assert series.steps.tolist() == [window.last_step for window in windows]
        assert np.array_equal(series["b"], [window["one"].norm["b"].mean.value for window in windows])


def test_the_time_of_a_window_is_that_of_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, clock = RunRecord(tmp_path / "a"), iter([1000.0, 1001.0, 1005.0])
    with monkeypatch.context() as patched:
        patched.setattr("lipcore.recording.record.time.time", lambda: next(clock))
        record.begin(0)
        first, second = window_of(0), window_of(1)
        record.add_window(first)
        record.add_window(second)
    record.close()
    with open_run(tmp_path / "a") as run:
        assert run.last_wall == 1005.0
        assert run.steps_per_second == (second.last_step - first.last_step) / 4


@pytest.mark.parametrize(
    ("levels", "where"),
    [
        (["tensor", "group", "group", "total"], [1, 2, 3]),
        (["group", "tensor", "total", "tensor"], [0, 2]),
        (["group", "total", "group", "group"], [0, 1, 2, 3]),
        (["tensor"] * 4, []),
    ],
)
def test_places_that_are_kept(tmp_path: Path, levels: list[Level], where: list[int]) -> None:
    record, values = RunRecord(tmp_path / "a"), numbers(1, 5)
    record.begin(0)
    record.add_steps(1, {"x": values}, NAMES, levels)
    results = {"one": MetricResult("one")}
    counts, flags = np.arange(4), np.array([True, False, True, True])
    labels = words_of(["exact", "exact", "heuristic", "exact"])
    column = Column(np.arange(4) / 2, counts, labels, flags, words_of(["", "a", "b", ""]))
    results["one"].add_columns("norm", Columns(Places(NAMES, levels), {"mean": column}))
    window = Window(0, 1, 5, True, "rank", results, {})
    record.add_window(window)
    record.close()
    with open_run(tmp_path / "a") as run:
        found, expected = run.windows[0]["one"], window["one"].norm
        assert list(found) == (["norm"] if where else [])
        for i in where:
            assert found.norm[NAMES[i]].mean == expected[NAMES[i]].mean
        if where:
            series = run.series("x")
            assert series.places == [NAMES[i] for i in where]
            assert np.array_equal(series.values, values[:, where])


def test_a_name_that_two_metrics_have(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a")
    record.begin(0)
    record.add_window(window_of(0))
    record.close()
    with open_run(tmp_path / "a") as run:
        with pytest.raises(ValueError, match="several metrics have 'norm.max'; choose one/norm.max or two/norm.max"):
            run.series("norm.max")
        assert {"one/norm.max", "two/norm.max", "norm.mean"} <= set(run.quantities)
        assert run.series("two/norm.max").values.shape == (1, 3)
        with pytest.raises(KeyError, match="there is no 'gone.mean' in this run.* It has .*norm.mean"):
            run.series("gone.mean")
        with pytest.raises(KeyError, match="norm.mean has no place 'c.*'"):
            run.series("norm.mean", "c*")


# ---- beginnings


@pytest.mark.parametrize("step", [64, 63, 70, 127, 128, 300])
def test_going_on_from_a_checkpoint_rewinds(tmp_path: Path, step: int) -> None:
    write(tmp_path / "a", [(1, 64), (65, 64), (129, 10)])
    write(tmp_path / "a", [(step + 1, 64)], begin=step)
    assert steps_of(tmp_path / "a") == [*range(1, min(step, 138) + 1), *range(step + 1, step + 65)]
    with open_run(tmp_path / "a") as run:
        kind = "rewind" if step < 138 else "resume"
        assert [(start.kind, start.step) for start in run.starts] == [("start", 0), (kind, step)]


def test_windows_and_events_rewind_too(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a")
    record.begin(0)
    for i in range(4):
        record.add_window(window_of(i))
        record.add_event(10 * i + 5, "alarm", f"number {i}")
    record.begin(20)
    record.add_window(window_of(2))
    record.close()
    with open_run(tmp_path / "a") as run:
        assert [window.last_step for window in run.windows] == [10, 20, 30]
        assert [event.text for event in run.events] == ["number 0", "number 1"]
        assert [start.kind for start in run.starts] == ["start", "rewind"]


def test_a_run_that_begins_anew_keeps_the_older_one(tmp_path: Path) -> None:
    write(tmp_path / "a", [(1, 64)])
    write(tmp_path / "a", [(1, 5)])
    assert steps_of(tmp_path / "a") == list(range(1, 6))
    (older,) = (tmp_path / "a").glob("*.older")
    assert steps_of(older) == list(range(1, 65))


def test_who_reads_the_older_one_goes_on(tmp_path: Path) -> None:
    write(tmp_path / "a", [(1, 64)])
    with open_run(tmp_path / "a") as reader:
        assert len(reader.series("update_norm")) == 64
        write(tmp_path / "a", [(1, 5)])
        assert len(reader.series("update_norm")) == 5
        (older,) = (tmp_path / "a").glob("*.older")
        assert older.name in repr(reader)
        assert steps_of(older) == list(range(1, 65))


def test_names_that_are_none(tmp_path: Path) -> None:
    write(tmp_path / "a", [(1, 64)])
    with open_run(tmp_path / "a") as run:
        for name, places in ((["update_norm"], "*"), ("update_norm", 0), ("update_norm", ["a"])):
            with pytest.raises(TypeError, match="expected a str, got"):
                run.series(name, places)  # type: ignore[arg-type]
        with pytest.raises(KeyError, match="there is no 'updte_norm' in this run; did you mean 'update_norm'"):
            run.series("updte_norm")
        with pytest.raises(TypeError, match="other: expected a Run, as open_run"):
            run.compare_plot("b", "update_norm")  # type: ignore[arg-type]


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, rounds=200)


@pytest.mark.ci
def test_killed_at_some_moments(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, rounds=25)


def kill_at_random_moments(tmp_path: Path, rounds: int) -> None:
    """What was flushed is there once, and right; a process says what it has flushed, and the next goes on behind it."""
    rng, said = np.random.default_rng(0), 0
    for _ in range(rounds):
        command = [sys.executable, Path(__file__).with_name("killed_writer.py"), tmp_path / "a", str(said)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                process.wait(float(rng.uniform(0, 0.25)))
            except subprocess.TimeoutExpired:
                process.kill()
            lines = process.stdout.read().split()
        said = max([said, *map(int, lines)])
        with open_run(tmp_path / "a") as run:
            if not said:
                continue
            series = run.series("update_norm")
            assert series.steps.tolist() == list(range(1, len(series) + 1))
            assert len(series) >= said
            assert np.array_equal(series["b"], series.steps + 2 / 8)
    assert said > 100


# ---- bytes


def test_folded_steps_keep_least_mean_and_greatest() -> None:
    values = np.random.default_rng(0).standard_normal((150, 3)).astype(np.float32)
    values[5, 1], values[7, 1] = math.nan, math.inf
    values[64:128, 2] = math.nan
    three = unfolded(folded(values), 3)
    for group in range(3):
        for place in range(3):
            part = values[group * FOLD : (group + 1) * FOLD, place].astype(np.float64)
            part = part[np.isfinite(part)]
            expected = [part.min(), part.mean(), part.max()] if len(part) else [math.nan] * 3
            assert np.allclose(three[:, group, place], expected, rtol=1e-6, equal_nan=True)


def test_older_steps_are_folded_where_the_file_grows(tmp_path: Path) -> None:
    names = [f"g{i}" for i in range(200)]
    rng = np.random.default_rng(0)
    record = RunRecord(tmp_path / "a", max_bytes=1 << 20)
    record.begin(0)
    written = rng.standard_normal((64 * 200, 200))
    for block in range(200):
        record.add_steps(64 * block + 1, {"x": written[64 * block : 64 * (block + 1)]}, names, ["group"] * 200)
    record.close()
    with open_run(tmp_path / "a") as run:
        series = run.series("x", "g3")
    assert os.path.getsize(tmp_path / "a" / "rank0.lipcore") < 3 << 20  # a tenth of what it would be
    assert series.steps[-1] == 64 * 200
    assert np.all(np.diff(series.steps) > 0)
    column = written[:, 3]
    begin = 0
    for step, low, mean, high in zip(
        series.steps, series.low[:, 0], series.values[:, 0], series.high[:, 0], strict=True
    ):
        part = column[begin:step]
        assert (low, mean, high) == pytest.approx((part.min(), part.mean(), part.max()), rel=1e-5, abs=1e-6)
        begin = step


# ---- bad input


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        ("", ValueError, "run: expected the path of a folder"),
        ("a/../../b", ValueError, r"without '\.\.'"),
        ("a\0b", ValueError, "run: expected the path of a folder"),
        (3, TypeError, "run: expected the path of a folder, got int"),
        (b"a", TypeError, "run: expected the path of a folder, got bytes"),
    ],
)
def test_what_is_no_folder(run: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RunRecord(run)  # type: ignore[arg-type]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        RunRecord(tmp_path / "a")


def test_what_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(RecordError, match="there is no record in"):
        open_run(tmp_path / "a")
    with pytest.raises(RecordError, match="there is no run"):
        open_run(tmp_path / "b")
    file = tmp_path / "a" / "rank0.lipcore"
    file.write_bytes(b"no database, whatever its name says" * 100)
    for use in (open_run, RunRecord):
        with pytest.raises(RecordError, match="cannot be opened as a run record"):
            use(tmp_path / "a")
    file.unlink()
    with sqlite3.connect(file) as other:
        other.execute("create table x(y)")
    with pytest.raises(RecordError, match="is no run record of lipcore"):
        open_run(tmp_path / "a")


def test_another_version(tmp_path: Path) -> None:
    write(tmp_path / "a", [(1, 5)])
    with sqlite3.connect(tmp_path / "a" / "rank0.lipcore") as file:
        file.execute("update meta set value = '99' where key = 'schema'")
    for use in (open_run, RunRecord):
        with pytest.raises(RecordError, match="is a record of schema 99, and this lipcore has schema 1"):
            use(tmp_path / "a")


def test_a_truncated_file(tmp_path: Path) -> None:
    write(tmp_path / "a", [(64 * i + 1, 64) for i in range(64)])
    file = tmp_path / "a" / "rank0.lipcore"
    with open(file, "r+b") as f:
        f.truncate(file.stat().st_size // 2)
    with pytest.raises(RecordError, match=r"rank0.lipcore: cannot be"):
        open_run(tmp_path / "a").series("update_norm")


def test_another_model(tmp_path: Path) -> None:
    write(tmp_path / "a", [(1, 5)], model="one")
    with pytest.raises(RecordError, match="is the record of another model"):
        RunRecord(tmp_path / "a", model="two")
    write(tmp_path / "a", [(6, 5)], begin=5, model="one")  # and nothing is held after the error


@pytest.mark.ci
def test_two_writers(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a")
    with pytest.raises(RecordError, match="this process writes it already"):
        RunRecord(tmp_path / "a")
    code = f"from lipcore.recording import RunRecord; RunRecord({str(tmp_path / 'a')!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"is being written by another process (number {os.getpid()})" in found.stderr
    record.close()
    write(tmp_path / "a", [(1, 5)])


def test_folders_with_several_runs_and_ranks(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, [(1, 5)], rank=1)
    with pytest.raises(RecordError, match="holds several runs, a, b; open one of them"):
        open_run(tmp_path)
    with pytest.raises(ValueError, match=r"no record of rank 0; it has rank1.lipcore"):
        open_run(tmp_path / "a")
    assert open_run(tmp_path / "a", rank=1).last_step == 5


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a")
    record.begin(0)
    record.add_steps(1, {"x": numbers(1, 5)}, NAMES, LEVELS)
    assert record.flush()
    record._connection.execute("pragma max_page_count = 1")  # as a full disk
    for i in range(50):
        record.add_steps(6 + 64 * i, {"x": numbers(6 + 64 * i, 64)}, NAMES, LEVELS)
    assert not record.flush()
    assert "full" in record.failed
    record.close()
    assert open_run(tmp_path / "a").last_step >= 5


def test_an_excerpt_amid_what_is_written(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a")
    record.begin(0)
    record.flush()
    for first in (1, 5):
        record.add_steps(first, {"update_norm": numbers(first, 4)}, NAMES, LEVELS)
    (tmp_path / "b").mkdir()
    record.write_excerpt(tmp_path / "b" / "rank0.lipcore")
    record.add_steps(9, {"update_norm": numbers(9, 4)}, NAMES, LEVELS)
    record.close()
    assert not record.failed
    assert steps_of(tmp_path / "b") == list(range(1, 9))
    assert steps_of(tmp_path / "a") == list(range(1, 13))


@pytest.mark.parametrize("when", ["meanwhile", "before", "closed"])
def test_an_excerpt_of_a_record_that_has_failed_is_not_said_to_be_there(tmp_path: Path, when: str) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    record = RunRecord(tmp_path / "a")
    record.begin(0)
    assert record.flush()
    record._put(full)
    if when != "meanwhile":
        record.flush()
    if when == "closed":
        record.close()
    with pytest.raises(RecordError, match=r"^the record lacks the last steps: .*rank0.lipcore: OSError.*No space"):
        record.write_excerpt(tmp_path / "b", timeout=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    record.close()


def test_arguments_of_a_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="record_level: expected 'group' or 'tensor', got 'all'"):
        RunRecord(tmp_path, level="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_bytes: expected an integer >= 1048576"):
        RunRecord(tmp_path, max_bytes=10)
    with pytest.raises(TypeError, match="config: expected a dict with names as keys, got list"):
        RunRecord(tmp_path, config=[1])  # type: ignore[arg-type]


def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a")
    record.begin(0)
    pid = os.fork()
    if not pid:
        record.add_steps(1, {"x": numbers(1, 5)}, NAMES, LEVELS)
        record.flush()
        try:
            record.write_excerpt(tmp_path / "b", timeout=3)
        except RecordError as error:
            record.close()
            os._exit(0 if "another process than this one" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    record.close()
    assert open_run(tmp_path / "a").last_step == 0


def test_the_file_system_is_known(tmp_path: Path) -> None:
    assert isinstance(of_a_network(tmp_path), str)


def test_all_quantities_of_some_steps_are_one_transaction(tmp_path: Path) -> None:
    record, said = RunRecord(tmp_path / "a"), list[str]()
    record.begin(0)
    record.flush()
    record._connection.set_trace_callback(said.append)
    arrays = {name: np.full((64, 2), value) for name, value in (("t/a", 1.0), ("t/b", 2.0), ("t/c", 3.0))}
    record.add_steps(1, arrays, ["x", "total"], ["group", "total"])
    record.close()
    assert said.count("commit") == 1
    with open_run(tmp_path / "a") as run:
        assert [run.series(name, "x").values[-1, 0] for name in "abc"] == [1, 2, 3]
