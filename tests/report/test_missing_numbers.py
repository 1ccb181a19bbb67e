"""What the page says where a number is missing: why, and what to do; never to pass a metric that was passed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from html_text import text_of
from recorded_runs import window_of_trajectory
from torch import nn

import lipcore
from lipcore.metric.results import MetricResult, Window
from lipcore.recording import RunRecord, open_run
from lipcore.report.page import page_of

pytest.importorskip("bokeh", reason="needs the extra `report`")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave bokeh's own script out, which takes long to parse."""
    monkeypatch.setattr("lipcore.report.page.library", lambda: "// bokeh")


def recorded(folder: Path, windows: list[Window]) -> str:
    record = RunRecord(folder)
    record.begin(0)
    for window in windows:
        record.add_window(window)
    record.close()
    with open_run(folder) as run:
        return text_of(page_of(run))


def windows(off: dict[int, dict[str, str]], **details: str) -> list[Window]:
    """Five windows of 20 steps; by number, what is off in them."""
    found = []
    for index in range(5):
        window = window_of_trajectory(index, 20, ["total"], ["total"])
        samples = MetricResult("per_sample_grad_norm", **details)
        results = {**window.results, "per_sample_grad_norm": samples} if details else window.results
        found.append(Window(index, window.first_step, window.last_step, True, "rank", results, off.get(index, {})))
    return found


def test_stats_that_the_trajectory_was_not_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = [lipcore.Trajectory(stats=["update_norm", "grad_norm"])]
    with lipcore.watch(model, optimizer, run=tmp_path / "a", metrics=metrics, window_steps=5) as monitor:
        for _ in range(10):
            loss = model(torch.randn(4, 6)).square().mean()
            monitor.log(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with open_run(tmp_path / "a") as run:
        page = text_of(page_of(run))
    missing = page[page.index("Not measured:") : page.index("All 7 checks")]
    assert 'Nothing says which layers moved: Trajectory was passed, without them: add "unmoved_steps" to its' in missing
    assert 'Update over weight norm by window: Trajectory was passed, without them: add "update_ratio"' in missing
    assert 'add "weight_norm", "path_length" to its stats=[...], or leave stats= out' in missing
    assert "lipcore.Trajectory()" not in missing


def test_a_metric_that_was_off_for_a_while(tmp_path: Path) -> None:
    why = "the window began before a state was loaded"
    page = recorded(tmp_path / "a", windows({3: {"lipschitz": why}}))
    assert f"lipschitz was off in the window over steps 61 to 80: {why}" in page
    assert "is off since" not in page
    page = recorded(tmp_path / "b", windows({1: {"lipschitz": why}, 3: {"lipschitz": why}}))
    assert "lipschitz was off in 2 windows, the last time up to step 80" in page
    page = recorded(tmp_path / "c", windows({i: {"lipschitz": f"reason {i}", "probes": why} for i in (1, 3, 4)}))
    assert "lipschitz is off (probes too) since step 61 or later: reason 4" in page
    assert "Local Lipschitz constants: lipschitz was passed, and is off: reason 4" in page


def test_the_reason_why_there_is_no_noise_scale(tmp_path: Path) -> None:
    why = "nobody knows whose samples are in its gradient"
    page = recorded(tmp_path / "a", windows({}, noise_scale_off=why))
    assert f"Gradient noise scale: per_sample_grad_norm was passed, and has no valid one: {why}" in page
