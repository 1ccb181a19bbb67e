"""The page about a run: what it says first, what it says is missing, and that nothing of a record becomes markup."""

from __future__ import annotations

import json
import re
import sqlite3
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few import few
from recorded_runs import HOSTILE, recorded, window_of_trajectory
from torch import nn

import lipcore
from lipcore.metric.columns import Column, Columns, Places
from lipcore.recording import RunRecord, open_run
from lipcore.report.binned import Binned
from lipcore.report.checks import checks_of
from lipcore.report.facts import Facts, facts_of
from lipcore.report.html import Table
from lipcore.report.page import page_of
from lipcore.report.ratio_map import RatioMap
from lipcore.report.window_facts import WindowFacts

pytest.importorskip("bokeh", reason="needs the extra `report`")


@pytest.fixture(autouse=True)
def short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave bokeh's own script out, which takes long to parse."""
    if "whole" not in request.fixturenames:
        monkeypatch.setattr("lipcore.report.page.library", lambda: "// bokeh")


@pytest.fixture
def whole() -> None:
    """Keep bokeh's script in the page."""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run with a fault, and an alarm about it."""
    with recorded(tmp_path_factory.mktemp("run") / "a", fault=(240, "layers.1"), alarm=True) as run:
        return page_of(run)


class Seen(HTMLParser):
    """The text of a page that people read, its elements, and what it would ask of elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.elements, self.asked = "", [], []
        self._inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self._inside.append(tag)
        self.asked += [value for name, value in attributes if name in ("src", "srcset") or (name == "href" and value)]
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" not in self._inside and "style" not in self._inside:
            self.text += data


def data_of(page: str) -> Any:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def verdict(page: str) -> str:
    return Seen(page[page.index('id="verdict"') - 40 : page.index('id="training"')]).text


def test_a_planted_fault_is_the_headline_with_step_and_layer(faulty: str) -> None:
    page = faulty
    headline = re.findall(r'<p class="headline">(.*?)</p>', page)[0]
    assert Seen(headline).text == (
        "▲1 alarm in step 240, layers.1: update norm over learning rate is 50 times its usual value"
    )
    where = data_of(page)["map"]
    assert where["start"] == [239, 1]
    assert "Most unusual: layers.1 at step 240" in Seen(page).text
    assert page.index("headline") < page.index('id="plot-loss"') < page.index('id="plot-ratio-map"')


@pytest.mark.ci
def test_the_map_alone_finds_a_fault_without_alarms(tmp_path: Path) -> None:
    with recorded(tmp_path / "a", steps=3000, fault=(2222, "layers.2")) as run:
        page = page_of(run)
    assert re.search(r"Most unusual: layers\.2 at step 2,222, [45]\d(\.\d)? times larger", Seen(page).text)
    assert "▲Step 2,222, layers.2: the update over the weight norm is" in verdict(page)
    assert "Alarms were off" in verdict(page)
    assert 'alarms="default"' in verdict(page)


@pytest.mark.ci
def test_a_quiet_run_says_how_many_checks_were_made_and_what_was_not_measured(tmp_path: Path) -> None:
    with recorded(tmp_path / "a", alarm=True) as run:
        said = verdict(page_of(run))
    assert "Nothing needs attention: none of 7 checks fired." in said
    assert "The loss fell from" in said
    assert "Gradient noise scale: pass metrics=[..., lipcore.PerSampleGradNorms(" in said
    assert "metrics=[..., lipcore.TensorStats()]" in said


def test_nothing_is_asked_of_elsewhere(faulty: str) -> None:
    page = faulty
    seen = Seen(page)
    assert {where for where in seen.asked if not where.startswith("data:")} == {"#"}
    assert "link" in seen.elements
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page.replace(page[page.index("<script>") :], ""))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    with recorded(tmp_path / "<b>a&", places=HOSTILE, fault=(200, HOSTILE[0]), alarm=True) as run:
        page = page_of(run)
    seen = Seen(page)
    assert seen.elements.count("script") == 3  # the data, bokeh, the page's own
    assert "img" not in seen.elements
    assert "alert(1)" in verdict(page)
    assert data_of(page)["map"]["names"] == list(HOSTILE)
    assert "<b>a&" in seen.text


