"""A record where things go wrong: networks, locks, links, forks, a full disk that has room again."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import threading
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest

from lipcore.recording import RecordError, RunRecord, backup, open_run, record
from lipcore.recording.folding import FOLD, fold_oldest, folded
from lipcore.recording.location import being_written
from lipcore.recording.pack import packed_steps
from lipcore.recording.recorder import Recorder

NAMES, LEVELS = ["a", "total"], ["group", "total"]


def add(to: RunRecord, first: int, count: int, quantity: str = "x") -> None:
    steps = np.arange(first, first + count)[:, None] + np.zeros(2)
    to.add_steps(first, {quantity: steps}, NAMES, LEVELS)  # type: ignore[arg-type]


def steps_of(path: Path) -> list[int]:
    with open_run(path) as run:
        series = run.series("x", "total")
        assert np.array_equal(series["total"], series.steps)
        return series.steps.tolist()


# ---- a network's file system


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Folder for records that is taken for a network's; the machine's own files are in the folder "here" beside it."""
    monkeypatch.setattr(record, "of_a_network", lambda folder: "nfs")
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(backup, "local_copy", lambda path: tmp_path / "here" / path.name)
    return tmp_path / "runs"


def fails(*_: object) -> None:
    raise OSError(errno.ESTALE, "Stale file handle")


def test_a_record_on_a_network_lies_there_when_it_is_closed(network: Path) -> None:
    for begin in (0, 5):
        (network.parent / "here").mkdir(exist_ok=True)
        made = RunRecord(network / "a")
        made.begin(begin)
        add(made, begin + 1, 5)
        assert made.flush()
        assert steps_of(network / "a") == list(range(1, begin + 6))
        made.close()
    assert steps_of(network / "a") == list(range(1, 11))
    assert sorted(path.name for path in network.rglob("*")) == ["a", "rank0.lipcore"]
    assert not (network.parent / "here").exists()  # with nothing in it


