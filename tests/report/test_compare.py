"""Where runs part, and their curves at equal loss."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from few import few
from recorded_runs import HOSTILE, recorded

from lipcore.cli import main
from lipcore.recording import RunRecord, open_run
from lipcore.report.compare.aligned import curve
from lipcore.report.compare.page import compare_page
from lipcore.report.compare.parting import parting
from lipcore.report.facts import facts_of

pytest.importorskip("bokeh", reason="needs the extra `report`")


@pytest.mark.parametrize("step", few([256, 1, 255, 257, 600], 1))
def test_the_first_step_that_differs_is_found_with_its_place(tmp_path: Path, step: int) -> None:
    with recorded(tmp_path / "a", 700) as one, recorded(tmp_path / "b", 700, fault=(step, "layers.1")) as other:
        found = parting(one, other)
    assert (found.step, found.steps) == (step, step - 1)
    (difference,) = found.differences
    assert (difference.quantity, difference.place) == ("trajectory/update_norm", "layers.1")
    assert difference.other == pytest.approx(50 * difference.one, rel=1e-6)


def test_runs_that_are_the_same(tmp_path: Path) -> None:
    with recorded(tmp_path / "a", 300) as one, recorded(tmp_path / "b", 500, only_nan=False) as other:
        found = parting(one, one)
        assert (found.step, found.steps) == (None, 300)
        assert not found.differences
        assert parting(one, other).step is not None  # other random numbers, from the second block on
    with recorded(tmp_path / "c", only_nan=True) as one, recorded(tmp_path / "d", only_nan=True) as other:
        assert parting(one, other).step is None  # NaN is the same as NaN


def test_blocks_of_other_lengths_and_missing_steps(tmp_path: Path) -> None:
    values = np.arange(1.0, 601.0)[:, None]
    for name, cuts in (("a", (0, 600)), ("b", (0, 7, 300, 450, 600))):
        record = RunRecord(tmp_path / name)
        record.begin(0)
        for first, last in itertools.pairwise(cuts):
            if (name, first) != ("b", 7):  # steps 8 to 300 are not there
                record.add_steps(first + 1, {"logged/loss": values[first:last]}, ["total"], ["total"])
        record.close()
    with open_run(tmp_path / "a") as one, open_run(tmp_path / "b") as other:
        found = parting(one, other)
    assert (found.step, found.steps) == (None, 307)


def test_curves_at_equal_loss(tmp_path: Path) -> None:
    """A run that is twice as slow has the same numbers at the same loss."""
    for name, slow in (("a", 1), ("b", 2)):
        steps = np.arange(1, 200 * slow + 1)
        record = RunRecord(tmp_path / name)
        record.begin(0)
        arrays = {"logged/loss": 100 / (steps / slow)[:, None], "logged/tokens": 7.0 * steps[:, None]}
        arrays["logged/rate"] = -arrays["logged/tokens"]
        record.add_steps(1, arrays, ["total"], ["total"])
        record.add_steps(1, {"trajectory/grad_norm": (steps / slow)[:, None]}, ["total"], ["total"])
        record.close()
    found = []
    for name in ("a", "b"):
        with open_run(tmp_path / name) as run:
            facts = facts_of(run)
        numbers = facts.lines["trajectory/grad_norm"]
        by_loss = curve(facts, numbers, 0, "loss")
        assert by_loss is not None
        found.append((by_loss.at(2.0), by_loss.step_at(2.0)))
        by_tokens = curve(facts, numbers, 0, "tokens")
        assert by_tokens is not None
        assert by_tokens.x.tolist() == (7.0 * by_tokens.steps).tolist()
        assert curve(facts, numbers, 0, "epochs") is None
        with pytest.raises(ValueError, match="by: 'rate' does not only grow in the run"):
            curve(facts, numbers, 0, "rate")
    (fast, fast_step), (slow_, slow_step) = found
    assert fast == pytest.approx(slow_, rel=0.03)
    assert slow_step == pytest.approx(2 * fast_step, rel=0.05)


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path / HOSTILE[0].replace("/", "_"), 60, HOSTILE).close()
    recorded(tmp_path / "b", 60, HOSTILE, fault=(50, HOSTILE[1]), alarm=True).close()
    runs = [str(tmp_path / HOSTILE[0].replace("/", "_")), str(tmp_path / "b")]
    assert main(["compare", *runs, "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == 3 + page.count('"<script')  # none that came with a name
    assert "<img src" not in page
    assert "are the same up to step 49, and part in step 50: update norm of " in page
    assert "1 setting differs" in page  # whether alarms were on
    assert main(["compare", *runs, "--by", "tokens", "-o", str(tmp_path / "x.html")]) == 2
    assert "by: no run has logged 'tokens'" in capsys.readouterr().err
    assert main(["compare", runs[0], str(tmp_path / "no")]) == 2
    assert not (tmp_path / "x.html").exists()


@pytest.mark.ci
def test_runs_that_lack_something(tmp_path: Path) -> None:
    with recorded(tmp_path / "a", 0, windows=0) as one, recorded(tmp_path / "b", 40) as other:
        page = compare_page([one, other, one])
        assert "have no step in common" in page
        assert "Not compared at equal loss" in page
        with pytest.raises(ValueError, match="expected at least 2, got 1"):
            compare_page([one])


def test_a_learning_rate_that_differs_is_named_first_and_the_flight_recorder_is_not(tmp_path: Path) -> None:
    runs = []
    for number, rate in enumerate((0.1, 0.2)):
        record = RunRecord(tmp_path / str(number))
        record.begin(0)
        same, rates = np.ones((9, 1)), np.full((9, 1), 0.1)
        rates[5:] = rate
        moved = same + np.where(rates == 0.2, 5.0, 0.0)
        record.add_steps(1, {"trajectory/update_norm": moved}, ["a"], ["group"])
        record.add_steps(1, {"optimizer/group_lr": rates}, ["param_groups[0]: all"], ["group"])
        record.add_details(1, {"flight/tensor_update_norm": same + number}, ["a"], ["tensor"])
        record.close()
        runs.append(open_run(tmp_path / str(number)))
    found = parting(*runs)
    assert found.step == 6
    assert [one.quantity for one in found.differences] == ["optimizer/group_lr", "trajectory/update_norm"]
