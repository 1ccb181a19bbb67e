"""The thread that writes a record: order, transactions, failures and who waits for whom."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from lipcore.recording import write_thread
from lipcore.recording.write_thread import WriteThread


class Table:
    """A file with a table of numbers, and what was said to it."""

    def __init__(self, folder: Path, errors: list[Exception]) -> None:
        self.connection = sqlite3.connect(folder / "a", isolation_level=None, check_same_thread=False)
        self.connection.execute("create table numbers(number integer)")
        self.said: list[str] = []
        self.connection.set_trace_callback(self.said.append)
        self.thread = WriteThread(self.connection, errors.append)

    def add(self, number: int) -> None:
        self.thread.put(lambda: self.connection.execute("insert into numbers values(?)", (number,)))

    @property
    def numbers(self) -> list[int]:
        return [row[0] for row in self.connection.execute("select number from numbers")]


@pytest.fixture
def errors() -> list[Exception]:
    return []


@pytest.fixture
def table(tmp_path: Path, errors: list[Exception], monkeypatch: pytest.MonkeyPatch) -> Table:
    monkeypatch.setattr(write_thread, "TOGETHER", 30.0)  # it would be noticed
    return Table(tmp_path, errors)


def test_what_comes_together_is_one_transaction(table: Table, errors: list[Exception]) -> None:
    for number in range(20):
        table.add(number)
    table.thread.end(10)
    assert (table.said.count("begin immediate"), table.said.count("commit")) == (1, 1)
    assert table.numbers == list(range(20))
    assert not errors


def test_calls_alone_are_outside_of_transactions_and_in_order(table: Table) -> None:
    inside: list[tuple[bool, int]] = []
    for number in range(4):
        table.add(number)
        note = lambda: inside.append((table.connection.in_transaction, len(table.numbers)))  # noqa: E731
        table.thread.put(note, alone=number == 1)
    table.thread.end(10)
    assert inside == [(True, 1), (False, 2), (True, 3), (True, 4)]
    assert table.said.count("commit") == 2


def test_what_is_wanted_soon_waits_for_nothing(table: Table) -> None:
    done = threading.Event()
    table.add(1)
    table.thread.put(done.set, soon=True)
    assert done.wait(10)
    table.thread.end(10)


def test_a_full_queue_is_written_at_once(table: Table) -> None:
    for number in range(1000):
        table.add(number)
    table.thread.end(10)
    assert table.numbers == list(range(1000))
    assert table.said.count("commit") >= 1000 / 32  # no transaction grows with what waits


def test_after_a_failure_nothing_more_is_written_and_who_waits_is_told(table: Table, errors: list[Exception]) -> None:
    done = threading.Event()
    table.add(1)
    table.thread.put(lambda: None, alone=True)
    table.add(2)
    table.thread.put(lambda: table.connection.execute("insert into nowhere values(1)"))
    table.add(3)
    table.thread.put(done.set, alone=True, always=True)
    table.add(4)
    table.thread.end(10)
    assert done.is_set()
    assert table.numbers == [1]  # the transaction that failed has left nothing
    assert [str(error) for error in errors] == ["no such table: nowhere"]
    assert not table.connection.in_transaction


def test_a_call_that_is_always_made_is_in_no_transaction_which_may_fail(table: Table) -> None:
    done = threading.Event()
    table.add(1)
    table.thread.put(lambda: table.connection.execute("insert into nowhere values(1)"))
    table.thread.put(done.set, always=True)
    table.thread.end(10)
    assert done.is_set()


class Broken:
    """A connection that cannot even take a transaction back."""

    in_transaction = True

    def execute(self, sql: str) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    def rollback(self) -> None:
        self.execute("rollback")


def test_a_transaction_that_cannot_be_taken_back_ends_no_thread() -> None:
    errors: list[Exception] = []
    thread = WriteThread(Broken(), errors.append)  # type: ignore[arg-type]
    thread.put(lambda: None)
    done = threading.Event()
    thread.put(done.set, always=True, soon=True)
    assert done.wait(10)
    assert [str(error) for error in errors] == ["disk I/O error"]
    thread.end(10)


def test_what_must_be_made_is_made_up_for(table: Table, errors: list[Exception]) -> None:
    table.thread.put(lambda: table.connection.execute("insert into nowhere values(0)"))
    table.thread.put(lambda: table.connection.execute("insert into numbers values(1)"), must=True)
    table.thread.put(lambda: None, alone=True)
    table.add(2)
    table.thread.put(lambda: table.connection.execute("insert into numbers values(3)"), must=True)
    table.thread.put(lambda: table.connection.execute("insert into numbers values(4)"), mends=True)
    table.add(5)
    table.thread.end(10)
    assert table.numbers == [1, 3, 4, 5]
    assert len(errors) == 1


def test_a_file_system_that_hangs_ends_no_training(
    tmp_path: Path, errors: list[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_thread, "_WAITING", 3)
    monkeypatch.setattr(write_thread, "_PATIENCE", 0.1)
    table, begun, goes_on = Table(tmp_path, errors), threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        goes_on.wait(20)

    table.thread.put(hang, alone=True, soon=True)
    assert begun.wait(10)
    training = threading.Thread(target=lambda: [table.add(number) for number in range(100)], daemon=True)
    training.start()
    training.join(5)
    assert not training.is_alive()
    assert [str(error) for error in errors] == ["nothing was written in 0.1 seconds, while 3 blocks wait"]
    assert not table.thread.end(0.1)
    goes_on.set()
    assert table.thread.end(10)
    assert table.numbers == [0, 1, 2]  # in their order; what came after is left out