@pytest.mark.parametrize(
    "case",
    few(
        [
            ({"steps": 0, "windows": 0}, "Nothing was recorded yet"),
            ({"windows": 0}, "No window was recorded"),
            ({"only_nan": True}, "The loss was never finite"),
            ({"steps": 1, "windows": 1, "places": ["only"]}, "only"),
            ({"steps": 5, "windows": 1, "places": ["only"]}, "White: as in the steps before"),
            (
                {"places": [f"layers.{i}.weight" for i in range(2000)], "level": "tensor"},
                "layers.0.weight and 4 after it",
            ),
            ({"steps": 1, "windows": 0, "places": []}, "total"),
        ],
        2,
    ),
)
def test_a_run_that_lacks_something_says_so(tmp_path: Path, case: tuple[dict[str, Any], str]) -> None:
    what, said = case
    with recorded(tmp_path / "a", **what) as run:
        page = page_of(run)
    assert said in Seen(page).text or said in data_of(page)["map"]["names"]


@pytest.mark.ci
def test_a_page_of_300_parameters_and_100_000_steps_is_below_3_mb(tmp_path: Path, whole: None) -> None:
    with recorded(tmp_path / "a", 100_000, [f"layers.{i}.weight" for i in range(300)], level="tensor") as run:
        assert len(page_of(run).encode()) < 3e6


