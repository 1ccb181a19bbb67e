"""What is said of single steps that are one rank's: where ranks hold parts of the model they are no norms of it all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from html_text import text_of
from ranks import run_ways
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lipcore
from lipcore.recording import RunRecord, open_run
from lipcore.report.covered import covered
from lipcore.report.parts import SINGLE_STEPS

STEPS, WINDOW = 12, 6


def whole(tensors: Any) -> float:
    """The norm of all of these, which ranks hold in parts."""
    found = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
    return float(torch.cat([t.detach().double().flatten() for t in found]).norm())


def train(rank: int, folder: str, name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    model = fully_shard(net) if name == "parts" else DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    with lipcore.watch(model, optimizer, run=f"{folder}/{name}", window_steps=WINDOW) as monitor:
        for step in range(STEPS):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * step + rank))
            loss = model(x).square().mean()
            monitor.log(loss=loss)
            loss.backward()
            norms.append(whole(p.grad for p in model.parameters()))
            optimizer.step()
            optimizer.zero_grad()
        monitor.global_window()
    return {"norms": norms}


@pytest.mark.ci
def test_norms_of_a_rank_are_not_shown_as_those_of_the_whole_model(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("bokeh", reason="needs the extra `report`")
    pytest.importorskip("rich", reason="needs the extra `top`")
    from lipcore.cli.top.reading import Pace, look
    from lipcore.cli.top.view import lines_of
    from lipcore.report.html import number
    from lipcore.report.page import page_of

    monkeypatch.setattr("lipcore.report.page.library", lambda: "// bokeh")
    found = run_ways(tmp_path, train, {"parts": {}, "copies": {}})
    norms = found["parts"][0]["norms"]
    first, last = (sum(norms[i : i + WINDOW]) / WINDOW for i in (0, WINDOW))
    with open_run(tmp_path / "parts", rank=1) as run:
        assert run.config[SINGLE_STEPS] == {"scope": "shard", "rank": 1, "ranks": 2}
        page = text_of(page_of(run))
        shown = "\n".join(line.plain for line in lines_of(look(run, Pace()), 120, 40))
    assert "Gradient and update norm of rank 1's part of the model" in page
    headline = page.index("Gradient and update norm of the whole model: mean and greatest of each window of all ranks")
    said = f"The gradient norm went from {number(first)} to {number(last)}; its greatest value is {number(max(norms))}"
    assert said in page[headline : page.index("Gradient and update norm of rank 1's part")]
    assert "single steps of rank 1 of 2" in page
    assert (
        "Single steps are of rank 1 of 2: its loss, its samples, and norms of rank 1's part of the model alone." in page
    )
    assert "The loss that rank 1 of 2 logged" in page
    assert "update over weight norm, of rank 1's part of the model" in page
    assert "of rank 1 of 2; norms are of rank 1's part of the model" in shown
    assert f"whole model, steps 7 to 12: gradient norm {number(last)}" in shown
    with open_run(tmp_path / "copies") as run:
        page = text_of(page_of(run))
        shown = "\n".join(line.plain for line in lines_of(look(run, Pace()), 120, 40))
    assert "Gradient and update norm of the whole model" in page
    assert "Single steps are of rank 0 of 2: its loss, its samples." in page
    assert "part of the model" not in page + shown
    assert re.search(r"^of rank 0 of 2$", shown, re.MULTILINE)


def test_a_run_that_went_on_with_fewer_ranks(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a", config={"scope": "mine", "ranks": "many"})
    record.begin(0, {SINGLE_STEPS: {"scope": "shard", "rank": 0, "ranks": 2}})
    record.begin(40, {SINGLE_STEPS: {"scope": "global", "rank": 0, "ranks": 1}})
    record.close()
    with open_run(tmp_path / "a") as run:
        found = covered(run.starts)
        assert run.config["ranks"] == "many"
    assert (found.parts, found.changed, found.model) == (True, 40, "rank 0's part of the model")
    assert "what they cover changed behind step 40" in found.sentence()


def test_one_process_has_nothing_to_say(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    with lipcore.watch(model, torch.optim.SGD(model.parameters(), lr=0.1), run=tmp_path / "a") as monitor:
        model(torch.ones(2, 3)).sum().backward()
        monitor.log(loss=1.0)
    with open_run(tmp_path / "a") as run:
        assert run.config[SINGLE_STEPS] == {"scope": "global", "rank": 0, "ranks": 1}
        assert covered(run.starts).sentence() == ""