def test_a_network_that_comes_back_gets_all(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = RunRecord(network / "a")
    made.begin(0)
    add(made, 1, 5)
    with monkeypatch.context() as gone:
        gone.setattr(backup.shutil, "copyfile", fails)
        assert not made.flush()
    assert not made.failed
    assert "is older than the record, which could not be copied there (OSError: [Errno 116] Stale" in made.behind
    add(made, 6, 5)
    made.close()
    assert not made.behind
    assert steps_of(network / "a") == list(range(1, 11))


def test_a_network_that_is_gone_at_the_end_loses_nothing(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = RunRecord(network / "a")
    made.begin(0)
    add(made, 1, 5)
    monkeypatch.setattr(backup.shutil, "copyfile", fails)
    made.close()
    here = network.parent / "here"
    assert made.behind.endswith(f"and lies in {here / 'rank0.lipcore'}")
    assert steps_of(here) == [1, 2, 3, 4, 5]


def test_a_full_disk_of_this_machine_loses_nothing_that_it_had(network: Path) -> None:
    made = RunRecord(network / "a")
    made.begin(0)
    add(made, 1, 5)
    assert made.flush()
    add(made, 6, 5)
    made._thread.put(lambda: None, alone=True, soon=True)  # what comes together would be taken back together
    made._thread.put(fails)
    made.close()
    assert made.failed
    assert steps_of(network / "a") == list(range(1, 11))


def test_an_excerpt_after_the_end_is_of_the_file_that_has_all(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = RunRecord(network / "a")
    made.begin(0)
    add(made, 1, 5)
    assert made.flush()
    add(made, 6, 5)
    monkeypatch.setattr(backup.shutil, "copyfile", fails)
    made.close()
    made.write_excerpt(network / "excerpt.lipcore")
    assert steps_of(network / "excerpt.lipcore") == list(range(1, 11))


def test_a_network_that_hangs_at_the_end_loses_nothing(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    recorder = Recorder(RunRecord(network / "a"), said.append)
    made, goes_on, copy = recorder.record, threading.Event(), backup.shutil.copyfile
    made.begin(0)
    add(made, 1, 5)
    monkeypatch.setattr(backup.shutil, "copyfile", lambda *paths: goes_on.wait(20) and copy(*paths))
    monkeypatch.setattr(record, "_AT_THE_END", 0.3)
    monkeypatch.setattr(made, "flush", lambda: RunRecord.flush(made, 0.3))
    recorder.closed()
    here = network.parent / "here" / "rank0.lipcore"
    assert said[0].endswith(f"not everything was written in 0.3 seconds; what there is lies in {here}")
    assert here.exists()
    with pytest.raises(RecordError, match="this process writes it already"):  # as its thread does
        RunRecord(network / "a")
    goes_on.set()
    assert made._thread.end(20)
    assert steps_of(network / "a") == [1, 2, 3, 4, 5]
    made._hold.close()


def test_a_record_that_cannot_be_begun_leaves_no_file_here(network: Path) -> None:
    RunRecord(network / "a", model="one").close()
    (network.parent / "here").mkdir(exist_ok=True)
    with pytest.raises(RecordError, match="the record of another model"):
        RunRecord(network / "a", model="another")
    assert not (network.parent / "here").exists()


# ---- whose file it is


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def has_none(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", has_none)
    made = RunRecord(tmp_path / "a")
    with pytest.raises(RecordError, match="this process writes it already"):
        RunRecord(tmp_path / "a")
    made.close()
    assert not being_written(made.path)
    RunRecord(tmp_path / "a").close()


def test_a_link_leads_to_the_same_file(tmp_path: Path) -> None:
    made = RunRecord(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(RecordError, match="this process writes it already"):
        RunRecord(tmp_path / "link")
    assert being_written(tmp_path / "link" / "rank0.lipcore")
    made.close()
    assert not being_written(tmp_path / "link" / "rank0.lipcore")


def test_a_loop_that_goes_to_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for _ in range(2):
        monkeypatch.chdir(tmp_path / "one")
        made = RunRecord("a")
        monkeypatch.chdir(tmp_path / "two")
        made.begin(0)
        add(made, 1, 5)
        made.close()
        made.write_excerpt(tmp_path / "two" / "excerpt")
    assert steps_of(tmp_path / "one" / "a") == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in (tmp_path / "one" / "a").iterdir()) == [
        "rank0-before-1.older",
        "rank0.lipcore",
    ]
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["excerpt"]


def test_a_lock_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(RecordError, match=r"run: .*lipcore-writer cannot be made \(No space left on device"):
            RunRecord(tmp_path / "a")
    RunRecord(tmp_path / "a").close()


@pytest.mark.ci
def test_a_finished_record_is_read_where_nothing_may_be_written(tmp_path: Path) -> None:
    """As on a disk that is mounted to be read, or in somebody else's folder."""
    made = RunRecord(tmp_path / "a")
    made.begin(0)
    add(made, 1, 5)
    made.close()
    read = f"len(open_run({str(tmp_path / 'a')!r}).series('x'))"
    code = (
        "import os\n"
        "from lipcore.recording import open_run\n"
        f"{read}\n"  # all modules are imported by now, which another user may not be allowed to read
        "os.getuid() or os.setuid(65534)\n"
        f"print({read})"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if folder.name.startswith(("test_", "popen-", "pytest-")):
            os.chmod(folder, 0o755)
    os.chmod(tmp_path / "a", 0o555)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["5"], found.stderr


# ---- a full disk that has room again


def test_a_record_goes_on_where_a_full_disk_has_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = RunRecord(tmp_path / "a")
    made.begin(0)
    add(made, 1, 5)
    assert made.flush()
    made._connection.execute("pragma max_page_count = 1")
    add(made, 6, 5000)
    made.begin(3)  # a checkpoint is gone back to meanwhile
    add(made, 4, 5, "y")
    assert not made.flush()
    assert "full" in made.failed
    add(made, 9, 1)
    made._connection.execute("pragma max_page_count = 1000000")
    assert not made.flush()  # it is not tried at every step
    monkeypatch.setattr(record, "_AGAIN", 0.0)
    made._again = 0.0
    add(made, 10, 1)  # which is lost too
    assert made.flush()
    add(made, 11, 5)
    add(made, 11, 5, "y")  # whose layout, and name, were of a transaction that was taken back
    made.close()
    assert not made.failed
    assert steps_of(tmp_path / "a") == [1, 2, 3, *range(11, 16)]
    with open_run(tmp_path / "a") as run:
        assert run.series("y").steps.tolist() == list(range(11, 16))
        assert [(start.kind, start.step) for start in run.starts] == [("start", 0), ("rewind", 3)]
        (event,) = run.events
    assert (event.kind, event.step) == ("gap", 3)
    assert "steps behind this one are missing: they could not be written (" in event.text
    assert "disk is full" in event.text


# ---- older steps


def test_folding_has_one_block_in_memory(tmp_path: Path) -> None:
    made = RunRecord(tmp_path / "a")
    connection = made._connection
    blob = packed_steps(np.zeros((FOLD, 4096)))  # 1 MiB
    for i in range(20):
        connection.execute("insert into steps values('x', 1, ?, ?, 1, ?)", (FOLD * i + 1, FOLD * (i + 1), blob))
    tracemalloc.start()
    try:
        assert fold_oldest(connection, {1: 4096})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    made.close()
    assert peak < 10 << 20
    assert [row[0] for row in open_run(tmp_path / "a")._file.rows("select fold from steps")] == [FOLD] * 10 + [1] * 10


def test_numbers_that_come_now_and_then_do_not_end_the_folding(tmp_path: Path) -> None:
    made = RunRecord(tmp_path / "a")
    values = packed_steps(np.zeros((FOLD, 1)))
    for step in range(1, 40):  # of an evaluation, at every 100th step
        made._connection.execute("insert into steps values('logged/eval', 1, ?, ?, 1, ?)", (step, step, b"\0\0\0\0"))
    for first in (1001, 2001):
        made._connection.execute("insert into steps values('x', 1, ?, ?, 1, ?)", (first, first + FOLD - 1, values))
    assert fold_oldest(made._connection, {1: 1})
    made.close()


def test_folding_in_a_thread_leaves_the_filters_of_warnings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[str] = []  # and they are those of all threads
    with monkeypatch.context() as patched, np.errstate(all="raise"):
        patched.setattr(warnings, "catch_warnings", lambda: changed.append("filters") or contextlib.nullcontext())
        found = np.frombuffer(folded(np.full((FOLD, 1), np.nan, np.float32)), "<f4")
    assert np.isnan(found).all()
    assert not changed


# ---- processes

_FORKS = """
import os, sys, threading, time
import numpy as np
from lipcore.recording import RunRecord

record = RunRecord(sys.argv[1])
record.begin(0)
steps = np.zeros((64, 200))
names, levels = [f"g{i}" for i in range(200)], ["group"] * 200
children = []
for block in range(12):
    record.add_steps(64 * block + 1, {"x": steps}, names, levels)
    if block % 3 == 2:
        record._thread._soon.set()
        time.sleep(0.002 * (block % 7))
        pid = os.fork()
        if not pid:
            sys.exit(0)
        children.append(pid)
end = time.monotonic() + 100
while children and time.monotonic() < end:
    children = [pid for pid in children if os.waitpid(pid, os.WNOHANG)[0] == 0]
    time.sleep(0.05)
for pid in children:
    os.kill(pid, 9)
record.close()
print(len(children), record.failed or "written")
"""


@pytest.mark.ci
def test_forked_children_end_as_any_process_does(tmp_path: Path) -> None:
    """They have the connection, at which a thread was writing that is not theirs."""
    found = subprocess.run(
        [sys.executable, "-c", _FORKS, str(tmp_path / "a")], capture_output=True, text=True, check=False, timeout=200
    )
    assert found.stdout.split() == ["0", "written"], found.stderr[-2000:]
    with open_run(tmp_path / "a") as run:
        assert run.series("x").steps.tolist() == list(range(1, 64 * 12 + 1))
    with contextlib.closing(RunRecord(tmp_path / "a")) as again:
        assert not again.failed


# ---- what is said


def test_what_is_said_of_a_gap_and_of_a_network(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    recorder = Recorder(RunRecord(network / "a"), said.append)
    for recorder.record.failed in ("full", "full", "", ""):
        recorder._tell()
    with monkeypatch.context() as gone:
        gone.setattr(backup.shutil, "copyfile", fails)
        recorder.state_taken()
        recorder.state_taken()
    recorder.record.flush()
    monkeypatch.setattr(backup.shutil, "copyfile", fails)
    recorder.closed()
    assert said[:2] == [
        "the run is no longer recorded, and the training goes on: full",
        "the run is recorded again; an event says behind which step some are missing",
    ]
    assert [one.rpartition("; ")[2] for one in said[2:]] == [
        "the next checkpoint, or the end, tries again",
        "copy it there",
    ]
