"""Checkpoints of torch.distributed.checkpoint: saved by some ranks and loaded by as many or others. What goes on is
what one process finds in float64 that nothing interrupts, bit for bit where the ranks are those that have saved;
docs/distributed.md says what is left out, and each row of that table stands here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_situations import (
    REFUSED,
    ROWS,
    Row,
    apart,
    chained,
    expected_of,
    lacks_scores,
    left_out,
    models_apart,
    read,
    refusals,
    whole,
    work_through,
)
from ranks import run_ranks

import lipcore

pytestmark = pytest.mark.ci  # three processes, for 60 s


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any, request: Any) -> Path:
    """What every rank has found, of the rows that are asked for; ranks are started once."""
    items = [item for item in request.session.items if "folder" in getattr(item, "fixturenames", ())]
    asked = {item.callspec.params["row"].name for item in items if hasattr(item, "callspec")}
    chosen = [row for row in ROWS if row.name in asked]
    place: Path = tmp_path_factory.mktemp("checkpoints")
    ranks = max(max(row.ranks, row.then) for row in chosen)
    run_ranks(work_through, str(place), [row.name for row in chosen], ranks=ranks)
    return place


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_run_goes_on_as_if_nothing_had_been(folder: Path, row: Row) -> None:
    truth = whole(row)
    for phase in ("saved", "loaded"):
        for found in read(folder, row, phase):
            assert "error" not in found, found.get("trace", found)
            assert len(found["global"]) == len(truth["global"]) > 0
            for numbers, expected, off in zip(found["global"], truth["global"], found["off"], strict=True):
                difference = apart(numbers, expected_of(row, expected, phase, off))
                assert not difference["absent"], difference
                assert difference["error"] <= 1e-7, difference
            if phase == "loaded" and lacks_scores(row):
                continue
            assert found.get("scores") == truth.get("scores") or apart_scores(found, truth) <= 1e-12
    for found in read(folder, row, "loaded"):
        assert sorted({name for off in found["off"] for name in off}) == left_out(row)
        assert bool(found["said"]) == bool(left_out(row))
    if (row.before, row.ranks) == (row.after, row.then):
        for saved, loaded in zip(read(folder, row, "saved"), read(folder, row, "loaded"), strict=True):
            assert str(saved["global"]) == str(loaded["global"])  # to the last bit, NaN too
            assert str(saved["own"]) == str(loaded["own"])


def apart_scores(found: Any, truth: Any) -> float:
    """The largest relative error of the mean scores by sample id; infinite where counts differ."""
    if found["scores"][0] != truth["scores"][0]:
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(found["scores"][1], truth["scores"][1], strict=True))


def test_what_is_refused_is_named(tmp_path: Path) -> None:
    run_ranks(refusals, str(tmp_path), ranks=4)
    for name, (_, _, ranks, _, words) in REFUSED.items():
        said = [(tmp_path / name / f"{rank}.txt").read_text() for rank in range(ranks)]
        assert all(re.search(words, each, re.DOTALL) for each in said), (name, said)
        assert set(said) != {"went on"}, name


def test_a_window_that_several_numbers_of_ranks_make(tmp_path: Path) -> None:
    run_ranks(chained, str(tmp_path), ranks=3)
    row = Row("chain", "fsdp2", 2, "ddp", 2)
    (expected,) = whole(row)["global"]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert not any(found["off"])
        difference = apart(found["global"][0], expected_of(row, expected, "loaded"))
        assert not difference["absent"], difference
        assert difference["error"] <= 1e-7, difference


def test_models_that_ranks_train_apart(tmp_path: Path) -> None:
    run_ranks(models_apart, str(tmp_path), ranks=2)


KILLED = """
import os, sys, torch
import torch.distributed.checkpoint as dcp
import lipcore

class DiesHalfway(dcp.FileSystemWriter):
    def finish(self, metadata, results):
        os.kill(os.getpid(), 9)  # the tensors are written, and nothing says where

torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
monitor = lipcore.Monitor(model, optimizer, [lipcore.Trajectory()])
for step in range(8):
    model(torch.ones(2, 3)).square().mean().backward()
    optimizer.step()
    place = f"{sys.argv[1]}/{step + 1}"
    if step == 4:
        dcp.save({"lipcore": monitor}, storage_writer=dcp.FileSystemWriter(place))
        print(monitor.compute()["trajectory"].path_length["total"].sum.value, flush=True)
    if step == 6:
        dcp.save({"lipcore": monitor}, storage_writer=DiesHalfway(place))
"""


def test_a_save_that_is_killed_leaves_the_one_before(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "7").exists()
    model = torch.nn.Linear(3, 1)
    monitor = lipcore.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), [lipcore.Trajectory()])
    with pytest.raises(BaseException, match="metadata"):  # torch's own is no Exception
        dcp.load({"lipcore": monitor}, checkpoint_id=tmp_path / "7")
    assert monitor.compute() is None
    dcp.load({"lipcore": monitor}, checkpoint_id=tmp_path / "5")
    path = monitor.compute()["trajectory"].path_length["total"].sum
    assert path.count == 5
    assert str(path.value) == done.stdout.strip()
