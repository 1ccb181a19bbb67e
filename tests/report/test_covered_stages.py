"""What is said of the single steps of a rank that has a stage of a pipeline: norms are of that stage alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from html_text import text_of
from pipeline import run_stage, stage_of
from rank_situations import made
from ranks import run_ways

import lipcore
from lipcore.recording import open_run
from lipcore.recording.run import Start
from lipcore.report.covered import Covered, covered
from lipcore.report.parts import SINGLE_STEPS
from lipcore.report.window_facts import WindowFacts

STEPS, WINDOW = 8, 4


def start(**said: Any) -> Start:
    return Start("start", 0, 0.0, {SINGLE_STEPS: {"scope": "rank", "rank": 1, "ranks": 2, **said}})


@pytest.mark.parametrize(
    ("said", "model", "partial"),
    [
        ({}, "the whole model", False),
        ({"stage": "stages.1"}, "the stage 'stages.1'", True),
        ({"stage": "stages.1", "scope": "shard"}, "rank 1's part of the stage 'stages.1'", True),
    ],
)
def test_what_the_norms_are_of(said: dict[str, Any], model: str, partial: bool) -> None:
    found = covered([start(**said)])
    assert (found.model, found.partial, found.several) == (model, partial, True)
    alone = f", and norms of {model} alone" if partial else ""
    assert found.sentence() == f"Single steps are of rank 1 of 2: its loss, its samples{alone}."


def test_a_run_that_was_told_another_fact_of_that_name() -> None:
    assert covered([start(stage=3)]) == Covered()
    assert covered([start(stage="a")]).stage == "a"


@pytest.mark.parametrize(
    ("scopes", "model"),
    [
        ({"global": 3}, "the whole model"),
        ({"rank": 3}, "the stage 'a'"),
        ({"shard": 3}, "this rank's part of the stage 'a'"),
        ({"rank": 1, "global": 2}, "the whole model in 2 windows and of the stage 'a' in 1"),
    ],
)
def test_what_the_windows_are_of(scopes: dict[str, int], model: str) -> None:
    windows = WindowFacts()
    windows.scopes, windows.count = scopes, 3
    assert windows.model("a") == model


def train(rank: int, folder: str, name: str, merges: bool) -> list[float]:
    stage = stage_of(made(), rank)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    norms = []
    generator = torch.Generator().manual_seed(0)
    with lipcore.watch(
        stage,
        optimizer,
        metrics=[lipcore.Trajectory()],
        run=f"{folder}/{name}",
        window_steps=WINDOW,
        prefix=f"stages.{rank}",
        group="auto" if merges else None,
    ) as monitor:
        for _ in range(STEPS):
            x, y = torch.randn(5, 6, generator=generator).double(), torch.randn(5, 1, generator=generator).double()
            if merges:
                monitor.log(loss=1.0)
            optimizer.zero_grad()
            run_stage(stage, rank, x, y)
            norms.append(float(torch.cat([p.grad.flatten() for p in stage.parameters()]).norm()))
            optimizer.step()
        if merges:
            monitor.global_window()
    return norms


@pytest.mark.ci
def test_norms_of_a_stage_are_not_shown_as_those_of_the_whole_model(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("bokeh", reason="needs the extra `report`")
    pytest.importorskip("rich", reason="needs the extra `top`")
    from lipcore.cli.top.reading import Pace, look
    from lipcore.cli.top.view import lines_of
    from lipcore.report.html import number
    from lipcore.report.page import page_of

    monkeypatch.setattr("lipcore.report.page.library", lambda: "// bokeh")
    found = run_ways(tmp_path, train, {"merged": {"merges": True}, "apart": {"merges": False}})
    both = zip(*found["merged"], strict=True)
    whole = [sum(norm**2 for norm in step) ** 0.5 for step in both]
    last = sum(whole[WINDOW:]) / WINDOW
    for name, ranks in (("merged", 2), ("apart", 1)):
        with open_run(tmp_path / name, rank=1) as run:
            said = run.config[SINGLE_STEPS]
            assert said == {"scope": "rank", "rank": 1, "ranks": ranks, "stage": "stages.1"}
            page = text_of(page_of(run))
            shown = "\n".join(line.plain for line in lines_of(look(run, Pace()), 120, 40))
        assert "Gradient and update norm of the stage 'stages.1'" in page
        assert "norms of the stage 'stages.1' alone." in page
        assert "norms are of the stage 'stages.1'" in shown
        title = "Gradient and update norm of the whole model: mean and greatest of each window of all ranks"
        assert (title in page) is (name == "merged")
        assert (f"whole model, steps 5 to 8: gradient norm {number(last)}" in shown) is (name == "merged")
        bands = "the whole model" if name == "merged" else "the stage 'stages.1'"
        assert f"Update over weight norm of {bands}, by window" in page
