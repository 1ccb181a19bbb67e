"""Samples that the page names, and what it says of theory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lipcore
from lipcore.recording.batches import Batch
from lipcore.report.binned import Binned
from lipcore.report.facts import Facts, facts_of
from lipcore.report.largest_samples import LargestSamples
from lipcore.report.postmortem.samples import samples_of
from lipcore.report.postmortem.words import of_ranking
from lipcore.report.source import StepTime
from lipcore.report.statements import Theory
from lipcore.theory import bias_distance, lipschitz_bound, sandwich

pytest.importorskip("bokeh", reason="needs the extra `report`")
from lipcore.report.head import run_facts
from lipcore.report.plots import Plots
from lipcore.report.section import Missing, Section
from lipcore.report.sections.samples import sample_norms
from lipcore.report.sections.theory import theory


def batch(step: int, ids: list[int], norms: list[float] | None, losses: list[float] | None) -> Batch:
    arrays = [None if one is None else np.array(one, np.float32) for one in (norms, losses)]
    return Batch(step, np.array(ids), *arrays, None)


BATCHES = [
    batch(3, [7, 8, 9], [1, 2, 3], [9, 1, 1]),
    batch(4, [7, 8, 5], [50, 1, np.nan], [2, 1, 4]),
    batch(9, [7], None, [np.inf]),
]


def test_each_sample_stands_where_it_was_largest_and_what_is_not_finite_first() -> None:
    found = LargestSamples.of(BATCHES)
    assert (found.first, found.last, found.steps) == (3, 9, 3)
    norms = [(one.id, one.step, one.times) for one in found.by["gradient norm"]]
    assert norms == [(5, 4, 1), (7, 4, 2), (9, 3, 1), (8, 3, 2)]
    assert [(one.id, one.step) for one in found.by["loss"]] == [(7, 9), (5, 4), (8, 3), (9, 3)]
    assert found.usual == {"gradient norm": 2.0, "loss": 1.5}


def test_a_model_that_is_nan_does_not_hide_the_samples_before() -> None:
    """Of every step after the first NaN all losses are NaN."""
    after = [batch(step, list(range(20)), None, [np.nan] * 20) for step in range(5, 9)]
    found = LargestSamples.of([*BATCHES[:2], batch(4, [6], None, [np.inf]), *after])
    assert [(one.id, one.step, one.times) for one in found.by["loss"]][:3] == [(6, 4, 5), (7, 3, 6), (5, 4, 5)]
    assert found.later == {"gradient norm": 0, "loss": 80}
    made = sample_norms(Facts("a", "a", samples=found), Plots(1, 9))
    assert isinstance(made, Section)
    assert "Samples with the largest loss, each where it was largest; 80 more not finite later" in made.html()
    assert "Samples with the largest gradient norm, each where it was largest<" in made.html()


def test_a_batch_of_which_nothing_is_finite_is_one_row() -> None:
    lost = [batch(5, list(range(30, 62)), [np.nan] * 32, [np.inf] * 32), batch(6, [1, 2], None, [np.nan, np.nan])]
    found = LargestSamples.of([*BATCHES[:2], *lost])
    assert [(one.id, one.step, one.times) for one in found.by["loss"]][:2] == [(None, 5, 32), (7, 3, 2)]
    assert found.by["gradient norm"][0].id == 5  # one sample of step 4 was lost before
    assert found.later["loss"] == 2
    made = sample_norms(Facts("a", "a", samples=found), Plots(1, 9))
    assert isinstance(made, Section)
    assert made.html().count("all 32 samples") == 1
    first = Batch(5, np.arange(3), np.full(3, np.nan, np.float32), np.array([1, np.nan, 2], np.float32), None)
    samples = samples_of([batch(4, [7, 8], [1, 2], [1, 2]), first], 5)
    assert samples is not None
    norms, losses = samples.rankings
    assert (list(norms.top), norms.verdict, of_ranking(samples, norms)) == ([], "batch", "all 3 are not finite")
    assert [one.id for one in losses.top] == [1, 2, 0]
    one = samples_of([Batch(5, np.arange(1), np.full(1, np.nan, np.float32), None, None)], 5)
    assert one is not None
    assert [each.id for each in one.rankings[0].top] == [0]


def test_samples_without_numbers_are_no_ranking() -> None:
    assert LargestSamples.of([]).by == {}
    assert LargestSamples.of([Batch(1, None, None, None, b"state")]).by == {}
    assert list(LargestSamples.of([batch(1, [1], None, [2.0])]).by) == ["loss"]


def test_samples_are_named_where_no_metric_measures_their_norms() -> None:
    facts = Facts("a", "a", samples=LargestSamples.of(BATCHES))
    made = sample_norms(facts, Plots(1, 9))
    assert isinstance(made, Section)
    assert "Samples are known by name in 3 steps from 3 to 9, the last ones and those around alarms." in made.html()
    assert "not finite" in made.html()
    assert isinstance(sample_norms(Facts("a", "a"), Plots(1, 9)), Missing)


def recorded(folder: Path, width: int, **more: Any) -> Facts:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    metrics = [lipcore.Trajectory(), lipcore.Lipschitz()]
    with lipcore.watch(model, optimizer, run=folder, metrics=metrics, window_steps=5, **more) as monitor:
        for _ in range(20):
            x = torch.randn(8, 4)
            loss = nn.functional.mse_loss(model(x), x[:, :1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with lipcore.open_run(folder) as run:
        facts = facts_of(run)
    one = sandwich(monitor.history)
    said = {statement.what: statement.value for statement in facts.theory}
    assert said["lower side: mean of lambda / sigma_1(W_1)"].value == one.lower.value
    assert said["normalised length: sum of r"].value == one.length.value
    assert said["upper side: mean of lambda / sigma_min(W_1)"].valid == one.upper.valid == (width <= 4)
    return facts


def test_theory_is_said_with_labels_and_what_is_not_valid_is_grey(tmp_path: Path) -> None:
    facts = recorded(tmp_path / "a", width=8)
    made = theory(facts, Plots(facts.first_step, facts.last_step))
    assert isinstance(made, Section)
    page = made.html()
    assert "6 of 7 numbers about the whole run are valid; the others are grey, each with the reason." in page
    assert '<span class="greyed">W_1 has more outputs than inputs' in page
    assert "A side that is not drawn is not valid here; the table says why." in page
    assert "lower side: heuristic" in page
    assert [one.where for one in facts.theory].count("Corollary 2") == 0  # single parameters are not in the record
    assert "watch(record_level=&quot;tensor&quot;) with a Trajectory records it." in page
    assert isinstance(theory(Facts("a", "a"), Plots(1, 2)), Missing)


def test_a_run_with_nan_says_what_its_windows_in_memory_say(tmp_path: Path) -> None:
    """A record has null where a singular value is not finite."""
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    metrics = [lipcore.Lipschitz()]
    with lipcore.watch(model, optimizer, run=tmp_path / "a", metrics=metrics, window_steps=2) as monitor:
        for step in range(6):
            x = torch.full((4, 3), float("nan") if step == 3 else 1.0)
            model(x).square().mean().backward()
            optimizer.step()
    with lipcore.open_run(tmp_path / "a") as run:
        windows, facts = list(run.windows), facts_of(run)
    bounds = [lipschitz_bound(history).bound for history in (monitor.history, windows)]
    assert repr(bounds[0]) == repr(bounds[1])
    assert "W_1 is not finite" in bounds[1].note
    assert not facts.unread
    assert {one.where for one in facts.theory} >= {"Theorem 1", "Definition 1", "Corollary 1"}


def test_theory_that_fails_is_not_taken_for_a_metric_that_was_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Theory) -> None:
        raise TypeError("no number")

    recorded(tmp_path / "a", width=3)
    monkeypatch.setattr(Theory, "statements", fails)
    with lipcore.open_run(tmp_path / "a") as run:
        facts = facts_of(run)
    assert facts.unread == ["theory: no number"]
    assert facts.windows.count == 4
    made = theory(facts, Plots(1, 20))
    assert isinstance(made, Missing)
    assert made.remedy == "nothing, though the windows have lipschitz (theory: no number)"


def test_what_corollary_3_lacks_in_a_record_is_said(tmp_path: Path) -> None:
    """Plain SGD at batch 1: all but the loss gradients is there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    metrics = [lipcore.Trajectory(), lipcore.Lipschitz()]
    how: dict[str, Any] = {
        "metrics": metrics,
        "window_steps": 5,
        "record_level": "tensor",
        "config": {"about": "one <b>"},
    }
    with lipcore.watch(model, optimizer, run=tmp_path / "a", **how):
        for _ in range(10):
            (0.5 * (model(torch.randn(1, 4)) - 1).square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    with lipcore.open_run(tmp_path / "a") as run:
        facts = facts_of(run)
        assert bias_distance(list(run.windows), "0.bias", eps_max=9.0).bound.valid
    (bound,) = [one.value for one in facts.theory if one.what == "upper bound of the distance"]
    assert bound.note.startswith("eps_max is not in a record; theory.bias_distance(")
    made = theory(facts, Plots(1, 10))
    assert isinstance(made, Section)
    assert "whose own way" not in made.html()
    assert '<p class="facts">one &lt;b&gt; · Sequential · 10 steps' in run_facts(facts)


@pytest.mark.ci
def test_both_sides_and_a_parameter_of_its_own(tmp_path: Path) -> None:
    facts = recorded(tmp_path / "a", width=3, record_level="tensor")
    bound = "upper bound of the distance"
    assert [one.what for one in facts.theory if not one.value.valid] == [bound]
    said = {one.what: one for one in facts.theory if one.where == "Corollary 3"}
    assert "it takes batch 1" in said[bound].value.note
    with lipcore.open_run(tmp_path / "a") as run:
        true = bias_distance(list(run.windows), "0.bias")
    assert said["distance of 0.bias from its start"].value == true.distance
    assert said["length of its way"].value == true.length
    assert said["directness: distance over length"].value == true.directness
    assert (said[bound].first_step, said[bound].last_step) == (1, 20)
    said = {one.what: one for one in facts.theory if one.where == "Corollary 2"}
    lower = said["lower bound, by the steps' lengths"]
    assert lower.value.value <= said["variance of 0.bias"].value.value
    assert (lower.first_step, lower.last_step) == (16, 20)


def test_what_cannot_be_said_gives_the_reason(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    metrics = [lipcore.Lipschitz()]
    with lipcore.watch(model, optimizer, run=tmp_path / "a", metrics=metrics, window_steps=5):
        for _ in range(5):
            model(torch.randint(9, (8, 3))).square().mean().backward()
            optimizer.step()
    with lipcore.open_run(tmp_path / "a") as run:
        said = {one.where: one for one in facts_of(run).theory}
    assert said["Definition 1"].value.valid
    assert (said["Theorem 1"].what, said["Theorem 1"].value.valid) == ("cannot be said", False)
    assert "it needs a Linear or convolution as first layer" in said["Theorem 1"].value.note


def test_windows_without_a_slope_say_nothing() -> None:
    said = Theory()
    assert said.statements() == []
    result = lipcore.metric.results.MetricResult("lipschitz")
    said.take(lipcore.metric.results.Window(0, 1, 10, True, "global", {"lipschitz": result}, {}))
    assert said.statements() == []


def test_the_facts_say_what_a_step_took() -> None:
    facts = Facts("a", "a", step_time=StepTime(100, 0.05, 0.5))
    assert "200 steps a second · lipcore&#x27;s call: 0.5 of 5 ms a step" in run_facts(facts)
    assert "(10 %) inside lipcore&#x27;s call" in run_facts(facts)
    assert "a second" not in run_facts(replace(facts, step_time=StepTime()))
    assert "a second" not in run_facts(replace(facts, step_time=StepTime(63, 0.05, 0.5)))
    assert "a second" in run_facts(replace(facts, step_time=StepTime(64, 0.05, 0.5)))


def test_an_interval_is_drawn_where_some_of_the_middles_are_not_valid() -> None:
    ends, middle = Binned(1, 30, 30), Binned(1, 30, 30)
    steps = np.array([10, 20, 30])
    ends.add(steps, ["total"], np.array([[1.0], [np.nan], [2.0]]))
    middle.add(steps, ["total"], np.array([[1.5], [np.nan], [2.5]]))
    plots = Plots(1, 30)
    plots.band("noise", ends, middle, ends, 0, "samples")
    plots.lines("norm", [("norm", middle, 0)], "norm")
    for figure in plots._figures.values():  # both points stand alone: a line would show neither
        points = [one.data_source.data for one in figure.renderers if type(one.glyph).__name__ == "Scatter"]
        assert [data["end"].tolist() for data in points] == [[10, 30]]
    assert plots.script()["items"][0]["roots"]


@pytest.mark.parametrize(("width", "has_commas"), [(50.0, True), (0.05, False)])
def test_thousands_have_commas_where_ticks_can_be_told_apart(width: float, has_commas: bool) -> None:
    logged = Binned(1, 30, 30)
    logged.add(np.array([10, 20]), ["total"], np.array([[1234.0], [1234.0 + width]]))
    plots = Plots(1, 30)
    plots.lines("tokens", [("tokens", logged, 0)], "tokens")
    (figure,) = plots._figures.values()
    assert (type(figure.yaxis[0].formatter).__name__ == "NumeralTickFormatter") == has_commas