def test_a_run_that_is_being_written(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a")
    record.begin(0)
    record.flush()
    with open_run(tmp_path / "a") as run:
        assert "being written now" in Seen(page_of(run)).text
        record.close()
        assert "being written now" not in Seen(page_of(run)).text


def test_a_record_that_is_cut_off_says_what_cannot_be_read(tmp_path: Path) -> None:
    with recorded(tmp_path / "a", steps=2000) as run:
        path = run.path
    connection = sqlite3.connect(path)
    connection.execute("pragma wal_checkpoint(truncate)")
    connection.execute("update steps set data = substr(data, 1, 100) where quantity = 'trajectory/grad_norm'")
    connection.execute("update windows set header = x'00'")
    connection.commit()
    connection.close()
    with open_run(path) as run:
        said = verdict(page_of(run))
    assert "Parts of the record cannot be read: trajectory/grad_norm" in said
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    try:
        with open_run(path) as run:
            said = verdict(page_of(run))
    except lipcore.RecordError as error:  # where the first pages are gone already
        said = str(error)
    assert "cannot be" in said


def test_steps_of_all_blocks_are_read(tmp_path: Path) -> None:
    with recorded(tmp_path / "a", steps=700, fault=(600, "layers.0")) as run:
        facts = facts_of(run)
        ratio = run.series("update_norm", "layers.0").values / run.series("weight_norm", "layers.0").values
    assert facts.ratios is not None
    assert facts.ratios.count[:, 0].sum() == 700
    assert facts.ratios.step_of_greatest(0) == 600
    assert facts.ratios.span(0)[2] == pytest.approx(ratio.max(), rel=1e-6)


@pytest.mark.ci
def test_what_each_metric_has_recorded_has_a_section(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    metrics = [
        *(lipcore.Trajectory(), lipcore.Lipschitz(), lipcore.PerSampleGradNorms(loss_reduction="mean")),
        lipcore.TensorStats(),
    ]
    with lipcore.watch(model, optimizer, run=tmp_path / "a", metrics=metrics, window_steps=20) as monitor:
        for _ in range(40):
            x = torch.randn(16, 4)
            loss = nn.functional.mse_loss(model(x), x[:, :1])
            monitor.log(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with open_run(tmp_path / "a") as run:
        assert run.config["alarms"] == "off"
        page = page_of(run)
    for key in ("training", "changed", "updates", "way", "noise", "samples", "tensors", "lipschitz", "words"):
        assert f'id="{key}"' in page
    said = verdict(page)
    assert "Alarms were off" in said
    assert "PerSampleGradNorms" not in said
    assert "the batch of 16" in Seen(page).text


def test_windows_that_slide_count_no_step_twice() -> None:
    facts = WindowFacts(1, 40)
    names, levels = ["a", "total"], ["group", "total"]
    for first in range(1, 32, 5):  # of 10 steps each, every 5 steps
        window = window_of_trajectory(0, 10, names, levels)
        columns = {"sum": Column(np.array([10.0, 0.0]), 10)}
        window["trajectory"].add_columns("unmoved_steps", Columns(Places(names, levels), columns))
        facts.take(replace(window, first_step=first, last_step=first + 9))
    facts.finish()
    assert facts.steps == 40
    assert facts.sums["trajectory", "unmoved_steps", "sum"] == {"a": 40.0, "total": 0.0}
    assert facts.numbers["trajectory", "distance", "last"].count[:, 0].sum() == 7


def test_long_tables_are_cut_and_say_so() -> None:
    table = Table(("a",), [(str(i),) for i in range(1000)]).html()
    assert "290 more rows, of 990" in table
    assert table.count("<tr>") == 302


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ([1e-3, 1e-3, 1e-3], "no layer's update over weight norm became ten times larger at once"),  # a schedule
        ([1e-3, 1, 1], "a: the update over the weight norm is"),
        ([100, 100, 100], "than before, as in most layers: the batch, or a new learning rate?"),
        ([1, 100, 1], "b: the update over the weight norm is"),
    ],
)
def test_a_schedule_is_no_sudden_change_of_one_layer(factors: list[float], said: str) -> None:
    ratios = Binned(1, 300, 300)
    values = 0.01 * np.exp(0.05 * np.random.default_rng(0).standard_normal((300, 3)))
    values[200:] *= factors
    values[210:] *= np.where(np.array(factors) > 1, 2.0, 1.0)  # the largest is not the first
    ratios.add(np.arange(1, 301), ["a", "b", "c"], values)
    facts = Facts("x", "x")
    (check,) = [one for one in checks_of(facts, RatioMap(ratios, facts)) if one.name == "Sudden changes"]
    assert said in check.text
    assert (check.state == "quiet") == check.text.startswith("From step 21 on, no layer")
    assert ("tep 201, " in check.text) == (check.state == "fired")


def test_a_group_of_which_a_parameter_is_not_finite_is_said_to_be_so(tmp_path: Path) -> None:
    """What is recorded of the group then is of the others, and would look like a sudden change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lipcore.watch(model, optimizer, run=tmp_path / "a", metrics=[lipcore.Trajectory()]) as monitor:
        for step in range(1, 61):
            loss = (model(torch.randn(8, 4)) + torch.randn(8, 1)).square().mean()
            monitor.log(loss=loss)
            loss.backward()
            before = model[0][1].weight.detach().clone()
            if step == 50:
                model[0][1].weight.grad[0, 0] = float("nan")
            optimizer.step()
            optimizer.zero_grad()
            if step == 50:
                with torch.no_grad():
                    model[0][1].weight.copy_(before)
    with open_run(tmp_path / "a") as run:
        left_out = run.series("not_finite")
        assert left_out.steps.tolist() == [50]
        assert (left_out["0"].item(), left_out["1"].item(), left_out["total"].item()) == (1, 0, 1)
        facts = facts_of(run)
        page = page_of(run)
    assert facts.ratios is not None
    row = facts.ratios.places.index("0")
    assert np.isnan(facts.ratios.high[49, row])
    assert np.isfinite(facts.ratios.high[[48, 50], row]).all()
    assert facts.lines["trajectory/update_norm"].first_not_finite.tolist() == [50]
    assert RatioMap(facts.ratios, facts).lost[:, row].nonzero()[0].tolist() == [49]
    assert "layer 0: a parameter is NaN or infinite in 1 step, for the first time in step 50." in verdict(page)
    assert "Most unusual: 0 at step 50" not in Seen(page).text


def test_weights_of_zero_have_no_ratio_which_is_not_a_value_that_is_not_finite(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "a")
    record.begin(0)
    update, weight = np.full((60, 1), 0.1), np.full((60, 1), 1.0)
    update[:5], weight[:5], update[30] = 0.0, 0.0, np.nan
    arrays = {"trajectory/update_norm": update, "trajectory/weight_norm": weight}
    record.add_steps(1, arrays, ["a"], ["group"])
    record.close()
    with open_run(tmp_path / "a") as run:
        facts = facts_of(run)
    assert facts.ratios is not None
    assert RatioMap(facts.ratios, facts).lost[:, 0].nonzero()[0].tolist() == [30]
