"""Steps that were made on another number of ranks are other numbers: nothing is compared over such a start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lipcore
from lipcore.recording import RunRecord, open_run
from lipcore.recording.run import Start
from lipcore.report.facts import facts_of
from lipcore.report.parts import SINGLE_STEPS, other_parts
from lipcore.report.plots import Plots
from lipcore.report.sections.training import training

TWO, ONE = {"ranks": 2, "scope": "shard", "rank": 0}, {"ranks": 1, "scope": "global", "rank": 0}


def resumed(folder: Path, after: Any, *, at: int = 85, steps: int = 120) -> None:
    """Write the record of a run that goes on with whole parameters in place of halves of them."""
    rng = np.random.default_rng(0)
    values = np.exp(0.02 * rng.standard_normal((steps, 3)))
    values[at:] *= 1.44
    names = [f"trajectory/{name}_norm" for name in ("grad", "update", "weight")]
    for begin, end, of in ((0, at, TWO), (at, steps, after)):
        record = RunRecord(folder, config={SINGLE_STEPS: of} if of else None)
        record.begin(begin)
        record.add_steps(
            begin + 1, dict.fromkeys(names, values[begin:end]), ["a", "b", "total"], ["group", "group", "total"]
        )
        record.close()


def test_nothing_is_compared_over_a_start_with_another_number_of_ranks(tmp_path: Path) -> None:
    resumed(tmp_path / "a", ONE)
    said = "steps up to 85 were made on 2 ranks (parts of the parameters), later ones on 1 rank (whole parameters)"
    with open_run(tmp_path / "a") as run:
        soon, later, before = (run.postmortem(step) for step in (88, 115, 80))
        facts = facts_of(run)
    assert (soon.first, soon.compared, list(soon.changes)) == (86, 0, [])
    text = " ".join(str(soon).split())
    assert "there is too little to compare the step with (those before were made on other ranks)" in text
    assert f"S{said[1:]}: the two are not compared." in text
    assert "First" not in text
    assert (later.first, list(later.changes)) == (86, [])
    assert later.compared >= 20
    assert (before.last, list(before.changes)) == (85, [])
    section, _ = training(facts, Plots(1, 120, []), None)
    assert any(str(said) in str(note) for note in section.notes)


@pytest.mark.parametrize("after", [TWO, None])
def test_a_start_with_the_same_or_that_does_not_say_it_is_compared_over(tmp_path: Path, after: Any) -> None:
    resumed(tmp_path / "a", after)
    with open_run(tmp_path / "a") as run:
        account = run.postmortem(88)
    assert (account.first, account.begin) == (1, 86)
    assert not account.parted


def test_a_rewind_takes_later_changes_back() -> None:
    def of(*starts: tuple[int, Any]) -> list[int]:
        return [
            one.last for one in other_parts([Start("", step, 0.0, {SINGLE_STEPS: parts}) for step, parts in starts])
        ]

    assert of((0, TWO), (85, ONE), (60, TWO)) == []
    assert of((0, TWO), (85, ONE), (100, TWO)) == [85, 100]
    assert of((0, TWO), (85, TWO)) == []
    assert of((0, TWO), (0, ONE), (50, ONE)) == []


def test_a_start_says_of_how_many_ranks_its_steps_are(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lipcore.watch(model, optimizer, run=tmp_path / "a", window_steps=2):
        for _ in range(2):
            model(torch.ones(5, 3)).sum().backward()
            optimizer.step()
    with open_run(tmp_path / "a") as run:
        assert run.config[SINGLE_STEPS] == ONE
