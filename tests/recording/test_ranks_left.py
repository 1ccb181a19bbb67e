"""A run that goes on, or begins anew, with fewer ranks: what the others' records have of later steps is taken back."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lipcore
from lipcore.recording import RunRecord, open_run

TOTAL = (["total"], ["total"])


def written(folder: Path, rank: int, ranks: int, steps: int = 30, begin: int = 0) -> RunRecord:
    record = RunRecord(folder, rank=rank, ranks=ranks)
    record.begin(begin)
    numbers = np.arange(begin + 1.0, steps + 1)[:, None]
    record.add_steps(begin + 1, {"logged/loss": numbers}, *TOTAL)  # type: ignore[arg-type]
    record.add_event(steps - 2, "alarm", "told by a step that is made again")
    return record


def of_three(folder: Path) -> Path:
    for rank in range(3):
        written(folder, rank, 3).close()
    return folder


def last_steps(folder: Path) -> dict[str, int]:
    return {path.name: open_run(path).last_step for path in sorted(folder.iterdir()) if path.suffix == ".lipcore"}


def test_a_run_that_goes_on_with_fewer_ranks(tmp_path: Path) -> None:
    folder = of_three(tmp_path / "a")
    before = open_run(folder, rank=2)  # somebody reads it
    written(folder, 0, 2, 40, begin=20).close()
    assert last_steps(folder) == {"rank0.lipcore": 40, "rank1.lipcore": 30, "rank2.lipcore": 20}
    assert before.last_step == 20
    with open_run(folder, rank=2) as run:
        (event,) = run.events
        assert (event.step, event.kind) == (20, "rank left")
        assert event.text == "the run goes on with 2 ranks behind step 20, without this one"
        assert np.array_equal(run.series("loss")["total"], np.arange(1.0, 21))
    with open_run(folder) as run:
        (event,) = (event for event in run.events if event.kind == "ranks left")
        assert event.text == "the run goes on with 2 ranks: what rank2.lipcore had of steps behind 20 was removed"
    written(folder, 1, 2, 40, begin=20).close()  # which takes its own back itself, and nobody else's
    written(folder, 0, 2, 50, begin=40).close()
    assert last_steps(folder) == {"rank0.lipcore": 50, "rank1.lipcore": 40, "rank2.lipcore": 20}
    assert len([event for event in open_run(folder).events if event.kind == "ranks left"]) == 1


def test_a_run_that_begins_anew_with_fewer_ranks(tmp_path: Path) -> None:
    folder = of_three(tmp_path / "a")
    (folder / "rank1-notes.lipcore").write_text("not of a rank")
    record = written(folder, 0, 1)
    record.close()
    (folder / "rank1-notes.lipcore").unlink()
    assert last_steps(folder) == {"rank0.lipcore": 30}
    aside = [f"rank{rank}.lipcore is rank{rank}-before-1.older now" for rank in (1, 2)]
    assert record.left == (f"this run begins with 1 rank: {'; '.join(aside)}",)
    for rank in range(3):
        assert open_run(folder / f"rank{rank}-before-1.older").last_step == 30
    with pytest.raises(ValueError, match=r"no record of rank 1; it has rank0.lipcore"):
        open_run(folder, rank=1)


def test_a_record_that_another_writes_or_that_is_none_is_left_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    for rank in (0, 2):
        written(folder, rank, 3).close()
    other = written(folder, 1, 3)
    other.flush()
    broken = folder / "rank2.lipcore"
    broken.write_bytes(b"no database" * 100)
    record = written(folder, 0, 1, 40, begin=20)
    record.flush()
    assert "rank1.lipcore may have steps of a history that was taken back; it was left" in record.left[0]
    assert "another process writes it" in record.left[0]
    assert "rank2.lipcore may have" in record.left[0]
    other.close()
    assert open_run(folder, rank=1).last_step == 30
    assert broken.read_bytes() == b"no database" * 100
    assert not record.failed
    record.close()


def test_on_a_file_system_of_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = of_three(tmp_path / "a")
    for module in ("record", "ranks_left"):
        monkeypatch.setattr(f"lipcore.recording.{module}.of_a_network", lambda folder: "nfs")
    opened: list[str] = []
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, *a, **k: opened.append(str(path)) or connect(path, *a, **k))
    written(folder, 0, 1, 40, begin=20).close()
    assert not [path for path in opened if path.startswith(str(tmp_path)) and not path.endswith("-half")]
    monkeypatch.undo()
    assert last_steps(folder) == {"rank0.lipcore": 40, "rank1.lipcore": 20, "rank2.lipcore": 20}


def test_watch_warns_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "a"

    def trained(steps: int, state: object = None) -> object:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with lipcore.watch(model, optimizer, run=folder, window_steps=5) as monitor:
            if state is not None:
                monitor.load_state_dict(state)  # type: ignore[arg-type]
            for _ in range(steps):
                model(torch.ones(2, 3)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            return monitor.state_dict()

    state = trained(20)
    written(folder, 1, 2).close()
    with pytest.warns(RuntimeWarning, match="run goes on with 1 rank: what rank1.lipcore had of steps behind 20 was"):
        trained(5, state)
    assert last_steps(folder) == {"rank0.lipcore": 25, "rank1.lipcore": 20}
